"""The parts of every page: the templates, a notebook as HTML, and one executed notebook as a separate page.

A page is one HTML file that needs no network. Text from data is escaped by Jinja, the notebooks' own HTML is cleaned.
"""

import re
from pathlib import Path

import jinja2
from markupsafe import Markup

from helpers.core import disk
from helpers.core.mended import jsonschema

# What a notebook's own HTML may hold: structure, tables and images; no style, no script, nothing that loads.
# fmt: off
TAGS = {
    "a", "abbr", "b", "blockquote", "br", "caption", "code", "dd", "del", "details", "div", "dl", "dt", "em",
    "figcaption", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "img", "li", "ol", "p", "pre", "s", "span",
    "strong", "sub", "summary", "sup", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul",
}


def environment() -> jinja2.Environment:
    """Return the templates: everything is escaped, and a missing name is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def of_notebook(notebook: Path, out: Path, title: str) -> Path:
    """Write an executed notebook as a page, with its figures and without its code, whole or not at all.

    Args:
        notebook: the executed .ipynb.
        out: the page.
        title: of the browser's tab.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: there is no such notebook.
    """
    shown = exporter()
    shown.exclude_input = True
    body, _ = shown.from_filename(str(notebook.resolve()))
    page = environment().get_template("page.html.j2").render(title=title, body=Markup(body))  # cleaned by the exporter
    return disk.write_text(out, page)


def exporter():
    """Return nbconvert's plainest HTML: without style, script or font, and with the cells' HTML cleaned."""
    jsonschema.correct()
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic", sanitize_html=True, embed_images=True, exclude_anchor_links=True)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.register_preprocessor(_tidy, enabled=True)
    exporter.register_filter("clean_html", _clean)  # that of nbconvert removes headings and table heads
    return exporter


def _clean(html: str) -> str:
    import bleach

    def allowed(tag: str, name: str, value: str) -> bool:
        if tag == "img":
            return name in ("alt", "width", "height") or (name == "src" and value.startswith("data:image/"))
        return name in ("class", "colspan", "rowspan", "title") or (tag == "a" and name == "href")

    protocols = ("http", "https", "mailto", "data")
    return bleach.clean(str(html), tags=TAGS, attributes=allowed, protocols=protocols)


def _tidy(notebook, resources):
    """Remove style sheets, which the cleaner would turn into text, and TensorFlow's start-up notes."""
    for cell in notebook.cells:
        cell.metadata.setdefault("alt", "figure drawn by the cell above")
        for output in cell.get("outputs", []):
            if html := output.get("data", {}).get("text/html"):
                text = re.sub(r"<(style|script)\b.*?</\1\s*>", "", html, flags=re.DOTALL | re.IGNORECASE)
                output["data"]["text/html"] = text
            elif output.get("name") == "stderr":
                output["text"] = re.sub(
                    r"(?m)^(I0000 00:|WARNING: All log messages before absl).*\n?", "", output["text"]
                )
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("text", "kept").strip()]
    return notebook, resources


def code_style() -> Markup:
    """Return the style sheet of highlighted code."""
    from pygments.formatters import HtmlFormatter

    return Markup(HtmlFormatter(style="friendly").get_style_defs(".highlight"))
