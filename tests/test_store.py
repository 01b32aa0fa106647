"""The chain and its store, on toy notebooks of a few cells, each of which provokes one case.

Most tests run the toys within this process; where a kernel matters, a real one runs. The whole suite of notebooks on
real weights is run in test_pipeline.py.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from rich.console import Console

from helpers.cli import terminal
from helpers.core import disk, notebooks, project
from helpers.data import inventory
from helpers.pipeline import checks, execution, fingerprints, planning, recipes
from helpers.reports import report

EXPLORE = """
source: str = "photos"  # a folder with a file that stands for the images
letter: str = "a"  # what this stage adds
weights: str = ""  # a file that a parameter names
out: str = "runs/demo/explore"  # folder this notebook writes
"""
SPLIT = """
explore: str = "runs/demo/explore"  # folder written by 00_explore
letter: str = "b"  # what this stage adds
out: str = "runs/demo/split"  # folder this notebook writes
"""
RESIZE = """
split: str = "runs/demo/split"  # folder written by 01_split
letter: str = "c"  # what this stage adds
out: str = "runs/demo/resize"  # folder this notebook writes
"""
IMPORTS = """
import os
from pathlib import Path

from helpers.core import disk, progress, project, stages
"""
OPEN = 'folder = stages.open(out, {"letter": letter})'
NOTE = """
with open(os.environ["TOY_LOG"], "a") as log:
    print(folder.name.split("-")[0], file=log)
"""
TROUBLE = 'exec(Path(os.environ["TOY_TROUBLE"]).read_text())'
FIRST_WORD = '(folder / "word.txt").write_text((Path(source) / "photos.txt").read_text() + letter)'
NEXT_WORD = '(folder / "word.txt").write_text((project.resolve({}) / "word.txt").read_text() + letter)'
FINISH = 'stages.finish(folder, files=["word.txt"], headline=(folder / "word.txt").read_text())'

COMMAND = """
import sys
from pathlib import Path

from helpers.cli import main
from helpers.core import disk, notebooks, project
from helpers.data import inventory
from helpers.pipeline import checks

notebooks.NOTEBOOKS = Path(sys.argv.pop(1))
inventory.source_fingerprint = lambda parameters, cache_file: Path(parameters["source"], "photos.txt").read_text()
checks.check = lambda recipe, steps, backend="": None  # asks Keras about stages that toys do not have
class report:
    build_report = staticmethod(lambda folder: disk.write_text(folder / "report.html", "report"))
