"""The rules of the notebooks that a machine can check, and that nothing loads TensorFlow before it is needed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from typer.main import get_command

from helpers.cli import main
from helpers.core import notebooks

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_STATEMENTS = 15
LOOPS_AND_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.For, ast.AsyncFor, ast.While)
MOST_IFS = 6


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture
def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tree(cell):
    return ast.parse(cell.source)


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS][:8] == [
        "00_explore",
        "00b_crop",
        "01_split",
        "02_resize",
        "03_train_head",
        "04_fine_tune",
        "04b_join",
        "05_evaluate",
    ]


def test_optional_stages_are_declared_so():
    optional = {stage.name: stage.replaces for stage in notebooks.stages().values() if stage.optional}
    assert optional["crop"] == "explore"
    assert not {"explore", "split", "resize", "head", "fine_tune", "evaluate"} & {*optional}


# The form of the file


def test_it_is_valid_and_its_cells_have_names(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    names = [cell.id for cell in notebook.cells]
    assert len(set(names)) == len(names)


def test_it_holds_no_outputs(code):
    for cell in code:
        assert cell.outputs == [] and cell.execution_count is None


def test_its_kernel_is_python3(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}


def test_no_cell_is_empty_and_none_is_raw(notebook):
    for cell in notebook.cells:
        assert cell.source.strip() and cell.source == cell.source.strip() and cell.cell_type in ("code", "markdown")


# The first four cells, and the last


def test_it_begins_with_what_it_is_for(notebook, path):
    title, *rest = notebook.cells[0].source.split("\n")
    assert notebook.cells[0].cell_type == "markdown"
    number = path.stem.split("_")[0] if path.stem[0].isdigit() else "[A-Z][-a-z]+"  # a study has a name instead
    assert re.fullmatch(rf"# {number} · [A-Z].*[^.]", title)
    assert re.fullmatch(
        r"\n[A-Z][^\n]+\.\n\n\*\*Reads\*\* .+ · \*\*Writes\*\* .+ ·\s\*\*Takes\*\* .+", "\n".join(rest), re.S
    )


def test_its_second_cell_holds_the_parameters(notebook):
    tagged = [index for index, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [1]


def test_its_third_cell_holds_all_imports(notebook):
    statements = tree(notebook.cells[2]).body
    assert statements and all(isinstance(statement, ast.Import | ast.ImportFrom) for statement in statements)
    for cell in notebook.cells[3:]:
        if cell.cell_type == "code":
            assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree(cell)))


def test_its_fourth_cell_checks_the_inputs_and_shows_the_parameters(notebook, path):
    stage = notebooks.find_notebook(path.stem)
    source = notebook.cells[3].source
    assert f'notebooks.in_force("{stage.name}", globals())' in source and "stages.open(out, settings)" in source
    assert source.endswith("\nsettings")
    for name, made_by in stage.inputs.items():
        made_in = notebooks.find_stage(made_by).notebook.stem
        assert re.search(rf'stages\.require\({name}, [^)]*made_by="{made_in}"\)', source), f"{name} is not required"


def test_its_last_cell_finishes_the_stage_and_names_the_next(notebook, path):
    source = notebook.cells[-1].source
    last = tree(notebook.cells[-1]).body[-1]
    assert ast.unparse(last).startswith("stages.finish(folder, files=")
    number = path.stem[:2]
    following = [other.stem for other in NOTEBOOKS if number.isdigit() and other.stem[:2] == f"{int(number) + 1:02}"]
    if path.stem < "05" and following:
        assert f'next_notebook="{following[0]}"' in source


# Parameters


def test_its_parameters_are_literals_that_are_explained(path):
    for p in notebooks.find_notebook(path.stem).parameters.values():
        assert p.meaning and not p.meaning.removesuffix("...").endswith("."), p


def test_its_numbers_have_an_interval_and_its_defaults_lie_in_it(path):
    stage = notebooks.find_notebook(path.stem)
    for p in stage.parameters.values():
        numeric = re.search(r"\b(int|float)\b", p.type_text) and "str" not in p.type_text and "dict" not in p.type_text
        if numeric:
            assert notebooks.INTERVAL.match(p.allowed or ""), f"{p.name} needs an interval at the end of its comment"
    stage.model(**{name: p.default for name, p in stage.parameters.items()})


def test_its_parameters_stand_one_a_line(notebook):
    for node in tree(notebook.cells[1]).body:
        assert node.lineno == node.end_lineno, ast.unparse(node)


def test_papermill_sees_the_same_parameters(path):
    seen = papermill.inspect_notebook(str(path))
    declared = notebooks.find_notebook(path.stem).parameters
    assert list(seen) == list(declared)
    for name, p in declared.items():
        assert ast.literal_eval(seen[name]["default"]) == p.default
        assert seen[name]["inferred_type_name"].replace(" ", "") == p.type_text.replace(" ", "")
        assert seen[name]["help"].startswith(p.meaning)


def test_every_parameter_is_used(notebook, path):
    used = {node.id for cell in notebook.cells[2:] if cell.cell_type == "code" for node in ast.walk(tree(cell))
            if isinstance(node, ast.Name)}  # fmt: skip
    by_table = "settings[" in "".join(cell.source for cell in notebook.cells)
    unused = set(notebooks.find_notebook(path.stem).parameters) - used
    assert not unused or by_table, unused


def test_the_stages_form_the_line_of_the_design():
    names = list(notebooks.stages())
    assert names[:8] == ["explore", "crop", "split", "resize", "head", "fine_tune", "join", "evaluate"]
    for stage in notebooks.stages().values():
        assert all(names.index(made_by) < names.index(stage.name) for made_by in stage.inputs.values())


# The code


def test_its_cells_are_short(code):
    """Statements count, not lines: a call with an argument a line is better than a dictionary of arguments."""
    for cell in code[2:]:  # neither the parameters nor the imports, which are one a line
        statements = [node for node in ast.walk(tree(cell)) if isinstance(node, ast.stmt)]
        assert len(statements) <= MOST_STATEMENTS, cell.source


def test_it_defines_nothing_and_has_no_loops(code):
    nodes = [node for cell in code for node in ast.walk(tree(cell))]
    assert not [ast.unparse(node) for node in nodes if isinstance(node, LOOPS_AND_DEFINITIONS)]


@pytest.mark.parametrize("name", ["03_train_head", "04_fine_tune"])
def test_training_is_spelled_out(name):
    """Compile and fit are called in the notebook, on the part above the frontier, without dictionaries of arguments."""
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    nodes = [node for cell in cells if cell.cell_type == "code" for node in ast.walk(tree(cell))]
    branches = [node for node in nodes if isinstance(node, ast.If | ast.IfExp)]
    assert len(branches) <= MOST_IFS, [ast.unparse(node) for node in branches]
    calls = {ast.unparse(node.func): node for node in nodes if isinstance(node, ast.Call)}
    shown = ["frontier.cut", "feeds.fill_banks", "suffix.compile", "fitting.callbacks", "suffix.fit"]
    assert set(shown) <= set(calls)
    for call in shown:
        assert all(keyword.arg for keyword in calls[call].keywords), f"{call} hides its arguments behind **"


def test_a_lesson_says_what_to_look_for_and_what_to_try(notebook):
    cells = notebook.cells
    kinds = [cell.cell_type for cell in cells]
    assert kinds.count("markdown") >= 0.5 * kinds.count("code")
    figures = [
        i
        for i, cell in enumerate(cells)
        if re.search(r"^(\w+ = )?(sheets|curves|charts|doubts|rivals)\.", cell.source, re.M)
    ]
    for index in figures:
        assert cells[index + 1].cell_type == "markdown" and "**Look " in cells[index + 1].source, cells[index].source
    assert cells[-2].source.startswith("## Try it\n") and cells[-2].source.count("\n- ") == 2


@pytest.mark.parametrize("name", ["03_train_head", "04_fine_tune"])
def test_about_eight_parameters_come_first(name):
    lines = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells[1].source.split("\n")
    first = [line for line in lines[: lines.index("# more")] if ":" in line and "folder written" not in line]
    assert len(first) <= 9
    order = [line.partition(":")[0] for line in lines]
    assert order[-4:] == ["devices", "precision", "deterministic", "out"]


def test_parameters_that_both_phases_have_stand_in_the_same_order():
    head, tune = (list(notebooks.stages()[name].settings) for name in ("head", "fine_tune"))
    both = set(head) & set(tune)
    assert len(both) > 20
    assert [name for name in head if name in both] == [name for name in tune if name in both]


def test_it_fails_by_raising(code):
    for cell in code:
        assert not re.search(r"\b(sys\.exit|exit|quit|os\._exit)\(", cell.source) and "assert " not in cell.source
        assert not re.search(r"^\s*[%!]", cell.source, re.M)


def test_what_a_cell_says_is_shown(code):
    """A semicolon hides the last value, which is meant for the Axes of a plot."""
    assert not [cell.source for cell in code if re.search(r"""["'];$""", cell.source)]


