"""The five systems at their true architecture and image size: what is built, what trains, by which steps.

The model of each recipe is built as 03 builds it. What should train is counted on a network of keras.applications that
is built beside it. The slow tests take each recipe through the cells of 03 and 04, in this process, with random weights
and a handful of images, for two optimiser steps in each phase.
"""

import re

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import dear
from PIL import Image

from helpers.core import disk, notebooks, progress
from helpers.models import classifier, unfreezing
from helpers.pipeline import checks, recipes
from helpers.training import compiling, thaws

NAMES = ("s1_campus", "s2_dogs", "s3_butterflies", "s4_cars", "s5_kenyan_food")
CLASSES = {"s1_campus": 72, "s2_dogs": 120, "s3_butterflies": 50, "s4_cars": 196, "s5_kenyan_food": 13}
IMAGE_SIZE = {"s1_campus": 456, "s2_dogs": 299, "s3_butterflies": 224, "s4_cars": 224, "s5_kenyan_food": 380}
APPLICATIONS = {
    "s1_campus": keras.applications.EfficientNetB5,
    "s2_dogs": keras.applications.Xception,
    "s3_butterflies": keras.applications.ResNet50,
    "s4_cars": keras.applications.ResNet50,
    "s5_kenyan_food": keras.applications.EfficientNetB4,
}
# Weights of the head, added up by hand: features * classes + classes, and S4's BatchNormalization and hidden layers.
HEAD = {
    "s1_campus": 2048 * 72 + 72,
    "s2_dogs": 2048 * 120 + 120,
    "s3_butterflies": 2048 * 50 + 50,
    "s4_cars": 4096 + (2048 * 1024 + 1024) + 2048 + (1024 * 516 + 516) + 1032 + (516 * 196 + 196),
    "s5_kenyan_food": 1792 * 13 + 13,
}
TRAINED = dear(NAMES, NAMES)


def thawed(name: str, layers: list) -> list:
    """The layers of the network of keras.applications that phase 2 trains, found by other means than `unfreeze`."""
    if name == "s1_campus":
        first = [layer.name for layer in layers].index("block7a_expand_conv")
        assert all(layer.name.startswith(("block7", "top_")) for layer in layers[first:]), "block 7 is the last one"
        return layers[first:]
    if name == "s3_butterflies":
        return [layer for layer in layers if layer.name.startswith("conv5_")]
    return layers[19:] if name == "s4_cars" else layers


def trainable(layers: list) -> list[tuple]:
    """Name and shape of each weight that trains in these layers: none of BatchNormalization, none of the scaling."""
    kept = [layer for layer in layers if not isinstance(layer, keras.layers.BatchNormalization)]
    return sorted((weight.name, tuple(weight.shape)) for layer in kept for weight in layer.trainable_weights)


def count(weights: list[tuple]) -> int:
    return sum(int(np.prod(shape)) for _, shape in weights)


def images_of(folder, name: str) -> str:
    """What 02_resize would write: four images for training and two for validation, of two of the classes."""
    rng, rows = np.random.default_rng(0), []
    for number in range(6):
        part, label = ("train", "train", "train", "train", "val", "val")[number], f"class {number % 2:03}"
        path = folder / part / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        small.resize((IMAGE_SIZE[name],) * 2).save(path)
        rows.append([path.name, label, part, str(path.relative_to(folder)), f"{number:064}"])
    pd.DataFrame(rows, columns=["path", "label", "part", "file", "sha256"]).to_csv(folder / "images.csv", index=False)
    disk.write_json(folder / "class_names.json", [f"class {number:03}" for number in range(CLASSES[name])])
    disk.write_json(folder / "resize.json", {"image_size": IMAGE_SIZE[name], "fit": "crop", "format": "png"})
    return str(folder)


def values_of(model: keras.Model) -> dict[int, np.ndarray]:
    return {id(weight): weight.numpy() for weight in model.weights}


def changed(model: keras.Model, before: dict[int, np.ndarray]) -> set[int]:
    return {id(weight) for weight in model.weights if not np.array_equal(weight.numpy(), before[id(weight)])}