sys.modules["helpers.reports.report"] = report
main.entry()
"""


class Toys:
    """A chain of three toy notebooks, a recipe for it, and what it takes to run it and to look at what it made."""

    def __init__(self, folder: Path, notebooks: Path, notebook):
        self.folder, self.notebooks, self.notebook = folder, notebooks, notebook
        self.runs, self.log, self.source = folder / "runs", folder / "toy.log", folder / "photos" / "photos.txt"
        self.recipe, self.trouble = folder / "toy.yaml", folder / "trouble.py"
        self.source.parent.mkdir()
        self.source.write_text("photos:")
        self.trouble.write_text("")
        self.recipe.write_text(f"explore: {{source: {self.source.parent}}}\n")
        self.write("00_explore", EXPLORE, IMPORTS, OPEN, NOTE, TROUBLE, FIRST_WORD, FINISH)
        self.write("01_split", SPLIT, IMPORTS, OPEN, NOTE, NEXT_WORD.format("explore"), FINISH)
        self.write("02_resize", RESIZE, IMPORTS, OPEN, NOTE, NEXT_WORD.format("split"), FINISH)

    def write(self, name: str, *cells: str) -> Path:
        notebooks.stages.cache_clear()
        return self.notebook(self.notebooks / f"{name}.ipynb", *cells)

    def load(self, *sets: str, name: str = "") -> recipes.Recipe:
        return recipes.load(self.recipe, list(sets), name)

    def plan(self, *sets: str, name: str = "", rebuild: str = "") -> dict[str, planning.Step]:
        return {step.stage.name: step for step in planning.plan(self.load(*sets, name=name), rebuild)}

    def why(self, *sets: str, **options) -> dict[str, str]:
        return {name: step.why for name, step in self.plan(*sets, **options).items()}

    def run(self, *sets: str, name: str = "", **options) -> str:
        """Run the chain; return what the terminal shows."""
        shown = io.StringIO()
        terminal.run(self.load(*sets, name=name), Console(file=shown, width=200), **options)
        return shown.getvalue()

    def ran(self) -> list[str]:
        """The stages whose notebooks ran since this was asked last."""
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return text.split()

    def word(self, stage: str = "resize", run: str = "toy") -> str:
        return (self.runs / run / stage / "word.txt").read_text()

    def command(self, *arguments: str, **options) -> subprocess.Popen:
        """Start `thaw` on the toys as a process of its own."""
        given = [sys.executable, "-c", COMMAND, str(self.notebooks), *arguments]
        return subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


@pytest.fixture
def toys(tmp_path, toy_notebooks, notebook, runs_folder, monkeypatch):
    made = Toys(tmp_path, toy_notebooks, notebook)
    monkeypatch.setenv("TOY_LOG", str(made.log))
    monkeypatch.setenv("TOY_TROUBLE", str(made.trouble))
    monkeypatch.setattr(
        inventory, "source_fingerprint", lambda p, cache_file: Path(p["source"], "photos.txt").read_text()
    )
    monkeypatch.setattr(checks, "check", lambda recipe, steps, backend="": None)
    monkeypatch.setattr(report, "build_report", lambda folder: disk.write_text(folder / "report.html", "report"))
    return made


@pytest.fixture
def quick(monkeypatch):
    """Papermill without a kernel: the cells run within this process."""

    def execute(source, target, parameters, *, stdout_file, **_):
        notebook, namespace = nbformat.read(source, as_version=4), {}
        with contextlib.redirect_stdout(stdout_file):
            for cell in notebook.cells[1:]:
                exec(cell.source, namespace)
                namespace |= parameters if "tags" in cell.metadata else {}
        nbformat.write(notebook, target)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    return execute


@pytest.fixture
def quick_toys(toys, quick):
    return toys


ALL = ["explore", "split", "resize"]


# Skipping and sharing


def test_a_chain_runs_once(quick_toys):
    shown = quick_toys.run()
    assert quick_toys.ran() == ALL and quick_toys.word() == "photos:abc"
    assert "3 of 3 stages to do" in shown and "3/3 resize" in shown and "photos:abc" in shown
    assert "nothing to do, every stage is done" in quick_toys.run() and quick_toys.ran() == []


def test_only_what_depends_on_a_change_runs(quick_toys):
    quick_toys.run()
    quick_toys.ran()
    assert quick_toys.why("split.letter=x") == {
        "explore": "done",
        "split": "letter: b -> x",
        "resize": "split will change",
    }
    quick_toys.run("split.letter=x")
    assert quick_toys.ran() == ["split", "resize"] and quick_toys.word() == "photos:axc"
    quick_toys.run()
    assert quick_toys.ran() == [] and quick_toys.word() == "photos:abc"


def test_other_images_are_noticed_and_other_times_are_not(quick_toys):
    quick_toys.run()
    quick_toys.ran()
    os.utime(quick_toys.source, (1, 1))
    assert set(quick_toys.why().values()) == {"done"}
    quick_toys.source.write_text("other photos:")
    assert quick_toys.why() == {
        "explore": "the images changed",
        "split": "explore will change",
        "resize": "split will change",
    }
    quick_toys.run()
    assert quick_toys.ran() == ALL and quick_toys.word() == "other photos:abc"


REMEMBERING = SPLIT.replace(
    "out:",
    'method: str = "ratio"  # how the parts are filled {ratio, hash}\nprevious: str = ""  # an earlier split.csv\nout:',
)


def test_a_split_that_is_dealt_anew_is_told_with_the_way_to_keep_it(quick_toys, tmp_path):
    split = '(folder / "split.csv").write_text("sha256,part\\n")'
    quick_toys.write("01_split", REMEMBERING, IMPORTS, OPEN, NOTE, NEXT_WORD.format("explore"), split, FINISH)
    assert "made again" not in quick_toys.run() + quick_toys.run("split.letter=x", name="toy")
    quick_toys.run()
    earlier = (quick_toys.runs / "toy" / "split" / "split.csv").resolve()
    quick_toys.source.write_text("more photos:")
    told = f"cp {earlier} data/toy_split.csv, and add --set split.previous=data/toy_split.csv"
    for options in ({"dry_run": True}, {"last": "explore"}):
        assert told in " ".join(quick_toys.run(**options).split())
    quick_toys.run()
    assert "made again" not in quick_toys.run(), "nothing is to be split any more"
    quick_toys.source.write_text("still more photos:")
    assert "made again" not in quick_toys.run("split.method=hash", dry_run=True)
    assert "made again" not in quick_toys.run(f"split.previous={earlier}", dry_run=True)


@pytest.mark.parametrize("place", ["elpv", "elpv/split", "elpv/split/split.csv"])
def test_a_run_cannot_remember_its_own_split(runs_folder, place):
    recipe = recipes.load("recipes/elpv.yaml", [f"split.previous={runs_folder / place}"])
    with pytest.raises(notebooks.RecipeError, match=r"this run's own split.*cp .*/split\.csv data/elpv_split\.csv"):
        checks.check(recipe, [])


def test_an_earlier_split_that_is_missing_is_told_before_the_run(runs_folder):
    recipe = recipes.load("recipes/elpv.yaml", [f"split.previous={runs_folder / 'nowhere.csv'}"])
    with pytest.raises(FileNotFoundError, match=r"previous: there is no file .*nowhere\.csv"):
        checks.check(recipe, [])


def test_the_content_of_a_file_that_a_parameter_names_counts(quick_toys, tmp_path):
    weights = tmp_path / "weights.h5"
    weights.write_text("1")
    given = f"explore.weights={weights}"
    quick_toys.run(given)
    os.utime(weights, (1, 1))
    assert set(quick_toys.why(given).values()) == {"done"}
    weights.write_text("2")
    assert quick_toys.why(given)["explore"] == "the file that weights names changed"


def test_two_runs_share_what_they_have_in_common(quick_toys):
    quick_toys.run()
    quick_toys.ran()
    quick_toys.run("resize.letter=x", name="second")
    assert quick_toys.ran() == ["resize"]
    assert (quick_toys.word(), quick_toys.word(run="second")) == ("photos:abc", "photos:abx")
    assert (quick_toys.runs / "toy/split").resolve() == (quick_toys.runs / "second/split").resolve()


def test_the_folder_of_runs_may_be_moved(quick_toys, tmp_path, monkeypatch):
    quick_toys.run()
    quick_toys.ran()
    quick_toys.runs.rename(tmp_path / "moved")
    monkeypatch.setenv("THAW_RUNS", str(tmp_path / "moved"))
    assert "nothing to do" in quick_toys.run() and quick_toys.ran() == []


def test_a_run_is_a_folder_of_relative_links(quick_toys):
    quick_toys.run()
    run = quick_toys.runs / "toy"
    assert {path.name for path in run.iterdir()} == {
        *ALL, "00_explore.ipynb", "01_split.ipynb", "02_resize.ipynb", "recipe.yaml", "manifest.json", "report.html"
    }  # fmt: skip
    for name in ALL:
        assert (run / name).is_symlink() and not os.path.isabs(os.readlink(run / name))
        assert os.readlink(run / name).startswith(f"../.store/{name}-")
    assert nbformat.read(run / "01_split.ipynb", as_version=4).cells
    assert notebooks.read_yaml(run / "recipe.yaml")["split"] == {"letter": "b"}
    assert set(disk.read_json(run / "manifest.json")["stages"]) == set(ALL)


def test_stored_files_are_read_only_and_on_record(quick_toys):
    quick_toys.run()
    folder = (quick_toys.runs / "toy/split").resolve()
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"word.txt", "stage.json", "notebook.ipynb", "notebook.log"}
    for name in files:
        assert not (folder / name).stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    record = disk.read_json(folder / "stage.json")
    assert record["status"] == "done" and record["made"] == "thaw run" and record["headline"] == "photos:ab"
    assert set(record["files"]) == files - {"stage.json"}


def test_nothing_but_results_stays_in_the_store(quick_toys):
    quick_toys.run()
    left = {path.name for path in (quick_toys.runs / ".store").iterdir() if path.suffix != ".lock"}
    assert {name.split("-")[0] for name in left} == set(ALL) and len(left) == 3


# Fingerprints


@pytest.fixture
def code_now(tmp_path, monkeypatch):
    """A project of three departments; alpha uses beta and what only shows."""
    for folder in ("data", "core", "reports"):
        (tmp_path / "helpers" / folder).mkdir(parents=True)
        (tmp_path / "helpers" / folder / "__init__.py").write_text(f'"""{folder}."""\n')
    (tmp_path / "helpers/data/alpha.py").write_text(
        "from helpers.core import beta\nfrom helpers.reports import figures\n\n\ndef one():\n    return beta.two()\n"
    )
    (tmp_path / "helpers/core/beta.py").write_text('"""Beta."""\n\n\ndef two():\n    """Two."""\n    return 2  # two\n')
    (tmp_path / "helpers/core/gamma.py").write_text("x = 3\n")
    (tmp_path / "helpers/reports/figures.py").write_text("COLOUR = 'blue'\n")
    monkeypatch.setattr(project, "ROOT", tmp_path)

    def code(of=fingerprints.code_of):
        fingerprints._module_code.cache_clear()
        return of(tmp_path / "03_train_head.ipynb")

    yield code
    fingerprints._module_code.cache_clear()


DEPARTMENTS = {"helpers.core", "helpers.data"}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("x = 1", "x = 1  # one", True),
        ("x = f(a, b)", "x = f(\n    a,\n    b,\n)", True),
        ("x = 'a'", 'x = "a"', True),
        ("x = 1", "x = 2", False),
        ("print(x)", "print(y)", False),
    ],
)
def test_what_counts_as_other_code_in_a_notebook(code_now, notebook, tmp_path, first, second, same):
    path = tmp_path / "03_train_head.ipynb"
    notebook(path, HEAD := "epochs: int = 5  # passes [1, 9]", "from helpers.data import alpha", first)
    before = code_now()
    assert set(before) - DEPARTMENTS == {"03_train_head", "helpers.data.alpha", "helpers.core.beta"}
    notebook(path, HEAD.replace("5", "6").replace("passes", "rounds"), "from helpers.data import alpha", second)
    assert (code_now() == before) is same


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('"""Beta."""', '"""Better."""', True),
        ('"""Two."""', '"""Returns\n\n    two."""', True),
        ("# two", "# 2", True),
        ("def two():", "def two(\n):", True),
        ("return 2", "return 3", False),
        ("two():", "two(a=1):", False),
    ],
)
def test_what_counts_as_other_code_in_a_helper(code_now, notebook, tmp_path, old, new, same):
    notebook(tmp_path / "03_train_head.ipynb", "epochs: int = 5  # passes [1, 9]", "from helpers.data import alpha")
    before = code_now()
    path = tmp_path / "helpers/core/beta.py"
    path.write_text(path.read_text().replace(old, new))
    after = code_now()
    assert (after == before) is same
    assert {name for name in before if before[name] != after[name]} == (set() if same else {"helpers.core.beta"})


def test_the_docstring_of_an_empty_class_does_not_count(code_now, notebook, tmp_path):
    notebook(tmp_path / "03_train_head.ipynb", "epochs: int = 5  # passes [1, 9]", "import helpers.core.gamma")
    seen = []
    for text in ("One.", "Two."):
        (tmp_path / "helpers/core/gamma.py").write_text(f'class Odd(ValueError):\n    """{text}"""\n')
        seen.append(code_now())
    assert seen[0] == seen[1]


WAYS_TO_IMPORT = [
    "from helpers.core import gamma",
    "from helpers.core import gamma as other",
    "import helpers.core.gamma",
    "import helpers.core.gamma as other",
    "from helpers.core.gamma import x",
    "from helpers.core import (\n    gamma,\n)",
    "def late():\n    from helpers.core import gamma",
    "try:\n    from helpers.core.gamma import x\nexcept ImportError:\n    pass",
]


@pytest.mark.parametrize("line", WAYS_TO_IMPORT)
def test_every_way_to_import_a_helper_is_seen(code_now, notebook, tmp_path, line):
    notebook(tmp_path / "03_train_head.ipynb", "epochs: int = 5  # passes [1, 9]", line)
    assert "helpers.core.gamma" in code_now()


@pytest.mark.parametrize(
    "line", [*WAYS_TO_IMPORT, "from . import gamma", "from .gamma import x", "from ..core import gamma"]
)
def test_every_way_to_import_is_seen_in_a_helper_too(code_now, notebook, tmp_path, line):
    notebook(tmp_path / "03_train_head.ipynb", "epochs: int = 5  # passes [1, 9]", "from helpers.data import alpha")
    (tmp_path / "helpers/core/beta.py").write_text(line + "\n")
    before = code_now()
    (tmp_path / "helpers/core/gamma.py").write_text("x = 4\n")
    after = code_now()
    assert {name for name in before if before[name] != after[name]} == {"helpers.core.gamma"}


def test_what_only_shows_decides_nothing_and_is_on_record(code_now, notebook, tmp_path):
    notebook(tmp_path / "03_train_head.ipynb", "epochs: int = 5  # passes [1, 9]", "from helpers.data import alpha")
    before, shown = code_now(), code_now(fingerprints.shown_by)
    assert "helpers.reports.figures" in shown and not set(shown) & set(before)
    (tmp_path / "helpers/reports/figures.py").write_text("COLOUR = 'red'\n")
    assert code_now() == before and code_now(fingerprints.shown_by) != shown


def test_another_notebook_or_helper_makes_its_stage_stale(quick_toys):
    quick_toys.run()
    quick_toys.ran()
    quick_toys.write("01_split", SPLIT.replace("adds", "adds  to it"), IMPORTS, "# a comment", OPEN, NOTE,
                     NEXT_WORD.format("explore"), FINISH)  # fmt: skip
    assert set(quick_toys.why().values()) == {"done"}
    quick_toys.write("01_split", SPLIT, IMPORTS, OPEN, NOTE, NEXT_WORD.format("explore") + " * 1", FINISH)
    assert quick_toys.why() == {"explore": "done", "split": "01_split changed", "resize": "split will change"}


def test_a_stage_from_before_the_departments_says_why_it_is_made_again(quick_toys, monkeypatch):
    old = {"01_split": "0", "helpers.runs": "1", "helpers.folders": "2"}
    with monkeypatch.context() as before:
        before.setattr(fingerprints, "code_of", lambda notebook: old)
        quick_toys.run()
    assert quick_toys.why()["explore"] == "Thaw's own code was reorganised"


def test_another_default_is_another_parameter(quick_toys):
    quick_toys.run()
    cells = IMPORTS, OPEN, NOTE, NEXT_WORD.format("split"), FINISH
    quick_toys.write("02_resize", RESIZE.replace('"c"', '"z"'), *cells)
    assert quick_toys.why()["resize"] == "letter: c -> z"
    quick_toys.run()
    assert quick_toys.word() == "photos:abz"


# What hands do


def test_a_deleted_stage_is_made_again(quick_toys):
    quick_toys.run()
    quick_toys.ran()
    shutil.rmtree((quick_toys.runs / "toy/split").resolve())
    assert quick_toys.why() == {"explore": "done", "split": "its folder is gone", "resize": "done"}
    quick_toys.run()
    assert quick_toys.ran() == ["split"] and quick_toys.word("split") == "photos:ab"


def test_a_deleted_link_is_laid_again_without_work(quick_toys):
    quick_toys.run()
    quick_toys.ran()
    shutil.rmtree(quick_toys.runs / "toy")
    assert "nothing to do" in quick_toys.run()
    assert quick_toys.ran() == [] and quick_toys.word() == "photos:abc"


@pytest.mark.parametrize("how", ["edited", "deleted"])
def test_a_stage_changed_by_hand_is_not_trusted(quick_toys, how):
    quick_toys.run()
    quick_toys.ran()
    path = (quick_toys.runs / "toy/split/word.txt").resolve()
    path.chmod(0o644)
    path.write_text("forged") if how == "edited" else path.unlink()
    with pytest.raises(planning.StageError, match=r"was changed since it was made \(word\.txt.*--rebuild split"):
        quick_toys.run()
    quick_toys.run(rebuild="split")
    assert quick_toys.ran() == ["split", "resize"] and quick_toys.word("split") == "photos:ab"


def test_a_touched_file_is_not_a_changed_one(quick_toys):
    quick_toys.run()
    os.utime((quick_toys.runs / "toy/split/word.txt").resolve(), (1, 1))
    assert set(quick_toys.why().values()) == {"done"}


def by_hand(toys, quick, letter="H", finish=True):
    """Run 01_split as a person would, with the run's own folder as `out`."""
    out, explore = str(toys.runs / "toy/split"), str(toys.runs / "toy/explore")
    source = toys.notebooks / "01_split.ipynb"
    if not finish:
        notebook = nbformat.read(source, as_version=4)
        del notebook.cells[-1]
        source = toys.folder / "unfinished.ipynb"
        nbformat.write(notebook, source)
    parameters = {"letter": letter, "out": out, "explore": explore}
    quick(source, toys.folder / "by_hand.ipynb", parameters, stdout_file=io.StringIO())


