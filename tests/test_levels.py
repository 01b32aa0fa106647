"""Heads that read several levels: what they read, where the model is cut, and that training and files agree with it."""

import re

import keras
import numpy as np
import pytest
from conftest import dear

from helpers.compute import bank, fast_layers, frontier, graphs, inference
from helpers.compute.views import Images
from helpers.evaluation.trust import explanation
from helpers.models import backbones, classifier, levels, unfreezing
from helpers.training import checks, datasets, features, saving

# Networks, their size here, and what of them is thawed.
FAMILIES = {
    "convnext_tiny": (32, "downsampling_block_2"),
    "densenet121": (32, "conv5"),
    "efficientnet_lite0": (64, "block6"),
    "efficientnet_v2_b0": (32, "block6"),
    "mobilenet_v3_small": (32, "expanded_conv_10"),
    "resnet50": (32, "conv5"),
}
SOME = ["block1", "block3", "top"]


def build(name: str, size: int, **settings) -> keras.Model:
    """A classifier whose statistics matter, and whose answers differ from image to image."""
    keras.utils.set_random_seed(0)
    rng, model = np.random.default_rng(0), classifier.build(name, 3, image_size=size, weights="none", **settings)
    head = model.get_layer("probabilities")
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()])
    if scale := features.scale_of(model):
        known = run(keras.Model(model.input, scale.input), pictures(model, 8))
        mean, spread = features.statistics([known])
        scale.set_weights([mean, np.square(spread)])
    head.set_weights([rng.normal(size=weight.shape) / np.sqrt(head.kernel.shape[0]) for weight in head.get_weights()])
    return model