class Trained:
    """A system after both phases: what the notebooks left, what trained in each phase, and what changed."""

    def __init__(self, name: str, folder, by_hand, patch: pytest.MonkeyPatch):
        self.name, self.recipe = name, recipes.load(f"recipes/{name}.yaml")
        few = {"batch_size": 2, "keep_cache": False}
        head = self.recipe.resolved("head") | few | {"weights": "none", "profile_steps": [], "contact_sheets": False}
        head |= {"views": min(head["views"], 1), "epochs": min(head["epochs"], 1)}
        tune = self.recipe.resolved("fine_tune") | few | {"views": min(1, self.recipe.resolved("fine_tune")["views"])}
        patch.setenv(progress.PROGRESS_VARIABLE, str(folder / "progress"))
        images = images_of(folder / "resize", name)
        at = {"images": images, "out": str(folder / "head")}
        self.head = by_hand("head", **head | at, before={"03-12": self.calibrate, "03-15": self.remember})
        self.model = self.head["model"]
        self.phases = [self.seen(self.head)]
        # That a saved model comes back the same is shown elsewhere; here the very weights of phase 1 are to go on.
        patch.setattr(keras.models, "load_model", lambda path, **_: self.model)
        at = {"images": images, "head": str(folder / "head"), "out": str(folder / "fine_tune")}
        self.fine_tune = by_hand("fine_tune", **tune | {"epochs": 1} | at, before={"04-12": self.remember})
        self.phases.append(self.seen(self.fine_tune))

    def calibrate(self, left: dict) -> None:
        """Give random weights the statistics that they make, or what flows through a deep network fades to nothing."""
        norms = [layer for layer in left["model"].get_layer("backbone").layers if "BatchNorm" in type(layer).__name__]
        momentum = norms[0].momentum
        for norm in norms:
            norm.trainable, norm.momentum = True, 0.0
        left["model"].get_layer("backbone")(next(iter(left["train"].pixels)), training=True)
        for norm in norms:
            norm.trainable, norm.momentum = False, momentum

    def remember(self, left: dict) -> None:
        self.before = values_of(left["model"])

    def seen(self, left: dict) -> dict:
        model = left["model"]
        return {
            "trainable": {id(weight) for weight in model.trainable_weights},
            "body": trainable([layer for layer in model.get_layer("backbone").layers if layer.trainable]),
            "count": sum(int(np.prod(weight.shape)) for weight in model.trainable_weights),
            "changed": changed(model, self.before),
            "steps": int(left["feed"].model.optimizer.iterations),
            "optimizer": left["feed"].model.optimizer,
        }


@pytest.fixture(scope="module", params=TRAINED)
def system(request, tmp_path_factory, by_hand):
    with pytest.MonkeyPatch.context() as patch:
        made = Trained(request.param, tmp_path_factory.mktemp(request.param), by_hand, patch)
    yield made
    keras.backend.clear_session()


def network(name: str) -> list:
    """The layers of the same network, made by keras.applications alone."""
    size = IMAGE_SIZE[name]
    return APPLICATIONS[name](include_top=False, weights=None, input_shape=(size, size, 3)).layers


@pytest.fixture(scope="module")
def reference(system):
    return network(system.name)