def test_a_stage_made_by_hand_is_kept_and_named(quick_toys, quick):
    quick_toys.run()
    stored = (quick_toys.runs / "toy/split").resolve()
    by_hand(quick_toys, quick)
    quick_toys.ran()
    assert (stored / "word.txt").read_text() == "photos:ab", "the notebook must never write through a link"
    assert quick_toys.why()["split"] == "made by hand; it is used as it is"
    quick_toys.run()
    assert quick_toys.ran() == ["resize"]
    assert (quick_toys.word("split"), quick_toys.word()) == ("photos:aH", "photos:aHc")
    assert not (quick_toys.runs / "toy/split").is_symlink()
    assert "nothing to do" in quick_toys.run()


def test_a_stage_made_by_hand_is_known_by_its_content(quick_toys, quick):
    quick_toys.run()
    by_hand(quick_toys, quick)
    quick_toys.run()
    quick_toys.ran()
    os.utime(quick_toys.runs / "toy/split/word.txt", (1, 1))
    assert quick_toys.why()["resize"] == "done"
    (quick_toys.runs / "toy/split/word.txt").write_text("better")
    assert quick_toys.why()["resize"] == "split will change"


def test_rebuild_replaces_a_stage_made_by_hand(quick_toys, quick):
    quick_toys.run()
    by_hand(quick_toys, quick)
    quick_toys.run(rebuild="split")
    assert quick_toys.word() == "photos:abc" and (quick_toys.runs / "toy/split").is_symlink()


