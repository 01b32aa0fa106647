"""The main job, end to end: all notebooks through `thaw run`, on a few dozen small images and real weights.

A process with TensorFlow takes seconds to start, so the runs are few and each is looked at by many tests.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import psutil
import pytest

from helpers.core import disk, notebooks, progress
from helpers.reports import report

STAGES = ["explore", "split", "resize", "head", "fine_tune", "evaluate"]
RECIPE = """
name: tiny
description: discs, squares and crosses
published: {"a coin": 33.3}
explore: {source: %s}
split: {ratio: [0.5, 0.25, 0.25]}
resize: {image_size: 64}
head: {epochs: 25, views: 2, batch_size: 8, learning_rate: 1e-2}
fine_tune: {unfreeze: block7, epochs: 2, views: 2, batch_size: 8}
"""


class Workplace:
    """A folder of runs, and the command that works in it from another working directory."""

    def __init__(self, folder: Path, recipe: Path):
        self.folder, self.recipe, self.run = folder, recipe, folder / "tiny"
        self.temporary = folder.with_name(f"{folder.name}-tmp")
        self.temporary.mkdir()
        self.environment = os.environ | {"THAW_RUNS": str(folder), "COLUMNS": "200", "TMPDIR": str(self.temporary)}
        self.environment.pop(progress.PROGRESS_VARIABLE, None)

    def start(self, *arguments) -> subprocess.Popen:
        command = [sys.executable, "-m", "helpers.cli.main", *map(str, arguments)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.recipe.parent, env=self.environment, **streams)

    def thaw(self, *arguments, code=0) -> str:
        process = self.start(*arguments)
        shown, _ = process.communicate(timeout=400)
        assert process.returncode == code, shown
        return shown

    def stage(self, name: str) -> dict:
        return disk.read_json(self.run / name / "stage.json")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, image_folder):
    """48 images in three classes, and one file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    photos = image_folder(folder / "photos", {"disc": 16, "square": 16, "cross": 16})
    (photos / "disc" / "broken.png").write_bytes((photos / "disc" / "disc-00.png").read_bytes()[:200])
    path = folder / "tiny.yaml"
    path.write_text(RECIPE % photos)
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory, recipe):
    """A place where the recipe was run from beginning to end."""
    place = Workplace(tmp_path_factory.mktemp("done"), recipe)
    place.shown = place.thaw("run", recipe)
    return place


@pytest.fixture(scope="module")
def killed(tmp_path_factory, recipe, done):
    """A place with the images of `done` where `thaw run` was killed within phase 1, and was called again."""
    place = Workplace(tmp_path_factory.mktemp("killed"), recipe)
    (place.folder / ".store").mkdir()
    for made in [path for name in ("explore", "split", "resize") for path in done.folder.glob(f".store/{name}-*")]:
        if made.is_dir():
            shutil.copytree(made, place.folder / ".store" / made.name, symlinks=True)
    process = place.start("run", recipe)
    history = _wait_for_epochs(place.folder, 5, process)
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.send_signal(signal.SIGKILL)
    process.communicate()
    place.history_at_kill = pd.read_csv(history)
    place.shown = place.thaw("run", recipe)
    return place


def _wait_for_epochs(folder: Path, epochs: int, process: subprocess.Popen) -> Path:
    """Wait until so many epochs of phase 1 are written, and return the file that says so."""
    end = time.time() + 300
    while time.time() < end:
        for history in folder.glob(".store/head-*.partial/history.csv"):
            if history.read_text().count("\n") > epochs:
                return history
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise TimeoutError("phase 1 did not begin")


# What a run leaves


def test_the_terminal_shows_each_stage_and_the_answer(done):
    assert re.findall(r"^\d/6 (\w+) ", done.shown, re.M) == STAGES
    assert "tiny: 6 of 6 stages to do" in done.shown and "Traceback" not in done.shown
    assert re.search(r"[Aa]ccuracy.*%", done.shown) and "a coin" in done.shown
    assert f"Report: {done.run / 'report.html'}" in done.shown


def test_nothing_stays_in_the_temporary_folder(done):
    assert not [path.name for path in done.temporary.iterdir()]