def pictures(model: keras.Model, count: int = 3, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(0, 255, (count, *model.input_shape[1:]))
    return (noise * np.linspace(0.2, 1, count)[:, None, None, None]).astype("float32")


def run(model: keras.Model, values: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(model(values, training=False))


def probabilities_by_hand(model: keras.Model, ends: list[str], pool: str, images: np.ndarray) -> np.ndarray:
    """What the head gives, computed from the outputs of the blocks' ends."""
    body = model.get_layer("backbone")
    maps = keras.Model(body.input, [body.get_layer(name).output for name in ends])(images, training=False)
    other = {"mean": [], "mean_max": [np.max], "mean_std": [lambda x, axis: np.sqrt(x.var(axis=axis) + 1e-5)]}[pool]
    pooled = [reduce(np.asarray(each), axis=(1, 2)) for each in maps for reduce in (np.mean, *other)]
    mean, variance = model.get_layer("head_scale").get_weights()
    kernel, bias = model.get_layer("probabilities").get_weights()
    logits = (np.concatenate(pooled, axis=1) - mean) / np.sqrt(variance + 1e-6) @ kernel + bias
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def test_probabilities_are_those_computed_by_hand_from_the_blocks():
    model = build("efficientnet_lite0", 64, levels=["top", "block3", "block1"], pool="mean_std")
    images = pictures(model)
    answer = run(model, images)
    expected = probabilities_by_hand(model, ["block1a_project_bn", "block3b_add", "top_activation"], "mean_std", images)
    np.testing.assert_allclose(answer, expected, atol=1e-4)
    assert np.ptp(answer, axis=0).max() > 0.05  # the images get other answers


@pytest.mark.parametrize("name", dear(FAMILIES, ["convnext_tiny", "densenet121", "efficientnet_v2_b0", "resnet50"]))
def test_suffix_of_prefix_is_the_model_in_every_family(name, tmp_path):
    size, thawed = FAMILIES[name]
    model = build(name, size, levels="all", pool="mean_std")
    images = pictures(model)
    expected = run(model, images)
    assert np.ptp(expected, axis=0).max() > 0.01
    head = frontier.cut(model)
    assert head.shape == head.model.get_layer("backbone").output.shape[1:] and head.levels == 0
    features = run(head.prefix, images)
    np.testing.assert_allclose(run(head.suffix, features), expected, atol=1e-5)
    heat = explanation.heat(model, images)
    assert heat.shape == images.shape[:3] and np.isfinite(heat).all() and np.ptp(heat) > 0

    unfreezing.unfreeze(model, thawed)
    cut = frontier.cut(model)
    assert cut.levels >= 3 and len(cut.shape) == 1 and "pooled levels beside it" in str(cut)
    activations = inference.fast(cut.prefix)(images)
    assert activations.shape == (3, *cut.shape)
    np.testing.assert_allclose(run(cut.suffix, activations), expected, atol=2e-3)
    trained = {id(part) for part in model.trainable_variables}
    assert {id(part) for part in cut.suffix.trainable_variables} == trained and not cut.prefix.trainable_variables
    np.testing.assert_allclose(run(fast_layers.faster(cut.suffix), activations), expected, atol=2e-3)

    unfreezing.unfreeze(model, "none")
    middle = frontier.cut(cut.suffix).prefix
    np.testing.assert_allclose(run(middle, activations), features, atol=1e-3 * np.abs(features).max())
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(run(keras.models.load_model(tmp_path / "model.keras"), images), expected, atol=1e-6)


def test_the_bank_holds_a_map_and_its_levels_and_is_lifted_to_the_features(tmp_path):
    model = build("efficientnet_lite0", 64, levels="all")
    images = pictures(model, 5).astype("uint8")
    given = Images(images, [str(number) for number in range(5)], np.arange(5) % 3)
    unfreezing.unfreeze(model, "block6")
    lower = frontier.cut(model)
    below = bank.make(lower.prefix, given, tmp_path, dtype="float32")
    unfreezing.unfreeze(model, "none")
    lifted = bank.lift(below, frontier.cut(lower.suffix).prefix, tmp_path, label="images")
    expected = run(frontier.cut(model).prefix, images.astype("float32"))
    np.testing.assert_allclose(lifted.activations[0], expected, atol=1e-3)


def test_training_the_suffix_is_training_the_model():
    """One step each, from the same weights: of the whole model, and of the suffix on what the prefix gives."""
    model = build("efficientnet_lite0", 64, levels=SOME, pool="mean_std", dropout=0)
    model.get_layer("head_scale").trainable = False
    unfreezing.unfreeze(model, "block6")
    cut, images, begin, after = frontier.cut(model), pictures(model), model.get_weights(), []
    for part, values in ((model, images), (cut.suffix, run(cut.prefix, images))):
        model.set_weights(begin)
        part.compile(loss="categorical_crossentropy", optimizer=keras.optimizers.SGD(1e-3))
        part.optimizer.build(part.trainable_variables)  # else TensorFlow traces the step twice
        part.train_on_batch(values, np.eye(3))
        after.append(model.get_weights())
    for one, other in zip(*after, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert any((one != first).any() for one, first in zip(after[1], begin, strict=True))


def test_what_pools_the_levels_is_no_layer_of_the_backbone():
    """Layers are counted and named as without levels, and weights have the same paths in the same order."""
    plain, several = (build("mobilenet_v3_small", 32, levels=what) for what in ("top", "all"))
    for what in (20, 0.3, {"from_index": 100}, "expanded_conv_8"):
        tables = [unfreezing.unfreeze(model, what).drop(index="head") for model in (plain, several)]
        assert tables[0].equals(tables[1])
    bodies = [unfreezing.backbone_of(model) for model in (plain, several)]
    assert [weight.path for weight in bodies[0].weights] == [weight.path for weight in bodies[1].weights]


def test_a_backbone_takes_its_weights_from_a_model_with_other_levels(tmp_path):
    models = [build("mobilenet_v3_small", 32, levels="all")]
    for number, other in enumerate(("top", "all")):
        file = tmp_path / f"{number}.keras"
        models[-1].save(file)
        models.append(classifier.build("mobilenet_v3_small", 3, image_size=32, levels=other, weights=str(file)))
    bodies = [unfreezing.backbone_of(model).get_weights() for model in models]
    for three in zip(*bodies, strict=True):
        assert (three[0] == three[1]).all() and (three[1] == three[2]).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("efficientnet_lite0", [*(f"block{number}" for number in range(1, 8)), "top"]),
        ("mobilenet_v2", ["bn_Conv1", "block_2", "block_5", "block_12", "top"]),  # of 17 blocks, one a resolution
        ("vgg16", ["block1", "block2", "block3", "block4", "top"]),
    ],
)
def test_the_levels_are_the_ends_of_the_blocks(name, expected):
    assert levels.names(backbones.build(name, 64, "none")) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("block9", r"no level 'block9'\. Did you mean block.*Its levels: block1, "),
        (["block3", "tip"], "no level 'tip'"),
        ([], "levels must be top, all"),
        (7, "levels must be top, all"),
    ],
)
def test_unknown_levels_are_told_before_a_run(given, said):
    with pytest.raises(ValueError, match=said):
        build("efficientnet_lite0", 32, levels=given)
    (problem,) = checks.check_layers("efficientnet_lite0", 32, {}, given)
    assert problem.startswith("head.levels: ")