def head_of(model: keras.Model) -> list[tuple]:
    """Class, and rate or units, of each layer after the backbone."""
    layers = [layer for layer in model.layers if layer.name != "backbone"][1:]
    return [(type(layer).__name__, getattr(layer, "rate", None) or getattr(layer, "units", None)) for layer in layers]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_built_and_what_trains_is_the_systems(name):
    recipe = recipes.load(f"recipes/{name}.yaml")
    head, layers, size = recipe.resolved("head"), network(name), IMAGE_SIZE[name]
    model = classifier.build(
        head["backbone"],
        CLASSES[name],
        image_size=size,
        weights="none",
        **{each: head[each] for each in ("dense", "dropout", "levels", "pool")},
        **classifier.output_settings(head["output"]),
    )
    body = model.get_layer("backbone")
    assert model.input_shape == (None, size, size, 3) and model.output_shape == (None, CLASSES[name])
    own = [layer for layer in body.layers if not layer.name.startswith("preprocess_")]
    shapes = [sorted(tuple(w.shape) for layer in of for w in layer.weights) for of in (own, layers)]
    assert shapes[0] == shapes[1]

    plain = [("GlobalAveragePooling2D", None), ("Dropout", 0.2), ("Dense", CLASSES[name])]
    hidden = [("GlobalAveragePooling2D", None), ("Dropout", 0.5), ("BatchNormalization", None)]
    hidden += [("Dense", 1024), ("Dropout", 0.5), ("BatchNormalization", None)]
    hidden += [("Dense", 516), ("Dropout", 0.3), ("BatchNormalization", None), ("Dense", 196)]
    assert head_of(model) == (hidden if name == "s4_cars" else plain)
    relu = [layer.activation.__name__ for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    assert relu == ["relu"] * (len(relu) - 1) + ["softmax"]

    unfreezing.unfreeze(model, "none")
    assert count([(w.name, tuple(w.shape)) for w in model.trainable_weights]) == HEAD[name]
    expected = trainable(thawed(name, layers))
    unfreezing.unfreeze(model, thaws.plan(*of_phase_2(recipe))[-1].unfreeze)
    assert trainable([layer for layer in body.layers if layer.trainable]) == expected
    assert count([(w.name, tuple(w.shape)) for w in model.trainable_weights]) == HEAD[name] + count(expected)
    keras.backend.clear_session()


def of_phase_2(recipe: recipes.Recipe) -> tuple[list, dict]:
    tune = recipe.resolved("fine_tune")
    return tune["steps"], tune


def test_phase_1_trains_the_head_alone(system):
    first = system.phases[0]
    assert first["count"] == HEAD[system.name] and first["body"] == []
    epochs = system.recipe.resolved("head")["epochs"]
    assert first["steps"] == (2 if epochs else 0)
    if epochs:
        head = {id(w) for layer in system.model.layers if layer.name != "backbone" for w in layer.weights}
        assert first["trainable"] <= first["changed"] <= head


def test_phase_2_trains_what_the_system_says(system, reference):
    second, expected = system.phases[1], trainable(thawed(system.name, reference))
    assert second["body"] == expected
    assert second["count"] == HEAD[system.name] + count(expected)


def test_two_steps_of_phase_2_change_all_of_that_and_nothing_else(system):
    second = system.phases[1]
    assert second["steps"] == 2
    moving = {id(w) for layer in system.model.layers if "norm" in layer.name for w in layer.non_trainable_weights}
    assert second["changed"] <= second["trainable"] | moving, "BatchNormalization of the backbone stays bit for bit"
    lost = [w.path for w in system.model.trainable_weights if id(w) not in second["changed"]]
    assert not lost


def test_the_optimizers_are_the_systems(system):
    kinds = {"s2_dogs": "SGD", "s4_cars": "SGD"}
    found = [type(phase["optimizer"]).__name__ for phase in system.phases]
    assert found == ["Adam", kinds.get(system.name, "Adam")]
    if system.name == "s4_cars":
        assert system.phases[1]["optimizer"].momentum == 0.9


def test_images_are_augmented_by_the_systems_layers(system):
    layers = {"s2_dogs": {"RandomRotation": 0.15, "RandomTranslation": 0.1, "RandomContrast": 0.1}}
    for left in (system.head, system.fine_tune):
        found = dict(left["augment"].layers)
        if system.name == "s2_dogs":
            assert list(found) == list(layers["s2_dogs"]) and found["RandomRotation"]["factor"] == 0.15
            assert found["RandomTranslation"] == {"height_factor": 0.1, "width_factor": 0.1}
            assert found["RandomContrast"]["factor"] == 0.1
        else:
            assert list(found) == ["RandomRotation", "RandomTranslation", "RandomContrast"], "the preset default"
        assert left["augment"].flip == ("both" if system.name == "s2_dogs" else "none")


@pytest.mark.slow
def test_s5_trains_the_classifier_alone_or_the_top_of_the_base_as_well():
    from helpers.models import classifier, unfreezing

    model = classifier.build("efficientnet_b4", 13, image_size=380, weights="none")
    layers = keras.applications.EfficientNetB4(include_top=False, weights=None, input_shape=(380, 380, 3)).layers
    unfreezing.unfreeze(model, "none")
    assert sum(int(np.prod(w.shape)) for w in model.trainable_weights) == HEAD["s5_kenyan_food"]
    unfreezing.unfreeze(model, 0.4)
    sizes = np.array([sum(int(np.prod(w.shape)) for w in layer.weights) for layer in layers])
    held = sizes[::-1].cumsum()[::-1]  # from each layer to the end
    start = int(np.flatnonzero(held >= 0.4 * sizes.sum())[-1])
    expected = trainable(layers[start:])
    assert trainable([layer for layer in model.get_layer("backbone").layers if layer.trainable]) == expected
    assert 0.3 < count(expected) / count(trainable(layers)) < 0.5


# What needs no network


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((notebooks.project.ROOT / "recipes").rglob("*.yaml")) if path.parent.name != "sweeps"],
    ids=lambda path: path.stem,
)
def test_a_recipe_says_what_it_is_and_can_be_run(path):
    recipe = recipes.load(path)
    text = path.read_text(encoding="utf-8")
    assert f"# Run: thaw run {path.relative_to(notebooks.project.ROOT)}" in text
    if recipe.name in NAMES:
        header = text.split("\nname:")[0]
        assert all(f"\n# {word}" in header for word in ("System:", "Data:", "Published:", "Time", "Expect:"))
        assert recipe.stages["resize"]["image_size"] == IMAGE_SIZE[recipe.name]