@pytest.mark.parametrize(
    ("stage", "files"),
    {
        "explore": ["inventory.csv", "quarantine.csv", "ignored.json", "class_names.json", "source"],
        "split": ["split.csv", "class_names.json", "train/disc", "val/cross", "test/square"],
        "resize": ["images.csv", "class_names.json", "resize.json", "train/disc", "val/cross", "test/square"],
        "head": ["model.keras", "class_names.json", "model.json", "history.csv", "logs"],
        "fine_tune": ["model.keras", "class_names.json", "model.json", "history.csv", "logs"],
        "evaluate": ["predictions.csv", "metrics.json"],
    }.items(),
)
def test_a_stage_leaves_its_files(done, stage, files):
    for name in [*files, "notebook.ipynb", "stage.json"]:
        assert (done.run / stage / name).exists(), name
    assert done.stage(stage)["status"] == "done" and done.stage(stage)["headline"]
    assert not list((done.run / stage).glob("**/.*")) and not (done.run / stage / "backup").exists()


def test_a_broken_file_is_in_quarantine_and_stops_nothing(done):
    quarantine = pd.read_csv(done.run / "explore/quarantine.csv")
    assert quarantine[["path", "reason"]].to_numpy().tolist() == [["disc/broken.png", "truncated"]]
    inventory = pd.read_csv(done.run / "explore/inventory.csv")
    assert len(inventory) == 48 and inventory["label"].value_counts().to_dict() == {
        "cross": 16,
        "disc": 16,
        "square": 16,
    }


def test_the_parts_are_those_asked_for(done):
    images = pd.read_csv(done.run / "resize/images.csv")
    assert images["part"].value_counts().to_dict() == {"train": 24, "val": 12, "test": 12}
    assert (images.groupby(["part", "label"]).size().unstack().nunique(axis=1) == 1).all()
    assert images["sha256"].is_unique


def test_the_epochs_count_on_through_both_phases(done):
    first, second = (pd.read_csv(done.run / stage / "history.csv") for stage in ("head", "fine_tune"))
    assert first["epoch"].to_list() == list(range(1, 26)) and second["epoch"].to_list() == [26, 27]
    assert set(first["phase"]) == {"head"} and set(second["phase"]) == {"fine_tune"}


def test_it_has_learned(done):
    table = pd.read_csv(done.run / "evaluate/predictions.csv")
    assert list(table.columns) == ["path", "label", "predicted", "file", "cross", "disc", "square"] and len(table) == 12
    np.testing.assert_allclose(table[["cross", "disc", "square"]].sum(axis=1), 1, atol=1e-5)
    assert (table["label"] == table["predicted"]).mean() > 0.6
    metrics = disk.read_json(done.run / "evaluate/metrics.json")
    assert metrics["phase"] in ("head", "fine_tune") and metrics["phase_sentence"]


def test_the_executed_notebooks_lie_in_the_run(done):
    for name in STAGES:
        path = done.run / notebooks.find_stage(name).notebook.name
        notebook = nbformat.read(path, as_version=4)
        assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert not [output for output in outputs if output.output_type == "error"]
        noise = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
        assert noise == [], f"{path.name} warns its reader: {noise}"


def test_the_report_is_one_file_that_holds_everything(done):
    text = (done.run / "report.html").read_text(encoding="utf-8")
    assert len(text) > 100_000 and "tiny" in text and "a coin" in text
    assert not re.search(r'(src|href)="(https?:)?//', text.split("</head>")[0])
    assert text.count("data:image/png;base64,") >= 10


def test_tensorboard_has_curves_pictures_and_the_graph(done):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    tags = {}
    for stage in ("head", "fine_tune", "evaluate"):
        logs = EventMultiplexer().AddRunsFromDirectory(str((done.run / stage / "logs").resolve())).Reload()
        tags[stage] = {tag for found in logs.Runs().values() for tag in found["tensors"]}
    for stage in ("head", "fine_tune"):
        assert {"epoch_loss", "epoch_accuracy", "keras"} <= tags[stage]  # "keras" is the graph of the model
    assert "training images" in tags["head"] and "validation confusion" in tags["fine_tune"]
    assert "test confusion" in tags["evaluate"]
    assert {"cross", "disc", "square"} <= {tag.split("/")[0] for tag in tags["fine_tune"] & tags["evaluate"]}


