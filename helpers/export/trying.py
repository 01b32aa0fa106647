"""A bundle tried by hand: an image is chosen in Jupyter, and what the bundle says of it appears."""

import html
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from helpers.core import progress
from helpers.export import loading

MOST_CLASSES = 5  # shown of an answer


def show(bundle: Path) -> Any:
    """Return a button by which images are chosen and classified; in a run of `thaw`, what it says of golden images."""
    model, golden = loading.load(bundle).Model(bundle), sorted(bundle.glob("golden/*"))
    if os.environ.get(progress.PROGRESS_VARIABLE):  # nobody is there to choose
        said = {path.name: model.answer(model.pixels(path.read_bytes())) for path in golden}
        return pd.DataFrame(said).T[["predicted", "confidence"]]
    import ipywidgets as widgets

    button = widgets.FileUpload(accept="image/*", multiple=True, description="Choose images")
    answers = widgets.VBox([])

    def classify(change: Mapping[str, Any]) -> None:
        answers.children = [widgets.HTML(_shown(model, bytes(file["content"]), file["name"])) for file in change["new"]]

    button.observe(classify, names="value")
    answers.children = [widgets.HTML(_shown(model, path.read_bytes(), path.name)) for path in golden[:3]]
    return widgets.VBox([button, answers])


def _shown(model: Any, data: bytes, name: str) -> str:
    """Return an answer as HTML: the most probable classes with a bar each, or why the image cannot be read."""
    try:
        said = model.answer(model.pixels(data))
    except ValueError as error:
        return f"<b>{html.escape(name)}</b>: {html.escape(str(error))}"
    best = sorted(said["probabilities"].items(), key=lambda item: -item[1])[:MOST_CLASSES]
    bars = "".join(
        f"<div><meter value='{chance:.4f}'></meter> {html.escape(label)} {100 * chance:.1f} %</div>"
        for label, chance in best
    )
    return f"<b>{html.escape(name)}</b>: {html.escape(said['predicted'])}{bars}"