def test_another_name_leaves_a_stage_made_by_hand_alone(quick_toys, quick):
    quick_toys.run()
    by_hand(quick_toys, quick)
    quick_toys.run(name="second")
    assert quick_toys.word("split") == "photos:aH" and quick_toys.word(run="second") == "photos:abc"


def test_an_unfinished_stage_made_by_hand_is_refused(quick_toys, quick):
    quick_toys.run()
    by_hand(quick_toys, quick, finish=False)
    with pytest.raises(
        planning.StageError, match=r"toy/split was begun by hand and is not finished\. .* another --name"
    ):
        quick_toys.run()
    quick_toys.run(rebuild="split")
    assert quick_toys.word() == "photos:abc"


def test_images_that_moved_are_linked_again(quick_toys, tmp_path):
    (tmp_path / "images").mkdir()
    link = '(folder / "source").exists() or (folder / "source").symlink_to(Path(source).parent / "images")'
    quick_toys.write("00_explore", EXPLORE, IMPORTS, OPEN, NOTE, link, FIRST_WORD, FINISH)
    quick_toys.run()
    quick_toys.ran()
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert quick_toys.why()["explore"].startswith("its images have moved: ")
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    assert set(quick_toys.why().values()) == {"done"}


# What is asked for


def test_dry_run_only_says_what_would_run_and_why(quick_toys):
    shown = quick_toys.run(dry_run=True).split("\n")
    assert [line.split() for line in shown[:3]] == [[name, "would", "run", "not", "made", "yet"] for name in ALL]
    assert quick_toys.ran() == [] and not (quick_toys.runs / "toy").exists()
    quick_toys.run()
    shown = quick_toys.run("resize.letter=z", dry_run=True)
    assert "split      kept" in shown and "letter: c -> z" in shown and quick_toys.word() == "photos:abc"