def test_nothing_is_left_over(done):
    store = done.folder / ".store"
    assert {path.name.split("-")[0] for path in store.iterdir() if path.is_dir() and path.name != "cache"} == set(
        STAGES
    )
    assert not [path for path in store.rglob("*") if path.suffix in (".partial", ".npy", ".tmp")]


# Again


def test_a_second_run_does_nothing_and_imports_nothing_slow(done):
    done.environment["PYTHONPROFILEIMPORTTIME"] = "1"
    shown = done.thaw("run", done.recipe)
    del done.environment["PYTHONPROFILEIMPORTTIME"]
    imported = set(re.findall(r"\| +([\w.]+)$", shown, re.M))
    assert "tiny: nothing to do, every stage is done." in shown and "helpers.pipeline.chain" in imported
    assert not imported & {"tensorflow", "keras", "matplotlib", "sklearn", "papermill"}


def test_show_says_that_all_is_done(done):
    shown = done.thaw("show", done.recipe)
    assert shown.count("done") == 6 and "discs" not in shown


def test_a_change_of_phase_two_would_run_phase_two_and_evaluation(done):
    dry = done.thaw("run", done.recipe, "--set", "fine_tune.learning_rate=5e-5", "--dry-run")
    assert [line.split()[0] for line in dry.splitlines() if "would run" in line] == ["fine_tune", "evaluate"]


@pytest.fixture(scope="module")
def joined(done):
    """The run joined with its twin, and measured otherwise: what the command says, and its folder."""
    changed = ("join.runs=[tiny]", "evaluate.mirror=horizontal", "evaluate.promise={coverage: 0.9}")
    changed += ("evaluate.subgroups=[width]",)
    shown = done.thaw("run", done.recipe, *(part for one in changed for part in ("--set", one)), "--name", "joined")
    return shown, done.folder / "joined"


def test_a_run_that_evaluates_otherwise_shares_all_before(done, joined):
    shown, other = joined
    assert re.findall(r"^\d/7 (\w+) ", shown, re.M) == ["join", "evaluate"]
    shared = [name for name in STAGES if (other / name).resolve() == (done.run / name).resolve()]
    assert shared == STAGES[:-1] and (done.run / "evaluate/predictions.csv").is_file()
    promise = disk.read_json(other / "evaluate/decision.json")["promise"]
    assert promise["kind"] == "coverage" and 0 <= promise["level"] <= 1
    assert "the set holds the class" in (other / "report.html").read_text()


def test_two_runs_are_compared_on_the_same_images(done, joined):
    shown = done.thaw("compare", "tiny", "joined")
    assert re.search(r"1/1 compare .*joined against tiny: .* points of accuracy", shown)
    page = (done.run / "compare.html").read_text()
    assert "evaluate.mirror" in page and "The leaderboard" in page
    assert "epochs" not in page.split("What differs")[1][:900]
    table = pd.read_csv(done.run / "compare/differences.csv")
    assert set(table["metric"]) == {"accuracy", "balanced_accuracy", "macro_f1", "log_loss"} and len(table) == 4
    first, second = (pd.read_csv(run / "evaluate/predictions.csv") for run in (done.run, done.folder / "joined"))
    gain = (second["label"] == second["predicted"]).mean() - (first["label"] == first["predicted"]).mean()
    assert table.set_index("metric")["difference"]["accuracy"] == pytest.approx(gain)
    assert "1/1" not in done.thaw("compare", "tiny", "joined")  # nothing is made twice


def test_a_run_joined_with_its_twin_is_the_run_itself(done, joined):
    histories = [pd.read_csv(done.run / stage / "history.csv")["val_loss"].min() for stage in ("head", "fine_tune")]
    history = pd.read_csv(done.folder / "joined/join/history.csv")
    assert list(history["phase"]) == ["join"] and history["val_loss"][0] == pytest.approx(min(histories), rel=1e-2)
    refused = done.thaw("run", done.recipe, "--name", "joined", "--set", "join.runs=[joined]", code=1)
    assert "this run itself" in refused


# Killed, in a fresh store


@pytest.mark.crash
def test_a_killed_training_goes_on_and_ends_like_an_undisturbed_one(done, killed):
    assert 5 <= len(killed.history_at_kill) < 25
    assert "3/6 resize" not in killed.shown and "4/6 head" in killed.shown
    for stage in ("head", "fine_tune"):
        whole, resumed = (pd.read_csv(place.run / stage / "history.csv") for place in (done, killed))
        pd.testing.assert_frame_equal(whole.drop(columns="seconds"), resumed.drop(columns="seconds"), check_exact=True)


