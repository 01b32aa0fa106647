"""What is on record of a run: enough to check every file of it, to make it again, and to say what differs."""

import os
import shutil
import sys

import pandas as pd
import pytest
from test_store import EXPLORE, FINISH, IMPORTS, NOTE, OPEN, TROUBLE, Toys, quick, quick_toys, toys  # noqa: F401

from helpers.cli import main
from helpers.core import disk, notebooks, stages
from helpers.data import inventory
from helpers.pipeline import manifest

EVALUATE = """
explore: str = "runs/demo/explore"  # folder written by 00_explore
letter: str = "c"  # what this stage adds
seed: int = 7  # of every random choice [0, 100]
out: str = "runs/demo/evaluate"  # folder this notebook writes
"""
PREDICT = """
import numpy as np
from helpers.evaluation import metrics, tables
names, truth = ["cat", "dog"], np.arange(40) % 2
scores = np.random.default_rng(seed).uniform(0.2, 0.8, 40) * 0.5 + truth * 0.5
table = tables.predictions_table([f"{n}.png" for n in range(40)], truth, np.stack([1 - scores, scores], 1), names)
table.to_csv(folder / "predictions.csv", index=False)
disk.write_json(folder / "metrics.json", metrics.metrics(table, names, n_bootstrap=100))
stages.finish(folder, files=["predictions.csv", "metrics.json"], headline="evaluated")
"""


@pytest.fixture
def toy(quick_toys, monkeypatch) -> Toys:  # noqa: F811
    """A chain whose last stage gives predictions, with an image source that is as it was."""
    for path in quick_toys.notebooks.glob("*.ipynb"):
        path.unlink()
    word = '(folder / "word.txt").write_text((Path(source) / "photos.txt").read_text() + letter)'
    quick_toys.write("00_explore", EXPLORE, IMPORTS, OPEN, NOTE, TROUBLE, word, FINISH)
    quick_toys.write("05_evaluate", EVALUATE, IMPORTS, OPEN, NOTE, PREDICT)
    monkeypatch.setattr(
        inventory, "source_fingerprint", lambda p, cache=None: (stages.Path(p["source"]) / "photos.txt").read_text()
    )
    return quick_toys


