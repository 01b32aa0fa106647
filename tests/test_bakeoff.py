"""The bake-off: the ranking, the learning curve, the notebook, and the chain that the command makes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from helpers.cli import bakeoff, main
from helpers.core import child, disk, progress, stages
from helpers.evaluation import learning_curve, probe
from helpers.pipeline import execution, planning, recipes
from helpers.reports import charts, curves

NAMES = ["cross", "disc", "square"]
console = Console(quiet=True)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setenv(progress.PROGRESS_VARIABLE, str(tmp_path / "progress"))


def known_features(rng, count, *, dimensions=24, distance=1.0):
    """Labels, and features in which class c lies `distance` along axis c, in noise of standard deviation 1."""
    labels = np.arange(count) % len(NAMES)
    return labels, (rng.normal(size=(count, dimensions)) + distance * np.eye(len(NAMES), dimensions)[labels]).astype(
        "f4"
    )


@pytest.fixture
def resized(tmp_path):
    """The tables of a folder of 02_resize with 120 training, 90 validation and 30 test images, without any image."""
    parts = ["train"] * 120 + ["val"] * 90 + ["test"] * 30
    labels = [NAMES[number % 3] for number in range(len(parts))]
    paths = [f"{part}/{label}/{number}.png" for number, (part, label) in enumerate(zip(parts, labels, strict=True))]
    table = {"path": paths, "label": labels, "part": parts, "file": paths, "sha256": paths}
    pd.DataFrame(table).to_csv(tmp_path / "images.csv", index=False)
    disk.write_json(tmp_path / "class_names.json", NAMES)
    disk.write_json(tmp_path / "resize.json", {"image_size": 64, "fit": "crop", "format": "png"})
    return tmp_path


@pytest.fixture
def found(resized):
    """What `probe.embed_all` might have found: features that tell the classes apart, noise, and a lost backbone."""
    rng, items = np.random.default_rng(0), []
    for name, distance in (("noise", 0.0), ("good", 3.0)):
        files = {}
        for part, count in (("train", 120), ("val", 90)):
            files[part] = str(resized / f"{name}-{part}.npy")
            np.save(files[part], known_features(rng, count, distance=distance)[1].astype("float16")[None])
        figures = {"images_per_second": 100.0, "memory_mb": 500.0, "parameters": 10, "model_mb": 1.0, "cache_mb": 2.0}
        items.append({"backbone": name, "image_size": 64, "source": str(resized)} | files | figures)
    lost = {"backbone": "lost", "image_size": 64, "source": str(resized), "problem": "no weights\nnowhere"}
    return [lost, *items]


# The ranking


def test_the_backbone_that_tells_the_classes_apart_is_first_and_what_could_not_be_had_last(found, tmp_path):
    table, predictions = probe.rank(found, resamples=200)
    assert list(table["backbone"]) == ["good", "noise", "lost"] and list(table.columns) == probe.COLUMNS
    good, noise, lost = (table.iloc[row] for row in range(3))
    assert good["low"] < good["accuracy"] < good["high"] and good["accuracy"] > 0.9
    assert abs(noise["accuracy"] - 1 / 3) < 0.2 and noise["p_value"] < 1e-6 and np.isnan(good["p_value"])
    assert np.isnan(lost["accuracy"]) and lost["problem"].startswith("no weights")
    assert noise["strength"] == probe.STRENGTHS[0], "what is noise is held back as strongly as can be"
    assert set(predictions) == {"good", "noise"}
    assert all(path.startswith("val/") for path in predictions["good"]["path"]), "only validation may rank"
    assert probe.headline(table).startswith(f"good is best of 2: {100 * good['accuracy']:.1f} % of validation")
    table.to_csv(tmp_path / "bakeoff.csv", index=False)
    lines = bakeoff.as_text(tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["backbone", "good", "noise", "lost", "Recommended:"]
    assert "nowhere" not in lines[-2] and "Recommended: good;" in lines[-1]
    assert [text.get_text() for text in charts.intervals(table).get_yticklabels()] == ["noise", "good"]
    shown = charts.accuracy_and_speed(table.assign(images_per_second=[10.0, 900.0, np.nan]))
    assert {text.get_text() for text in shown.texts} == {"noise", "good"}
    shown.figure.draw_without_rendering()
    assert {"10", "100", "500"} <= {text.get_text() for text in shown.get_xticklabels()}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("a", 0.9, 10, np.nan)], "a; there is no other."),
        ([("a", 0.9, 10, np.nan), ("b", 0.5, 90, 1e-6)], "a; it is better than every other by more than chance."),
        ([("a", 0.9, 10, np.nan), ("b", 0.88, 90, 0.3), ("c", 0.2, 999, 1e-9)], "b; it is the fastest of the 2"),
        ([("a", 0.9, 99, np.nan), ("b", 0.88, 90, 0.3), ("c", np.nan, np.nan, np.nan)], "a; it is the best, and the"),
    ],
)
def test_the_fastest_of_those_that_validation_cannot_tell_apart_is_recommended(rows, said):
    table = pd.DataFrame(rows, columns=["backbone", "accuracy", "images_per_second", "p_value"])
    assert probe.recommendation(table).startswith(f"Recommended: {said}")


def test_without_any_backbone_the_reasons_are_told(found):
    with pytest.raises(ValueError, match="None of the backbones is available\\.\nlost: no weights"):
        probe.rank(found[:1])


def test_a_class_that_only_validation_has_is_never_predicted(found, resized):
    table = pd.read_csv(resized / "images.csv")
    table[(table["part"] != "train") | (table["label"] != "disc")].to_csv(resized / "images.csv", index=False)
    for item in found[1:]:
        np.save(item["train"], np.load(item["train"])[:, np.arange(120) % 3 != 1])
    table, predictions = probe.rank(found, resamples=200)
    assert (predictions["good"]["disc"] == 0).all() and 0.5 < table["accuracy"][0] < 0.7


def test_names_are_checked_and_sizes_given_before_anything_is_computed(resized, tmp_path, monkeypatch):
    (tmp_path / "large").mkdir()
    disk.write_json(tmp_path / "large" / "resize.json", {"image_size": 240})
    monkeypatch.setattr(probe, "embed", lambda name, source, **_: {"backbone": name, "from": source.name})
    both = [resized, tmp_path / "large"]
    items = probe.embed_all(["efficientnet_lite0", "efficientnet_lite1"], both, cache=tmp_path)
    assert [item["from"] for item in items] == [resized.name, "large"]
    with pytest.raises(ValueError, match="Did you mean efficientnet_lite2"):
        probe.embed_all(["efficientnet_lite9"], both, cache=tmp_path)
    with pytest.raises(ValueError, match="each once"):
        probe.embed_all(["vgg16", "vgg16"], both, cache=tmp_path)


def test_a_process_that_dies_is_a_reason(resized, tmp_path, monkeypatch):
    def ask(*_):
        raise error

    monkeypatch.setattr(child, "ask", ask)
    error = child.ChildError("its process was ended by SIGKILL", "SIGKILL", "")
    assert "SIGKILL, most often because memory ran out" in probe.embed("vgg16", resized, cache=tmp_path)["problem"]
    error = child.ChildError("a defect", "", "")
    assert probe.embed("vgg16", resized, cache=tmp_path)["problem"] == "a defect"


# The learning curve


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(1)
    labels, train = known_features(rng, 480, dimensions=48, distance=1.4)
    asked, val = known_features(rng, 600, dimensions=48, distance=1.4)
    return learning_curve.Features(train, val, labels, asked, NAMES, 1e-2)


def test_a_power_law_is_found_again():
    counts, wanted = np.array([50, 100, 200, 400, 800]), np.array([1600, 3200])
    errors = 0.05 + 0.9 * counts**-0.5
    (law,) = learning_curve._power_law(counts / 800, errors[None], wanted / 800)
    np.testing.assert_allclose(law, 0.05 + 0.9 * wanted**-0.5, atol=2e-3)


def test_the_curve_rises_and_foretells_what_more_images_bring(features):
    rows = np.arange(240)
    half = replace(features, train=features.train[rows], train_labels=features.train_labels[rows])
    curve = learning_curve.measure(half, range(4))
    table = learning_curve.table(curve, further=[2])
    assert list(table["images"]) == [15, 30, 60, 120, 240, 480] and list(table["per_class"])[-1] == 160
    assert table["measured"].iloc[0] + 0.1 < table["measured"].iloc[4] and np.isnan(table["measured"].iloc[5])
    assert (table["low"] < table["accuracy"]).all() and (table["accuracy"] < table["high"]).all()
    truth = 1 - learning_curve._errors(features, np.arange(480)).mean()
    assert table["low"].iloc[5] < truth < table["high"].iloc[5]


def test_more_images_help_where_classes_are_confused(features):
    """The first class is lifted out of reach of the others: nobody needs more images of it."""
    lift = 6 * np.eye(48, dtype="f4")[0]
    train = features.train[:150] + (features.train_labels[:150] == 0)[:, None] * lift
    val = features.val + (features.val_labels == 0)[:, None] * lift
    apart = replace(features, train=train, train_labels=features.train_labels[:150], val=val)
    full = learning_curve._errors(apart, np.arange(150))
    gains = learning_curve.gains(apart, full, more=50, seeds=range(4), most=3).set_index("label")
    assert gains["images"].to_dict() == dict.fromkeys(NAMES, 50) and gains["recall"].idxmax() == "cross"
    assert abs(gains.loc["cross", "gain"]) < 0.01 < gains.loc[["disc", "square"], "gain"].max()
    assert (gains["low"] <= gains["gain"]).all() and (gains["gain"] <= gains["high"]).all()
    assert len(learning_curve.gains(apart, full, more=50, seeds=range(2), most=1)) == 1


def test_too_few_images_for_a_law_are_measured_all_the_same(features):
    few = replace(features, train=features.train[:12], train_labels=features.train_labels[:12])
    curve = learning_curve.measure(few, range(2))
    table = learning_curve.table(curve)
    assert table["measured"].notna().sum() == 2 and table["accuracy"].isna().all()
    assert [line.get_label() for line in curves.learning_curve(table).lines] == ["extrapolated", "fitted", "measured"]
    assert learning_curve.gains(few, curve.wrong[-1, 0], more=50, seeds=[0], most=9).empty


# The command


@pytest.fixture
def recipe(tmp_path, image_folder, runs_folder):
    photos = image_folder(tmp_path / "photos", dict.fromkeys(NAMES, 8))
    path = tmp_path / "tiny.yaml"
    head = "{next_unfreeze: block6, weights: none, seed: 5}"
    path.write_text(f"explore: {{source: {photos}}}\nresize: {{image_size: 224}}\nhead: {head}\n")
    return path


@pytest.fixture
def made(monkeypatch):
    """The steps that were asked for; each leaves only its record."""
    steps = []

    def make(step, watch, say, run=None):
        steps.append(step)
        step.folder.mkdir(parents=True)
        disk.write_json(step.folder / stages.STAGE_FILE, {"status": "done", "headline": "made", "files": {}})
        planning.link_stage(step)
        return 0.0

    monkeypatch.setattr(execution, "make", make)
    return steps


def test_each_backbone_gets_its_own_size_and_nothing_is_made_twice(recipe, made, runs_folder):
    loaded, names = recipes.load(recipe), ["efficientnet_lite0", "efficientnet_lite1", "resnet50"]
    folder = bakeoff.run(loaded, names, console, own_size=True)
    assert [step.stage.name for step in made] == ["explore", "split", "resize", "resize", "bakeoff"]
    last, (plain, large) = made[-1], made[2:4]
    assert (plain.parameters["image_size"], large.parameters["image_size"]) == (224, 240)
    assert plain.link == runs_folder / "tiny/resize" and plain.link.resolve() == plain.folder
    assert large.link.resolve() == large.folder and large.link.parent != plain.link.parent
    assert last.input_folders == {"images": plain.folder}
    wanted = {"backbones": names, "weights": "none", "next_unfreeze": "block6", "seed": 5}
    assert wanted.items() <= last.parameters.items() and last.parameters["resized"] == [str(large.folder)]
    assert folder == runs_folder / "tiny/bakeoff" and folder.resolve() == last.folder
    bakeoff.run(loaded, names, console, own_size=True)
    assert len(made) == 5
    bakeoff.run(loaded, names[:2], console)
    assert [step.stage.name for step in made[5:]] == ["bakeoff"] and made[-1].parameters["resized"] == []


def test_wrong_names_are_refused_before_anything_is_made(recipe, made, monkeypatch):
    for names, message in (("resnet5", "resnet50"), ("vgg16,vgg16", "each once"), (" ,", "at least one")):
        answer = CliRunner().invoke(main.app, ["bakeoff", str(recipe), "--backbones", names])
        assert answer.exit_code == 1 and message in str(answer.exception), answer.output
    assert made == []


# The notebook


def test_the_notebook_ranks_real_weights(tmp_path, image_folder, by_hand):
    photos = image_folder(tmp_path / "photos", dict.fromkeys(NAMES, 24))
    places = {name: str(tmp_path / name) for name in ("explore", "split", "resize", "bakeoff")}
    by_hand("explore", source=str(photos), out=places["explore"])
    by_hand("split", explore=places["explore"], ratio=[0.6, 0.3, 0.1], out=places["split"])
    by_hand("resize", split=places["split"], image_size=64, out=places["resize"])
    names = ["xception", "efficientnet_lite0"]
    by_hand("bakeoff", images=places["resize"], backbones=names, out=places["bakeoff"])
    folder = Path(places["bakeoff"])
    table = pd.read_csv(folder / "bakeoff.csv")
    assert list(table["backbone"]) == names[::-1]
    best, small = table.iloc[0], table.iloc[1]
    assert best["accuracy"] > 0.6 and best["images_per_second"] > 1 and best["parameters"] == 3_413_024
    assert 200 < best["memory_mb"] < 8000 and 13 < best["model_mb"] < 14 and best["cache_mb"] > 0
    assert small["problem"] == "it needs images of at least 71 pixels (resize.image_size)"
    names = {path.name for path in folder.iterdir()}
    assert {"learning_curve.csv", "gains.csv", "predictions-efficientnet_lite0.csv"} <= names
    kept = [json.loads(path.read_text())["settings"] for path in tmp_path.glob("cache/*/bank.json")]
    assert len(kept) == 4, "the features, and below them what block7 will train on, of train and val each"
    assert disk.read_json(folder / stages.STAGE_FILE)["headline"].startswith("efficientnet_lite0 is best of 1")
