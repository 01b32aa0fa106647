"""A stage's folder: what may be opened, what counts as finished, and how progress is told."""

import json

import pytest

from helpers.core import disk, progress, project, stages

PARAMETERS = {"epochs": 5, "names": ["a", "b"]}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "job" / "head"


def finish(folder, **parameters):
    """Open and finish a stage that holds one file."""
    opened = stages.open(folder, PARAMETERS | parameters)
    (opened / "word.txt").write_text("word")
    stages.finish(opened, files=["word.txt"], headline="done it")
    return opened


# Paths


def test_relative_paths_start_at_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert project.resolve("runs/demo") == project.ROOT / "runs" / "demo"
    assert project.resolve("/data/../photos") == stages.Path("/photos")
    assert str(project.resolve("~/photos")) == "/home/somebody/photos"
    assert project.display_path(project.ROOT / "runs" / "demo") == "runs/demo"
    assert project.display_path(tmp_path) == str(tmp_path)


def test_resolving_does_not_follow_links(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert project.resolve(tmp_path / "link") == tmp_path / "link"


# Files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = disk.write_json(tmp_path / "a.json", {"ü": [1, None]})
    with pytest.raises(TypeError):
        disk.write_json(path, {"bad": object()})
    assert disk.read_json(path) == {"ü": [1, None]} and list(tmp_path.iterdir()) == [path]
    assert "ü" in path.read_text(encoding="utf-8")


# Inputs


def test_a_missing_input_names_the_notebook_that_makes_it(tmp_path, out):
    with pytest.raises(FileNotFoundError, match=r"does not exist\. Run notebooks/02_resize\.ipynb first"):
        stages.require(tmp_path / "nothing", "images.csv", made_by="02_resize")
    finish(out)
    with pytest.raises(FileNotFoundError, match=r"has no images\.csv, b\.json\. Run notebooks/02_resize\.ipynb"):
        stages.require(out, "word.txt", "images.csv", "b.json", made_by="02_resize")
    assert stages.require(str(out), "word.txt", made_by="02_resize") == out


def test_an_unfinished_input_is_refused(out):
    (stages.open(out, PARAMETERS) / "word.txt").write_text("half")
    with pytest.raises(FileNotFoundError, match=r"head is unfinished: notebooks/03_train_head\.ipynb did not reach"):
        stages.require(out, "word.txt", made_by="03_train_head")


def test_an_input_of_ones_own_is_accepted(tmp_path):
    (tmp_path / "images.csv").write_text("path\n")
    assert stages.require(tmp_path, "images.csv", made_by="02_resize") == tmp_path


# Opening


def test_the_states_of_a_folder(tmp_path, out):
    assert stages.status(out) == "absent"
    stages.open(out)
    assert stages.status(out) == "open"
    assert stages.status(finish(tmp_path / "other")) == "done"
    (tmp_path / "own").mkdir()
    assert stages.status(tmp_path / "own") == "absent"
    (tmp_path / "own" / "thesis.txt").write_text("years of work")
    assert stages.status(tmp_path / "own") == "foreign"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_damaged_record_makes_a_folder_foreign(tmp_path, text):
    (tmp_path / "stage.json").write_text(text)
    assert stages.status(tmp_path) == "foreign"


def test_a_folder_of_ones_own_is_left_alone(out):
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds files that Thaw did not write"):
        stages.open(out, PARAMETERS)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_an_unfinished_stage_goes_on_with_the_same_parameters(out):
    (stages.open(out, PARAMETERS) / "epoch-1").write_text("trained")
    assert (stages.open(out, PARAMETERS) / "epoch-1").exists()
    assert (stages.open(out, PARAMETERS | {"out": "elsewhere"}) / "epoch-1").exists()
    assert not (stages.open(out, PARAMETERS | {"epochs": 6}) / "epoch-1").exists()


def test_an_unfinished_stage_starts_anew_when_its_input_was_made_again(tmp_path, out):
    given = PARAMETERS | {"images": str(tmp_path / "resize")}
    finish(tmp_path / "resize")
    (stages.open(out, given) / "epoch-1").write_text("trained")
    assert (stages.open(out, given) / "epoch-1").exists()
    finish(tmp_path / "resize", epochs=9)
    assert not (stages.open(out, given) / "epoch-1").exists()


def test_a_finished_stage_is_begun_anew(out):
    finish(out)
    assert {path.name for path in stages.open(out, PARAMETERS).iterdir()} == {"stage.json"}


def test_a_link_is_replaced_and_never_written_through(tmp_path, out):
    stored = finish(tmp_path / "stored")
    out.parent.mkdir()
    out.symlink_to(stored)
    opened = stages.open(out, PARAMETERS)
    assert not opened.is_symlink() and not (opened / "word.txt").exists()
    assert (stored / "word.txt").read_text() == "word" and stages.status(stored) == "done"


def test_a_link_that_leads_nowhere_is_replaced(tmp_path, out):
    out.parent.mkdir()
    out.symlink_to(tmp_path / "gone")
    assert stages.status(stages.open(out, PARAMETERS)) == "open" and not (tmp_path / "gone").exists()


# Finishing


def test_a_finished_stage_says_what_it_is(out, capsys):
    finish(out)
    record = disk.read_json(out / "stage.json")
    assert {key: record[key] for key in ("status", "stage", "made", "headline", "parameters")} == {
        "status": "done",
        "stage": "head",
        "made": "by hand",
        "headline": "done it",
        "parameters": PARAMETERS,
    }
    assert record["seconds"] >= 0 and record["versions"]["keras"] and record["created"].endswith("+00:00")
    assert capsys.readouterr().out.splitlines()[0] == "done it"


def test_the_last_cell_names_the_files_and_what_is_next(out, capsys):
    folder = stages.open(out, PARAMETERS)
    (folder / "train").mkdir()
    (folder / "train" / "a.png").write_bytes(b"x")
    (folder / "model.keras").write_bytes(b"x" * 2_000_000)
    stages.finish(folder, files=["train", "model.keras"], headline="h", next_notebook="04_fine_tune")
    shown = capsys.readouterr().out
    assert (
        "train (1 files)" in shown and "model.keras (2.0 MB)" in shown and "Next: notebooks/04_fine_tune.ipynb" in shown
    )


def test_the_last_cell_may_run_twice(out):
    finish(out)
    stages.finish(out, files=["word.txt"], headline="again")
    assert disk.read_json(out / "stage.json")["headline"] == "again"


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.touch(), lambda path: path.mkdir()])
def test_a_missing_or_empty_file_is_an_error(out, make):
    folder = stages.open(out, PARAMETERS)
    make(folder / "model.keras")
    with pytest.raises(FileNotFoundError, match=r"should hold model\.keras by now"):
        stages.finish(folder, files=["model.keras"], headline="h")
    assert stages.status(folder) == "open"