@pytest.fixture
def thaw(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["thaw", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main.entry()
        shown = capsys.readouterr()
        return end.value.code or 0, shown.out + shown.err

    monkeypatch.setenv("COLUMNS", "200")
    return call


def edit(path, text: str) -> None:
    path.chmod(0o644)
    path.write_text(text)


# The record


def test_the_manifest_holds_all_that_a_run_is_made_of(toy, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("MY_TOKEN", "s3cr3t-t0ken")
    toy.run("evaluate.seed=9")
    content = manifest.read(toy.runs / "toy")
    assert content["recipe"]["evaluate"] == {"letter": "c", "seed": 9} and content["seeds"] == {"evaluate": 9}
    assert content["recipe"] == notebooks.read_yaml(toy.runs / "toy" / "recipe.yaml")
    assert set(content["stages"]) == set(content["code"]) == {"explore", "evaluate"}
    assert {"05_evaluate", "helpers.evaluation.metrics"} <= set(content["code"]["evaluate"])
    assert content["source"] == "photos:" and content["command"] and content["created"].endswith("+00:00")
    assert content["packages"]["papermill"] == content["versions"]["papermill"] and len(content["packages"]) > 50
    assert {"platform", "cpu", "cores", "memory_gb", "gpus"} == set(content["hardware"])
    assert content["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert len(content["git"]["commit"]) == 40 and content["git"]["dirty"] in (True, False)
    record = disk.read_json(toy.runs / "toy" / "evaluate" / "stage.json")
    assert record["hardware"] == content["hardware"]
    everything = b"".join(path.read_bytes() for path in toy.runs.rglob("*") if path.is_file())
    assert b"s3cr3t-t0ken" not in everything, "the environment may hold secrets"


def test_without_git_the_commit_is_not_known(monkeypatch):
    monkeypatch.setattr(manifest.project, "ROOT", stages.Path("/"))
    assert manifest._git() == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", "")
    assert manifest._git() == {"commit": None, "dirty": None}


# Verify


def test_a_sound_run_is_verified(toy, thaw):
    toy.run()
    code, shown = thaw("verify", toy.runs / "toy")
    assert code == 0 and shown.count("as it was made") == 4
    assert thaw("verify", "toy") == (code, shown), "the name is enough"


def test_every_kind_of_edit_is_found(toy, thaw):
    toy.run()
    folder = toy.runs / "toy" / "evaluate"
    kept = (folder / "predictions.csv").stat()
    text = (folder / "predictions.csv").read_text()
    edit(folder / "predictions.csv", text.replace("cat", "dog", 1))
    os.utime(folder / "predictions.csv", ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert kept.st_size == (folder / "predictions.csv").stat().st_size, "neither size nor time betray it"
    (folder / "metrics.json").unlink()
    (folder / "extra.txt").write_text("mine")
    edit(
        toy.runs / "toy" / "explore" / "stage.json",
        (folder.parent / "explore/stage.json").read_text().replace('"letter": "a"', '"letter": "b"'),
    )
    edit(toy.runs / "toy" / "recipe.yaml", "name: toy\nevaluate: {letter: z}\n")
    toy.source.write_text("other photos")
    code, shown = thaw("verify", toy.runs / "toy")
    assert code == 1
    for expected in (
        "predictions.csv was changed",
        "metrics.json is missing",
        "extra.txt was added",
        "explore     stage.json",
        "recipe.yaml was changed",
        "the images, their labels or the fixes were changed",
    ):
        assert expected in shown


def test_a_stage_made_by_hand_or_missing_is_named(toy, thaw, quick):  # noqa: F811
    toy.run()
    (toy.runs / "toy" / "evaluate").unlink()
    code, shown = thaw("verify", "toy")
    assert code == 1 and "evaluate    it is missing" in shown
    quick(
        toy.notebooks / "05_evaluate.ipynb",
        toy.folder / "out.ipynb",
        {"explore": str(toy.runs / "toy/explore"), "out": str(toy.runs / "toy/evaluate")},
        stdout_file=sys.stdout,
    )
    assert "it was made by hand, so no hashes are on record" in thaw("verify", "toy")[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "has no manifest.json"), ("{", "is not JSON"), ('{"name": "x"}', "does not hold the recipe")],
)
def test_what_is_no_run_is_told(thaw, tmp_path, runs_folder, text, expected):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    code, shown = thaw("verify", tmp_path)
    assert code == 1 and expected in shown and "Traceback" not in shown


# Reproduce


def test_a_run_is_made_again_and_agrees(toy, thaw):
    toy.run("evaluate.seed=9", name="first")
    assert toy.ran() == ["explore", "evaluate"]
    code, shown = thaw("reproduce", toy.runs / "first")
    assert toy.ran() == ["explore", "evaluate"], "nothing is taken from the old store"
    assert code == 0 and "The predictions are equal, byte for byte." in shown and "Differs: nothing" in shown
    assert (toy.runs / ".reproduced/first/evaluate/predictions.csv").is_file()


def test_asked_again_it_is_made_again(toy, thaw, tmp_path, monkeypatch):
    toy.run()
    for _ in range(2):
        toy.ran()
        monkeypatch.setenv("THAW_RUNS", str(toy.runs))
        assert thaw("reproduce", "toy", "--runs", tmp_path / "again")[0] == 0
        assert toy.ran() == ["explore", "evaluate"]


def test_on_another_machine_its_manifest_and_predictions_are_enough(toy, thaw, tmp_path):
    toy.run()
    sent = tmp_path / "sent"
    shutil.copytree(toy.runs / "toy", sent, symlinks=False, ignore=shutil.ignore_patterns("explore", "*.ipynb"))
    shutil.rmtree(toy.runs)
    moved = tmp_path / "moved"
    toy.source.parent.rename(moved)
    code, shown = thaw("reproduce", sent, "--set", f"explore.source={moved}")
    assert code == 0 and "equal, byte for byte" in shown
    assert f"Differs: parameters: explore.source {toy.source.parent} -> {moved}" in shown


def test_other_code_and_images_are_named_with_what_became_of_the_metrics(toy, thaw):
    toy.run()
    toy.write("05_evaluate", EVALUATE, IMPORTS, OPEN, NOTE, PREDICT.replace("truth * 0.5", "truth * 0.1"))
    toy.source.write_text("others")
    code, shown = thaw("reproduce", "toy")
    assert code == 1 and "of 40 test images got the same class; probabilities differ by" in shown
    assert "Differs: the images, their labels or the fixes are not the same" in shown
    assert "Differs: code: 05_evaluate" in shown and "log loss: " in shown


def test_a_parameter_that_is_gone_is_told(toy, thaw):
    toy.run()
    toy.write(
        "05_evaluate",
        EVALUATE.replace("letter", "sign"),
        IMPORTS,
        'folder = stages.open(out, {"a": sign})',
        PREDICT,
    )
    code, shown = thaw("reproduce", "toy")
    assert code == 1 and "evaluate.letter: there is no such parameter" in shown


def test_a_run_is_not_compared_with_itself(toy, thaw):
    toy.run()
    code, shown = thaw("reproduce", "toy", "--runs", toy.runs)
    assert code == 1 and "is where the run lies. Give another folder with --runs" in shown


def test_small_differences_are_measured(tmp_path):
    for name, off in (("a", 0.0), ("b", 1e-6)):
        folder = tmp_path / name / "evaluate"
        folder.mkdir(parents=True)
        table = pd.DataFrame({"path": ["1", "2"], "label": ["x", "y"], "predicted": ["x", "x"], "x": [0.9 - off, 0.6]})
        (table if name == "a" else table[::-1]).to_csv(folder / "predictions.csv", index=False)
        metrics = {key: {"value": 0.5 - off} for key in manifest.COMPARED}
        disk.write_json(folder / "metrics.json", metrics)
    same, said = manifest.results(tmp_path / "a", tmp_path / "b")
    assert same and said[0] == "2 of 2 test images got the same class; probabilities differ by 1e-06 at most."
    assert "accuracy: 0.5 -> 0.499999" in said
    (tmp_path / "b/evaluate/predictions.csv").unlink()
    assert manifest.results(tmp_path / "a", tmp_path / "b")[0] is False


def test_versions_and_machines_that_differ_are_named():
    before = {
        "recipe": {},
        "source": "s",
        "code": {},
        "git": {"commit": "a"},
        "hardware": {"cpu": "x"},
        "environment": {},
    }
    before["packages"] = {"keras": "3.15.1", **{f"p{n}": "1" for n in range(8)}}
    now = before | {"hardware": {"cpu": "y"}, "packages": {"keras": "3.16.0"}}
    assert manifest.differences(before, before) == []
    packages, hardware = manifest.differences(before, now)
    assert packages.startswith("packages: keras 3.15.1 -> 3.16.0, p0 1 -> None") and packages.endswith("and 4 more")
    assert hardware == "hardware: cpu x -> y"