def test_it_uses_what_it_imports(notebook):
    imported = {
        (alias.asname or alias.name).split(".")[0] for node in tree(notebook.cells[2]).body for alias in node.names
    }
    used = {node.id for cell in notebook.cells[3:] if cell.cell_type == "code" for node in ast.walk(tree(cell))
            if isinstance(node, ast.Name)}  # fmt: skip
    assert imported <= used, imported - used


def test_only_evaluation_opens_the_test_part(code, path):
    if path.stem in ("03_train_head", "04_fine_tune", "bakeoff"):
        assert '"test"' not in "".join(cell.source for cell in code)


def test_prose_stands_before_code(notebook):
    """A reader is told why before the first step, and nobody scrolls through more than four cells of code in a row."""
    kinds = "".join(cell.cell_type[0] for cell in notebook.cells)
    assert "ccccc" not in kinds[2:], kinds
    assert kinds.count("m") >= 4


def test_every_command_that_is_named_exists():
    commands = set(get_command(main.app).commands)
    assert len(list(ROOT.glob("helpers/**/*.py"))) > 60
    files = [
        *NOTEBOOKS,
        *ROOT.glob("helpers/**/*.py"),
        *ROOT.glob("recipes/**/*.yaml"),
        *ROOT.glob("docs/*.md"),
        ROOT / "README.md",
        ROOT / "Makefile",
    ]
    for file in files:
        for command in re.findall(
            r"`thaw ([a-z-]+)|(?:Run|Next|try): thaw ([a-z-]+)", file.read_text(encoding="utf-8")
        ):
            assert (name := "".join(command)) in commands, f"{file.name} names `thaw {name}`"