def rates(name: str) -> tuple[list[float], list[float]]:
    """The learning rate of each epoch of both phases, as the notebooks plot it before they train."""
    recipe, steps = recipes.load(f"recipes/{name}.yaml"), 5
    head, tune = recipe.resolved("head"), recipe.resolved("fine_tune")
    epochs = {"epochs": head["epochs"], "steps": steps}
    first = compiling.rates(compiling.schedule(head["schedule"], head["learning_rate"], **epochs), **epochs)
    plan = thaws.plan(tune["steps"], tune, begin=head["epochs"])
    second = thaws.rates(plan, steps * tune["batch_size"])
    return first["learning_rate"].to_list(), second["learning_rate"].to_list()


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("s1_campus", [1e-2] * 50, [1e-4] * 50),
        ("s2_dogs", [1e-3] * 30, [1e-4] * 10),
        ("s4_cars", None, [1e-3] * 7 + [5e-4] + [5e-5] * 8 + [1e-5] * 9),
        ("s5_kenyan_food", [], [1e-4] * 10 + [3.16228e-5] * 10 + [1e-5] * 10 + [3.16228e-6] * 5),
    ],
)
def test_the_learning_rate_follows_the_systems_table(name, first, second):
    found = rates(name)
    np.testing.assert_allclose(found[1], second, rtol=1e-5)
    if first is not None:
        np.testing.assert_allclose(found[0], first, rtol=1e-5)


def test_the_other_settings_are_the_systems():
    one, two, three, four, five = (recipes.load(f"recipes/{name}.yaml") for name in NAMES)
    assert one.resolved("head")["dropout"] == 0.2 and one.resolved("fine_tune")["unfreeze"] == "block7a"
    assert two.resolved("split")["ratio"] == [0.8, 0.2, 0] and two.resolved("split")["seed"] == 123
    assert (two.resolved("head")["patience"], two.resolved("head")["monitor"]) == (10, "val_loss")
    assert two.resolved("evaluate")["part"] == "val"
    assert three.resolved("split")["undersample"] == "2x" and three.resolved("head")["profile_steps"] == [10, 20]
    assert {three.resolved(stage)["imbalance"] for stage in ("head", "fine_tune")} == {"class_weight"}
    assert four.resolved("split")["method"] == "predefined" and four.resolved("head")["epochs"] == 8
    assert five.resolved("fine_tune")["stop_smoothed"] == {"alpha": 0.3, "gain": 0.02, "epochs": 10}
    assert five.resolved("fine_tune")["imbalance"] == "balanced_batches" and five.resolved("head")["epochs"] == 0
    heads = {
        name: recipes.load(f"recipes/s4/{name}.yaml").resolved("head") for name in ("softmax_head", "one_layer_head")
    }
    assert heads["softmax_head"]["dense"] == [] and heads["softmax_head"]["output"] == {}
    assert [layer["units"] for layer in heads["one_layer_head"]["dense"]] == [1024]
    assert recipes.load("recipes/s4/no_warm_up.yaml").resolved("head")["epochs"] == 0
    assert recipes.load("recipes/s4/cropped.yaml").chain()[1] == "crop"