def test_from_and_to(quick_toys):
    with pytest.raises(planning.StageError, match="--from split needs explore to be done"):
        quick_toys.run(first="split")
    quick_toys.run(last="split")
    assert quick_toys.ran() == ["explore", "split"]
    quick_toys.run(first="resize")
    assert quick_toys.ran() == ["resize"]
    with pytest.raises(ValueError, match="--from resize comes after --to split"):
        quick_toys.run(first="resize", last="split")


def test_a_run_never_shows_stages_of_two_kinds(quick_toys):
    """Stages after `--to` that the recipe in force would make differently no longer belong to the run."""
    quick_toys.run()
    quick_toys.run("split.letter=x", last="split")
    assert quick_toys.word("split") == "photos:ax" and not (quick_toys.runs / "toy/resize").exists()
    quick_toys.ran()
    quick_toys.run()
    assert quick_toys.ran() == [] and quick_toys.word() == "photos:abc"


@pytest.mark.parametrize(
    ("rebuild", "expected"), [("all", ALL), ("split", ["split", "resize"]), ("resize", ["resize"])]
)
def test_rebuild_makes_a_stage_and_those_after_it_again(quick_toys, rebuild, expected):
    quick_toys.run()
    quick_toys.ran()
    (quick_toys.runs / "toy/report.html").write_text("old")
    quick_toys.run(rebuild=rebuild)
    assert quick_toys.ran() == expected and quick_toys.word() == "photos:abc"
    assert (quick_toys.runs / "toy/report.html").read_text() == "report"
    assert "nothing to do" in quick_toys.run()