# Progress


@pytest.fixture
def headless(tmp_path, monkeypatch):
    """The lines of progress that a headless notebook has written so far."""
    path = tmp_path / "progress.jsonl"
    monkeypatch.setenv(progress.PROGRESS_VARIABLE, str(path))
    return lambda: [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_progress_is_one_json_line_each(headless):
    progress.report(1, 3, unit="epoch", label="head", loss=0.5)
    progress.report(2, 3, unit="epoch", label="head", loss=float("nan"))
    first, second = headless()
    assert (first["done"], first["total"], first["unit"], first["label"]) == (1, 3, "epoch", "head")
    assert first["metrics"] == {"loss": 0.5} and second["done"] == 2


def test_nobody_watches(monkeypatch, capsys):
    monkeypatch.delenv(progress.PROGRESS_VARIABLE, raising=False)
    progress.report(1, 3, unit="epoch", label="head")
    assert capsys.readouterr().out == ""


def test_tracking_passes_every_item_on_and_ends_full(headless, capsys):
    assert list(progress.track(iter("abc"), total=70, unit="image", label="resize", step=32)) == ["a", "b", "c"]
    assert headless()[-1]["done"] == headless()[-1]["total"] == 70 and capsys.readouterr().out == ""


def test_tracking_draws_a_bar_for_a_person(monkeypatch, capsys):
    monkeypatch.delenv(progress.PROGRESS_VARIABLE, raising=False)
    assert list(progress.track([1, 2, 3], total=3, label="resize")) == [1, 2, 3]
    assert "resize" in capsys.readouterr().out


def test_few_lines_for_many_items(headless):
    for _ in progress.track(range(10_000), total=10_000, label="resize"):
        pass
    assert len(headless()) < 10


def test_versions_name_what_decides_a_result():
    found = stages.versions()
    assert {"python", "tensorflow", "keras", "numpy", "opencv-python"} <= set(found)