# A competition: labels in a CSV, no labelled test part, unlabelled images to be predicted


def test_a_competition_ends_in_its_submission(
    tmp_path, by_hand, image_folder, monkeypatch, runs_folder, small_backbone
):
    from typer.testing import CliRunner

    from helpers.cli import main
    from helpers.pipeline import planning

    monkeypatch.setenv(progress.PROGRESS_VARIABLE, str(tmp_path / "progress"))
    made = image_folder(tmp_path / "made", {"beagle": 10, "collie": 10, "pug": 10})
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
    rows = []
    for path in sorted(made.rglob("*.png")):
        unlabelled = path.stem.endswith(("08", "09"))
        path.rename(tmp_path / ("test" if unlabelled else "train") / path.name)
        rows += [] if unlabelled else [(path.stem, path.parent.name)]
    pd.DataFrame(rows, columns=["id", "breed"]).to_csv(tmp_path / "labels.csv", index=False)
    changes = [
        f"explore.source={tmp_path / 'train'}",
        f"explore.labels={tmp_path / 'labels.csv'}",
        "explore.suffix=.png",
    ]
    changes += ["resize.image_size=32", "head.backbone=efficientnet_lite0", "head.epochs=1", "fine_tune.epochs=1"]
    changes += ["head.views=1", "head.weights=none", "fine_tune.unfreeze=none", "fine_tune.views=1"]
    recipe = recipes.load("recipes/s2_dogs.yaml", changes, "dogs")
    for number, name in enumerate(recipe.chain()):
        step = planning.plan(recipe)[number]
        by_hand(name, **step.parameters, **{p: str(f) for p, f in step.input_folders.items()}, out=str(step.link))
    run = runs_folder / "dogs"
    metrics = disk.read_json(run / "evaluate" / "metrics.json")
    assert metrics["part"] == "val" and metrics["n"] == 6
    assert "validation images" in disk.read_json(run / "evaluate" / "stage.json")["headline"]
    command = [
        "predict",
        str(run),
        str(tmp_path / "test"),
        "--csv",
        str(tmp_path / "out.csv"),
        "--columns",
        "id,*,breed",
    ]
    result = CliRunner().invoke(main.app, command)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "out.csv")
    assert list(table.columns) == ["id", "beagle", "collie", "pug", "breed"]
    assert table["id"].to_list() == sorted(path.stem for path in (tmp_path / "test").iterdir())
    assert table["breed"].to_list() == table[["beagle", "collie", "pug"]].idxmax(axis=1).to_list()


def test_a_part_that_would_be_empty_is_told_before_the_run(runs_folder, image_folder, tmp_path):

    source = image_folder(tmp_path / "photos", {"cat": 3, "dog": 3})
    changes = [f"explore.source={source}", "explore.labels=", "evaluate.part=test"]
    recipe = recipes.load("recipes/s2_dogs.yaml", changes)
    with pytest.raises(
        notebooks.RecipeError, match=r"evaluate\.part: test would be empty, by split: \[0\.8, 0\.2, 0\]"
    ):
        checks.check(recipe, [])


def test_the_table_names_only_what_exists():
    text = (notebooks.project.ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 60
    for file, test in named:
        assert f"def {test}(" in (notebooks.project.ROOT / file).read_text(encoding="utf-8") if test else True, (
            file,
            test,
        )
        assert (notebooks.project.ROOT / file).is_file()
    parameters = re.findall(rf"`({'|'.join(notebooks.stages())})\.(\w+)", text)
    assert len(parameters) > 50
    for stage, parameter in parameters:
        assert parameter in notebooks.find_stage(stage).settings, f"{stage}.{parameter}"
    for path in re.findall(r"`(recipes/[\w/]+\.yaml|recipes/\w+/|Dockerfile|compose\.yaml|\.devcontainer/)`", text):
        assert (notebooks.project.ROOT / path).exists(), path