def test_no_space_is_told_before_anything_is_written(quick_toys, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5_000_000, 5_000_000)
    )
    with pytest.raises(OSError, match=r"Only 5 MB are free on the disk of .* at least 300 MB.*THAW_RUNS"):
        quick_toys.run()
    assert quick_toys.ran() == []


# A stage that fails, in a real kernel


@pytest.fixture
def fail(toys):
    """Run the first stage with the given trouble in it; return the message."""

    def fail(trouble):
        toys.trouble.write_text(trouble)
        with pytest.raises(planning.StageError) as caught:
            toys.run(last="explore")
        return str(caught.value)

    return fail


def test_a_failing_cell_is_told_with_all_that_helps(toys, fail):
    message = fail("print('to the log')\n1 / 0").replace(f"{toys.folder}/", "").split("\n")
    store_name = toys.plan()["explore"].partial.stem
    assert message == [
        "notebooks/00_explore.ipynb failed: cell 6, ZeroDivisionError: division by zero",
        "  executed copy: runs/toy/00_explore.ipynb",
        f"  log: runs/.store/{store_name}.log",
        "  When the cause is fixed, the same command resumes here.",
    ]
    copy = nbformat.read(toys.runs / "toy/00_explore.ipynb", as_version=4)
    assert any(output.get("ename") == "ZeroDivisionError" for cell in copy.cells for output in cell.get("outputs", []))
    log = (toys.runs / f".store/{store_name}.log").read_text()
    assert "to the log" in log and "ZeroDivisionError" in log
    assert toys.why()["explore"] == "was interrupted; it resumes"
    toys.trouble.write_text("")
    toys.run(last="explore")
    assert toys.word("explore") == "photos:a" and (toys.runs / "toy/00_explore.ipynb").is_symlink()