OLD_WORDS = "rightly|anew|be had|is had|but for|beneath|how to mend|by turns|picture of|classified wrongly|put right"
OLD_WORDS += "|lest|in place of|whatever|whoever|as it was drawn|hence|thus|upon|shall"
NEXT_WORD = r"""(?:\\n",|\bf"|[\s"'#])+"""  # what may stand between two words: they may be on two lines
DECLARED = r"(?<!optional, )(?<!optional\(\?:, )"  # "# optional, in place of STAGE" is what a notebook declares
OLD = re.compile(rf"{DECLARED}\b(?:{OLD_WORDS.replace(' ', NEXT_WORD)})\b", re.IGNORECASE)


def test_the_words_are_plain():
    """The reader's first language is not English: "again", not "anew"; "correctly", not "rightly"."""
    files = [*NOTEBOOKS, *ROOT.glob("helpers/**/*.py"), *ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("docs/*.md")]
    places = []
    for file in sorted([*files, ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "data" / "README.md"]):
        text = file.read_text(encoding="utf-8")
        for word in OLD.finditer(text):
            line = text.count("\n", 0, word.start()) + 1
            places.append(f"{file.relative_to(ROOT)}:{line}: {' '.join(word[0].split())}")
    assert not places, "\n".join(places)


@pytest.mark.parametrize(
    "text", ["in place\n    of it", '"in place\\n",\n    "of it"', "# in place\n# of", '"in place"\n f" of"']
)
def test_old_words_are_found_on_two_lines_too(text):
    assert OLD.search(text) and not OLD.search("# optional, in place of explore")


def test_the_readme_is_read_in_minutes_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1200
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).is_file(), f"{page.name} links to {link}"


# Start-up


def loads_tensorflow(*lines: str) -> bool:
    probe = "\nimport sys; print('tensorflow' in sys.modules or 'keras' in sys.modules)"
    command = [sys.executable, "-c", "\n".join(lines) + probe]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return found.stdout.split()[-1] == "True"


WITHOUT_TENSORFLOW = ("core", "data", "models", "evaluation", "reports", "pipeline", "cli")
LOADS_IT = {
    "helpers.evaluation.trust.explanation",
    "helpers.models.adapters",
    "helpers.models.classifier",
    "helpers.models.joined",
    "helpers.models.levels",
    "helpers.models.unfreezing",
    "helpers.reports.tensorboard",
}  # the network itself, and TensorBoard's writer


def test_departments_that_need_no_tensorflow_do_not_load_it():
    """Every module is imported: one that loads TensorFlow would cost each command and notebook four seconds."""
    names = [
        name
        for department in WITHOUT_TENSORFLOW
        for module in sorted((ROOT / "helpers" / department).rglob("*.py"))
        if (name := ".".join(module.relative_to(ROOT).with_suffix("").parts)) not in LOADS_IT
    ]
    assert len(names) > 40
    assert not loads_tensorflow("import importlib", f"for name in {names}: importlib.import_module(name)")


@pytest.mark.parametrize("name", ["00_explore", "00b_crop", "01_split", "02_resize", "bakeoff"])
def test_the_stages_before_training_do_not_load_tensorflow(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    assert not loads_tensorflow(notebook.cells[2].source)