@pytest.mark.crash
def test_it_did_not_begin_anew(killed):
    log = (killed.run / "head" / "notebook.log").read_text()
    assert (
        len(re.findall(r"^epoch +1 of 25 ", log, re.M)) == 1 and len(re.findall(r"^epoch +25 of 25 ", log, re.M)) == 1
    )


@pytest.mark.crash
def test_equal_seeds_in_fresh_stores_give_equal_predictions(done, killed):
    first, second = ((place.run / "evaluate/predictions.csv").read_bytes() for place in (done, killed))
    assert first == second
    assert done.stage("evaluate")["fingerprint"] == killed.stage("evaluate")["fingerprint"]


# Predict


def test_predict_gives_what_evaluation_gave(done, tmp_path):
    table = pd.read_csv(done.run / "evaluate/predictions.csv")
    photos = done.recipe.parent / "photos"
    files = [photos / path for path in table["path"]]
    assert all((done.run / "resize" / file).is_file() for file in table["file"])
    broken = photos / "disc/broken.png"
    shown = done.thaw("predict", done.run, *files, broken, "--csv", tmp_path / "out.csv", code=1)
    assert f"{broken}  not read: truncated" in shown
    found = pd.read_csv(tmp_path / "out.csv")
    assert found.pop("not_read").to_list()[-1].startswith("truncated")
    found = found[:-1]
    assert found["path"].to_list() == [str(file) for file in files]
    assert found["predicted"].to_list() == table["predicted"].to_list()
    names = ["cross", "disc", "square"]
    np.testing.assert_allclose(found[names], table[names], atol=2e-6)
    np.testing.assert_allclose(found["confidence"], table[names].max(axis=1), atol=2e-6)


# By hand


def test_papermill_alone_runs_a_notebook(done, tmp_path):
    papermill.execute_notebook(
        notebooks.find_stage("resize").notebook,
        tmp_path / "out.ipynb",
        {"split": str(done.run / "split"), "image_size": 48, "fit": "pad", "out": str(tmp_path / "resize")},
        kernel_name="python3",
        cwd=notebooks.NOTEBOOKS,
        progress_bar=False,
    )
    assert disk.read_json(tmp_path / "resize/resize.json") == {"image_size": 48, "fit": "pad", "format": "png"}
    assert disk.read_json(tmp_path / "resize/stage.json")["made"] == "by hand"


# What only a notebook can find out


@pytest.fixture(scope="module")
def other(tmp_path_factory, recipe):
    return Workplace(tmp_path_factory.mktemp("other"), recipe)


def test_a_class_too_small_to_test_is_told_and_left_out_on_request(other, image_folder, tmp_path, by_hand):
    image_folder(tmp_path / "few", {"cat": 8, "bird": 1, "dog": 8})
    few = ("--set", f"explore.source={tmp_path / 'few'}", "--to", "split")
    shown = other.thaw("run", other.recipe, *few, code=1)
    assert "bird (1 in one group)" in shown and "failed" not in shown and "Traceback" not in shown
    run = tmp_path / "run"
    explore, split = run / "explore", run / "split"
    by_hand("explore", source=str(tmp_path / "few"), out=str(explore))
    by_hand("split", explore=str(explore), ratio=[0.5, 0.25, 0.25], rare="drop", out=str(split))
    assert disk.read_json(split / "class_names.json") == ["cat", "dog"]
    assert not [*split.glob("*/bird")] and "bird" in (split / "split.csv").read_text()
    disk.write_json(run / "manifest.json", {"recipe": {"name": "few", "description": ""}})
    assert "Left out by split.rare: bird" in report.build_report(run).read_text()


def test_a_source_within_the_runs_is_told(runs_folder, image_folder, by_hand):
    source = image_folder(runs_folder / "photos", {"cat": 3, "dog": 3}).parent
    with pytest.raises(ValueError, match=r"lie inside each other\. Choose another `out`"):
        by_hand("explore", source=str(source), class_folders="upper", out=str(runs_folder / "tiny" / "explore"))