def test_constants_of_bare_operations_are_part_of_what_a_model_computes():
    def adds(number: float) -> keras.Model:
        inputs = keras.Input((2,))
        return keras.Model(inputs, inputs + number)

    model = adds(1.0)
    before = graphs.signature(model)
    inference.fold(model)  # calls its operations again
    assert graphs.signature(model) == before == graphs.signature(adds(1.0)) != graphs.signature(adds(2.0))


def test_a_gradient_passes_where_a_map_is_flat(small_backbone):
    model = build("small", 8, levels="all", pool="mean_std")  # its last map is one pixel
    assert unfreezing.backbone_of(model).get_layer("block3_conv").output.shape[1:3] == (1, 1)
    unfreezing.unfreeze(model, "block3")
    model.compile(loss="categorical_crossentropy", optimizer="sgd")
    model.train_on_batch(pictures(model), np.eye(3))
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


@pytest.mark.parametrize("pool", ["mean", "mean_max"])
def test_other_ways_to_pool_give_what_is_computed_by_hand(pool, small_backbone):
    model = build("small", 32, levels=["top", "block2"], pool=pool)
    images = pictures(model)
    answer, expected = run(model, images), probabilities_by_hand(model, ["block2_conv", "block3_conv"], pool, images)
    np.testing.assert_allclose(answer, expected, atol=1e-4)
    assert np.ptp(answer, axis=0).max() > 0.05


@pytest.mark.parametrize("views", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_03_standardises_and_04_trains_on_with_levels(views, by_hand, small_backbone, resized, tmp_path):
    """Through the notebooks, with the cache and without it."""
    at = {"images": str(resized), "out": str(tmp_path / "head")}
    how = {"views": views, "batch_size": 8, "epochs": 2}
    left = by_hand("head", **at, **how, levels=["block2", "top"], pool="mean_std", next_unfreeze="block3")
    scale = features.scale_of(left["model"])
    if not views:
        below = keras.Model(left["model"].input, scale.input)
        plain = np.concatenate([run(below, np.asarray(batch, "float32")) for batch in left["train"].pixels])
    else:
        plain = np.concatenate(left["banks"].train.activations)
    assert np.allclose(scale.moving_mean, plain.mean(axis=0, dtype=float), atol=1e-3)
    assert np.allclose(scale.moving_variance, np.square(plain.std(axis=0, dtype=float)), rtol=1e-2, atol=1e-4)
    assert not scale.trainable
    assert saving.read_history(tmp_path / "head")["val_loss"].notna().all()

    at = {"images": str(resized), "head": str(tmp_path / "head"), "out": str(tmp_path / "fine_tune")}
    left = by_hand("fine_tune", **at, **how, unfreeze="block3")
    assert np.array_equal(features.scale_of(left["model"]).moving_mean, scale.moving_mean)
    assert left["cut"].levels == 1


def test_validation_chooses_the_levels(by_hand, small_backbone, resized, tmp_path, capsys):
    """All six probes are shown, and the head reads the levels of the best."""
    at = {"images": str(resized), "out": str(tmp_path / "head"), "views": 1, "batch_size": 8}
    left = by_hand("head", **at, levels="auto", augmentation="none", solver="logistic", next_unfreeze="block3")
    shown = capsys.readouterr().out
    tried = re.findall(r"^ *(top|all) +\S+ +(\d\S+) +\S+$", shown, re.M)
    assert [name for name, _ in tried] == ["top"] * 3 + ["all"] * 3
    best = min(tried, key=lambda row: float(row[1]))[0]
    assert f"levels: {best}, whose probe has the lowest loss on 6 validation images" in shown
    assert left["head_levels"] == best and (len(left["cut"].shape) == 1)
    assert left["model"].get_layer("head_scale").moving_mean.shape == ({"all": 24, "top": 8}[best],)


@pytest.mark.parametrize("levels", ["top", ["block1", "top"]])
def test_levels_that_are_named_are_not_chosen(levels, resized):
    """Nothing is read and no backbone is built: there is none of this name."""
    train = datasets.read(resized, "train")
    how = {"weights": "none", "pool": "mean", "seed": 1}
    assert features.choose_levels(levels, "no such network", train, train, **how) == levels
