"""The plan of helpers/: departments, their floors, and what of the code decides a stage's result."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.core import notebooks, project
from helpers.pipeline import fingerprints

ROOT = Path(__file__).parents[1]
DEPARTMENTS = ("cli", "export", "pipeline", "reports", "evaluation", "training", "compute", "data", "models", "core")
CODE = sorted((ROOT / "helpers").rglob("*.py"))


def test_the_departments_are_those_of_the_plan():
    folders = {path.name for path in (ROOT / "helpers").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(DEPARTMENTS)
    assert len(CODE) > 70
    assert [path.name for path in (ROOT / "helpers").glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("department", ["", *DEPARTMENTS, "data/labelling", "models/families"])
def test_an_init_holds_its_charter_and_nothing_else(department):
    """The store fingerprints exactly the modules that a notebook imports: code here would be in all of them."""
    body = ast.parse((ROOT / "helpers" / department / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value.value, str)


@pytest.mark.parametrize("department", DEPARTMENTS)
def test_a_department_can_be_taken_in_at_a_glance(department):
    modules = [path for path in (ROOT / "helpers" / department).rglob("*.py") if path.name != "__init__.py"]
    assert 1 < len([path for path in modules if path.parent.name == department]) <= 12
    for path in modules:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.name


def test_no_department_is_imported_as_a_name():
    """`from helpers import data` would hide from the fingerprint which of its modules are used."""
    sources = [path.read_text(encoding="utf-8") for path in CODE]
    sources += [fingerprints._source(stage.notebook) for stage in _notebooks().values()]
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in CODE} - {"helpers"}
    assert {"helpers.data", "helpers.models.families"} <= packages
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                assert not {f"{node.module}.{alias.name}" for alias in node.names} & packages, ast.unparse(node)
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"helpers", *packages}, ast.unparse(node)


NAMED_BY = (
    "pipeline/checks.py",
    "cli/starter.py",
    "cli/bakeoff.py",
    "cli/export.py",
    "cli/two_stage.py",
)  # they are about single stages


def test_the_chain_knows_no_stage_by_name():
    """What a stage is stands in its notebook; what is checked for its sake, in pipeline/checks."""
    allowed = [ROOT / "helpers" / name for name in NAMED_BY]
    floors = ("core", "pipeline", "cli")
    generic = [path for path in CODE if path.parent.name in floors and path not in allowed]
    assert len(generic) > 20
    for path in generic:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not texts & set(notebooks.stages()), path


# The floors


@pytest.fixture
def house(tmp_path):
    """A copy of the code whose floors can be checked after a change."""
    shutil.copytree(ROOT / "helpers", tmp_path / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def floors() -> str:
        command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return "kept" if ran.returncode == 0 else ran.stdout

    return tmp_path / "helpers", floors


def test_the_floors_hold(house):
    assert house[1]() == "kept"


def test_an_import_that_goes_up_is_refused(house):
    helpers, floors = house
    (helpers / "data/upwards.py").write_text("from helpers.training import compiling\n")
    assert "helpers.data is not allowed to import helpers.training" in floors()


def test_an_import_that_goes_sideways_is_refused(house):
    helpers, floors = house
    (helpers / "reports/sideways.py").write_text("from helpers.pipeline import store\n")
    assert "helpers.reports is not allowed to import helpers.pipeline" in floors()


def test_the_chain_does_without_what_trains(house):
    helpers, floors = house
    (helpers / "pipeline/trains.py").write_text("def late():\n    from helpers.training import compiling\n")
    assert "helpers.pipeline.trains -> helpers.training.compiling" in floors()


def test_a_folder_without_a_floor_is_refused(house):
    helpers, floors = house
    (helpers / "attic").mkdir()
    (helpers / "attic/__init__.py").write_text('"""Attic."""\n')
    assert "helpers.attic" in floors()


# What decides a result, by the real notebooks


def _notebooks():
    return notebooks.stages() | notebooks.studies()


@pytest.fixture
def stale_after(tmp_path, monkeypatch):
    """Return the stages whose code is other code once a line is added to a module of a copy of helpers/."""
    shutil.copytree(ROOT / "helpers", tmp_path / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(project, "ROOT", tmp_path)

    def codes() -> dict[str, dict[str, str]]:
        fingerprints._module_code.cache_clear()
        return {name: fingerprints.code_of(stage.notebook) for name, stage in _notebooks().items()}

    def change(module: str) -> set[str]:
        before = codes()
        with open(tmp_path / module, "a", encoding="utf-8") as file:
            file.write("\n\nCHANGED = 1\n")
        after = codes()
        return {name for name in before if before[name] != after[name]}

    yield change
    fingerprints._module_code.cache_clear()


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        ("helpers/training/compiling.py", {"head", "fine_tune", "join", "evaluate"}),
        ("helpers/models/families/kerashub.py", {"head", "fine_tune", "bakeoff"}),
        ("helpers/models/fetching.py", set()),
        ("helpers/models/joined.py", {"join"}),
        ("helpers/evaluation/metrics.py", {"join", "evaluate", "compare", "bakeoff", "export"}),
        ("helpers/evaluation/details.py", {"join", "evaluate", "compare", "bakeoff", "export"}),
        ("helpers/data/splits.py", {"split", "resize"}),
        ("helpers/data/crop.py", {"crop", "join", "evaluate", "export"}),
        ("helpers/reports/theme.py", set()),
        ("helpers/reports/charts.py", set()),
        ("helpers/reports/sheets.py", set()),
        ("helpers/reports/tensorboard.py", set()),
        ("helpers/core/notebooks.py", set()),
        ("helpers/core/progress.py", set()),
        ("helpers/core/parallel.py", set()),
        ("helpers/pipeline/recipes.py", set()),
        ("helpers/cli/main.py", set()),
    ],
)
def test_a_change_is_other_code_for_what_uses_it_and_for_nothing_else(stale_after, module, stages):
    """What comes after these stages follows by its inputs."""
    assert stale_after(module) == stages


def test_what_shows_is_on_record_for_every_notebook():
    assert "helpers.reports.theme" in fingerprints.shown_by(notebooks.find_stage("explore").notebook)
    for stage in _notebooks().values():
        shown = set(fingerprints.shown_by(stage.notebook))
        assert "helpers.core.notebooks" in shown, stage.name
        assert not shown & set(fingerprints.code_of(stage.notebook))
