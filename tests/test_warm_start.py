"""Phase 1 from elsewhere or not at all, and phase 2 in several steps: what the notebooks make of it."""

import keras
import numpy as np
import pandas as pd
import pytest

from helpers.core import disk, notebooks, progress, stages
from helpers.models import classifier, unfreezing
from helpers.pipeline import checks, planning, recipes
from helpers.training import saving

pytestmark = pytest.mark.usefixtures("small_backbone")

NAMES = ["disc", "square", "cross"]


@pytest.fixture(autouse=True)
def headless(tmp_path, monkeypatch):
    monkeypatch.setenv(progress.PROGRESS_VARIABLE, str(tmp_path / "progress.jsonl"))


HEAD = {
    "weights": "none",
    "next_unfreeze": "none",
    "views": 2,
    "augmentation": "none",
}


@pytest.fixture(scope="module")
def control(resized, tmp_path_factory, by_hand, small_backbone):
    """The run "control": a head that is not trained, then two thaws in a row."""
    folder = tmp_path_factory.mktemp("runs") / "control"
    head = by_hand("head", images=str(resized), out=str(folder / "head"), epochs=0, **HEAD)
    steps = [{"unfreeze": "block3", "epochs": 2}, {"unfreeze": "block2", "schedule": "constant"}]
    options = {"epochs": 1, "batch_size": 8, "layer_decay": 0.9, "monitor": "val_accuracy", "views": 2}
    options |= {"steps": steps, "optimizer": {"name": "sgd", "momentum": 0.9, "use_ema": True}, "profile_steps": [1, 2]}
    places = {"images": str(resized), "head": str(folder / "head"), "out": str(folder / "fine_tune")}
    fine_tune = by_hand("fine_tune", **places, **options)
    return folder, head, fine_tune


def test_the_control_leaves_the_head_as_it_was_drawn(control):
    folder, head, _ = control
    assert len(saving.read_history(folder / "head")) == 0
    assert head["best"] == "Nothing was trained: the head keeps its random weights."
    keras.utils.set_random_seed(7)
    drawn = classifier.build("efficientnet_lite0", 3, image_size=32, weights="none")
    kept = keras.models.load_model(folder / "head" / "model.keras")
    for one, other in zip(kept.get_weights(), drawn.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert list(pd.read_csv(folder / "head/history.csv").columns) == list(saving.HISTORY_COLUMNS)


def test_the_steps_of_the_notebook(control):
    folder, _, fine_tune = control
    history = saving.read_history(folder / "fine_tune")
    assert history["epoch"].to_list() == [1, 2, 3]
    assert history["phase"].to_list() == ["fine_tune", "fine_tune", "fine-tune 2"]
    assert fine_tune["plan"][1].optimizer["name"] == "sgd" and fine_tune["plan"][1].schedule == "constant"
    kept = keras.models.load_model(folder / "fine_tune" / "model.keras")
    thawed = unfreezing.trainable_table(kept).loc["backbone, thawed", "from"]
    assert thawed.startswith("block2"), "the last step's"
    best = saving.best_epoch(history, "val_accuracy")
    accuracy = np.mean(fine_tune["scores"].argmax(axis=1) == fine_tune["val"].labels)
    assert accuracy == pytest.approx(best["val_accuracy"])
    assert pd.read_csv(folder / "fine_tune/profile.csv")["op"].str.contains("Conv").any()
    assert not list((folder / "cache").rglob("bank.json")) and not (folder / "fine_tune/backup").exists()


def test_a_head_from_another_run(control, resized, tmp_path, monkeypatch, by_hand):
    folder, _, _ = control
    monkeypatch.setenv("THAW_RUNS", str(folder.parent))
    found = by_hand(
        "head", images=str(resized), out=str(tmp_path / "head"), from_run="control", **HEAD | {"weights": "none"}
    )
    assert "Taken from control: Nothing was trained" in found["best"]
    given, kept = (keras.models.load_model(path / "model.keras") for path in (folder / "head", tmp_path / "head"))
    for one, other in zip(given.get_weights(), kept.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (tmp_path / "head/history.csv").read_bytes() == (folder / "head/history.csv").read_bytes()
    model = classifier.build("efficientnet_lite0", 3, image_size=32, weights="none", dense=[4])
    with pytest.raises(ValueError, match="has another model, its layer probabilities is not the head_dense_1"):
        saving.take(model, "control", class_names=NAMES, monitor="val_loss")
    with pytest.raises(ValueError, match="has the classes disc, square, cross; here are a, b, c"):
        saving.take(model, "control", class_names=["a", "b", "c"], monitor="val_loss")
    with pytest.raises(FileNotFoundError, match=r"'contrl' is neither a run .* Runs with one: control"):
        saving.take(model, "contrl", class_names=NAMES, monitor="val_loss")


def test_a_head_that_is_made_anew_is_another_ingredient(control, monkeypatch, tmp_path):
    folder, _, _ = control
    monkeypatch.setenv("THAW_RUNS", str(folder.parent))
    before = planning._named_files("head", {"from_run": "control"})
    assert (
        before
        == planning._named_files("head", {"from_run": str(folder)})
        == planning._named_files("head", {"from_run": str(folder / "head")})
    )
    record = folder / "head" / stages.STAGE_FILE
    disk.write_json(record, disk.read_json(record) | {"created": "later"})
    assert planning._named_files("head", {"from_run": "control"}) != before != {}
    assert planning._named_files("head", {"from_run": "none such"}) == {}
    with pytest.raises(notebooks.RecipeError, match="control is this run itself"):
        checks._check_from_run(recipes.Recipe("control", {"head": {"from_run": "control"}}))