@pytest.mark.parametrize("death", ["os._exit(1)", "os.kill(os.getpid(), 9)"])
def test_a_kernel_that_dies_is_told(toys, fail, death):
    message = fail(death)
    assert "00_explore.ipynb failed: its kernel died, most often because memory ran out" in message
    assert "executed copy: " in message and "the same command resumes here" in message
    assert toys.plan()["explore"].state == "to do" and not (toys.runs / "toy/explore").exists()


def test_a_notebook_that_does_not_finish_its_stage_is_refused(toys, fail):
    toys.write("00_explore", EXPLORE, IMPORTS, OPEN, FIRST_WORD)
    assert "it ended without stages.finish in its last cell" in fail("")


def test_the_kernel_is_that_of_this_python_whatever_the_machine_has(toys, monkeypatch, tmp_path):
    bogus = tmp_path / "jupyter/kernels/python3"
    bogus.mkdir(parents=True)
    spec = {"argv": ["false"], "display_name": "Another", "language": "python"}
    (bogus / "kernel.json").write_text(json.dumps(spec))
    for variable in ("JUPYTER_PATH", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "jupyter"))
    monkeypatch.chdir("/")
    toys.trouble.write_text(f"import sys; assert os.path.samefile(sys.executable, {sys.executable!r})")
    toys.run(last="explore")
    assert toys.word("explore") == "photos:a" and os.environ["JUPYTER_PATH"] == str(tmp_path / "jupyter")


def test_progress_and_output_reach_the_terminal_and_the_log(toys):
    toys.trouble.write_text(
        "progress.report(3, 5, unit='epoch', label='', rate=12.0, loss=0.25)\nprint('said')\nos.system('echo below')"
    )
    seen = []
    step = toys.plan()["explore"]
    execution.make(step, seen.append, seen.append)
    (line,) = seen
    assert (line["done"], line["total"], line["unit"], line["metrics"]) == (3, 5, "epoch", {"rate": 12.0, "loss": 0.25})
    assert "said" in (log := (step.folder / "notebook.log").read_text()) and "below" in log


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            {"unit": "epoch", "label": "", "metrics": {"rate": 1234.5, "loss": 0.25}},
            "epoch 3 of 5  1,234 images/s  loss 0.2500",
        ),
        ({"unit": "image", "label": "resize", "metrics": {"rate": 80.0}}, "resize  3 of 5 images  80 images/s"),
        ({"unit": "step", "label": "cache", "metrics": {}}, "cache  3 of 5 steps"),
    ],
)
def test_progress_is_a_line_where_there_is_no_terminal(monkeypatch, line, expected):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", -1)
    shown = io.StringIO()
    with terminal.Watcher(Console(file=shown, width=200), "4/6 head") as watcher:
        watcher({"time": 0.0, "done": 3, "total": 5} | line)
    assert shown.getvalue().strip() == expected


def test_progress_is_a_bar_on_a_terminal():
    shown = io.StringIO()
    with terminal.Watcher(Console(file=shown, width=200, force_terminal=True), "4/6 head") as watcher:
        watcher({"done": 3, "total": 5, "unit": "epoch", "label": "", "metrics": {"loss": 0.25}})
        watcher.bar.refresh()
    assert "4/6 head" in shown.getvalue() and "epoch 3 of 5  loss 0.2500" in shown.getvalue()


# Processes


def wait_for(path: Path, process: subprocess.Popen) -> str:
    for _ in range(1200):
        if path.exists() and path.read_text():
            return path.read_text()
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise TimeoutError(path)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_everything_and_loses_nothing(toys, kind, code):
    mark = toys.folder / "mark"
    toys.trouble.write_text(f"import time; Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(60)")
    process = toys.command("run", str(toys.recipe), start_new_session=True)
    kernel = int(wait_for(mark, process))
    os.killpg(process.pid, kind)
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == code, shown
    assert "Traceback" not in shown and not is_alive(kernel)
    if kind == signal.SIGINT:
        assert "Nothing is lost: the same command resumes here." in shown
    assert not (toys.runs / "toy/explore").exists() and not list((toys.runs / ".store").glob("kernel-*"))
    assert toys.why()["explore"] == "was interrupted; it resumes"


def test_two_commands_at_once_share_the_work(toys):
    toys.trouble.write_text("import time; time.sleep(2)")
    processes = [toys.command("run", str(toys.recipe), "--name", name, cwd="/") for name in ("one", "two")]
    shown = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], shown
    assert sorted(toys.ran()) == sorted(ALL)
    assert toys.word(run="one") == toys.word(run="two") == "photos:abc"
    assert any("another thaw run is making explore; waiting for it" in text for text in shown)


def test_a_killed_command_leaves_no_kernel_and_the_next_goes_on(toys):
    mark = toys.folder / "mark"
    toys.trouble.write_text(
        f"import time; (folder / 'kept.txt').write_text('kept'); Path({str(mark)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    process = toys.command("run", str(toys.recipe), start_new_session=True)
    kernel = int(wait_for(mark, process))
    process.kill()
    process.communicate()
    for _ in range(100):
        if not is_alive(kernel):
            break
        time.sleep(0.1)
    assert not is_alive(kernel)
    toys.trouble.write_text("assert (folder / 'kept.txt').read_text() == 'kept'")
    toys.run(last="explore")
    assert toys.word("explore") == "photos:a"
