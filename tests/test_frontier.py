"""Cutting: prefix then suffix is the model, and training the suffix is training the model."""

import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import dear
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.compute import frontier, inference
from helpers.models import backbones

# The smallest of each family that Thaw knows, at a small image size.
FAMILIES = {
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_lite0": 32,
    "efficientnet_v2_b0": 32,
    "inception_resnet_v2": 75,
    "inception_v3": 75,
    "mobilenet": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "nasnet_mobile": 32,
    "resnet50": 32,
    "resnet50_v2": 32,
    "vgg16": 32,
    "xception": 71,
}
DEEP = ["densenet121", "efficientnet_v2_b0", "inception_resnet_v2", "inception_v3", "nasnet_mobile", "resnet50_v2"]


FROZEN = {"efficientnet_lite0", "mobilenet_v3_small"}  # tracing is dear


def classify(backbone: keras.Model, dropout: float = 0.0) -> keras.Model:
    """A classifier of the form that `classifier.build` makes, on any backbone."""
    images = keras.Input(backbone.input_shape[1:])
    features = keras.layers.GlobalAveragePooling2D(name="pool")(backbone(images, training=False))
    if dropout:
        features = keras.layers.Dropout(dropout, name="dropout")(features)
    return keras.Model(images, keras.layers.Dense(3, activation="softmax", name="probabilities")(features))


def lively(model: keras.Model) -> keras.Model:
    """Give the layers statistics and scales that matter, and stop random layers of the backbone."""
    rng = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()])
        for rate in ("rate", "drop_path_rate"):
            if hasattr(layer, rate):
                setattr(layer, rate, 0.0)
    return model


def small() -> keras.Model:
    """Two residual blocks with frozen BatchNormalization, so that tests on what is common to all models are quick."""
    keras.utils.set_random_seed(1)
    images = value = keras.Input((8, 8, 3))
    for block in "abc":
        branch = keras.layers.Conv2D(4, 3, padding="same", name=f"{block}_conv")(value)
        branch = keras.layers.BatchNormalization(name=f"{block}_norm")(branch)
        branch = keras.layers.ReLU(name=f"{block}_relu")(branch)
        value = branch if block == "a" else keras.layers.Add(name=f"{block}_add")([value, branch])
    return lively(keras.Model(images, value, name="backbone"))


def freeze_all_but(backbone: keras.Model, names: set[str]) -> None:
    for layer in backbone.layers:
        layer.trainable = layer.name in names


def pictures(model: keras.Model, count: int = 2) -> np.ndarray:
    return np.random.default_rng(2).uniform(0, 255, (count, *model.input_shape[1:])).astype("float32")


def run(model: keras.Model, values: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(model(values, training=False))


@pytest.mark.parametrize("name", dear(FAMILIES, DEEP))
def test_prefix_then_suffix_is_the_model_in_every_family(name):
    backbone = lively(backbones.build(name, FAMILIES[name], "none"))
    backbone.trainable = False
    model = classify(backbone)
    images = pictures(model)
    expected = run(model, images)

    head = frontier.cut(model)
    assert head.layer == "pool"
    activations = run(inference.fold(head.prefix), images)
    np.testing.assert_allclose(run(head.suffix, activations), expected, atol=1e-3)
    if name in FROZEN:
        np.testing.assert_allclose(inference.fast(head.prefix)(images), activations, atol=1e-3)
        rounded = inference.fast(head.prefix, rounded=True)(images)
        assert rounded.dtype == np.float32 and np.corrcoef(rounded.ravel(), activations.ravel())[0, 1] > 0.98

    backbone.trainable = True
    with_weights = [layer for layer in backbone.layers if layer.weights]
    freeze_all_but(backbone, {with_weights[len(with_weights) * 2 // 3].name})
    cut = frontier.cut(model)
    activations = run(cut.prefix, images)
    assert activations.shape == (2, *cut.shape)
    np.testing.assert_allclose(run(cut.suffix, activations), expected, atol=1e-5)
    assert not cut.prefix.trainable_variables
    assert {id(part) for part in cut.suffix.trainable_variables} == {id(part) for part in model.trainable_variables}


def test_every_frontier_of_a_model():
    backbone = small()
    model = classify(backbone)
    expected = {
        "a_conv": "",
        "a_norm": "a_conv",
        "b_conv": "a_relu",
        "b_norm": "a_relu",
        "c_conv": "b_add",
        "c_norm": "b_add",
        "probabilities": "pool",
    }
    images = pictures(model)
    for thawed, layer in expected.items():
        freeze_all_but(backbone, {thawed})
        cut = frontier.cut(model)
        assert (cut.layer, cut.stopped_by.split(" ")[0]) == (layer, thawed)
        values = images if cut.prefix is None else run(cut.prefix, images)
        np.testing.assert_allclose(run(cut.suffix, values), run(model, images), atol=1e-6)


def test_scattered_flags_cut_below_the_lowest():
    model = classify(small())
    freeze_all_but(model.layers[1], {"b_norm", "c_conv"})
    assert frontier.cut(model).layer == "a_relu"


def test_all_trainable_has_no_prefix():
    model = classify(small())
    cut = frontier.cut(model)
    assert cut.prefix is None
    assert cut.suffix is model
    assert cut.shape == (8, 8, 3)


def test_a_frozen_part_in_several_nested_models():
    inner = small()
    images = keras.Input((8, 8, 3))
    wrapped = keras.Model(images, inner(keras.layers.Rescaling(1 / 255)(images)), name="backbone")
    model = keras.Sequential([keras.Input((8, 8, 3)), wrapped, keras.layers.Flatten(), keras.layers.Dense(2)])
    freeze_all_but(inner, {"c_conv"})
    cut = frontier.cut(model)
    assert cut.layer == "b_add"
    values = pictures(model)
    np.testing.assert_allclose(run(cut.suffix, run(cut.prefix, values)), run(model, values), rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_frontier_is_the_last_articulation_point_of_any_graph(data):
    count = data.draw(st.integers(2, 9))
    tensors, parents, flags = [keras.Input((2,))], [[]], [False]
    for index in range(1, count + 1):
        sources = data.draw(st.lists(st.integers(0, index - 1), min_size=1, max_size=3, unique=True))
        value = tensors[sources[0]] if len(sources) == 1 else keras.layers.Add()([tensors[i] for i in sources])
        flags.append(data.draw(st.booleans()))
        tensors.append(keras.layers.Dense(2, name=f"n{index}", trainable=flags[-1])(value))
        parents.append(sources)
    model = keras.Model(tensors[0], tensors[-1])
    if not model.trainable_variables:
        return

    def above(node: int, removed: int | None = None) -> set[int]:
        """The nodes from which `node` can be reached without `removed`, and itself."""
        found, open_ = set(), [node]
        while open_:
            at = open_.pop()
            if at not in found and at != removed:
                found.add(at)
                open_ += parents[at]
        return found

    on_a_path = sorted(above(count) - {0, count})
    legal = [i for i in on_a_path if 0 not in above(count, i) and not any(flags[j] for j in above(i))]
    cut = frontier.cut(model)
    parts = cut.prefix._flatten_layers() if cut.prefix else []
    below = {int(layer.name[1:]) for layer in parts if isinstance(layer, keras.layers.Dense)}
    # A sum between two nodes can be the frontier too; then no node lies below it that could not.
    assert not any(flags[i] for i in below)
    assert not legal or above(legal[-1]) - {0} <= below
    values = np.ones((1, 2), "float32")
    if cut.prefix is not None:
        np.testing.assert_allclose(run(cut.suffix, run(cut.prefix, values)), run(model, values), rtol=1e-4, atol=1e-6)


def test_a_step_of_the_suffix_is_a_step_of_the_model(tmp_path):
    backbone = small()
    model = classify(backbone)
    freeze_all_but(backbone, {"b_conv", "c_conv"})
    model.save(tmp_path / "before.keras")
    twin = keras.models.load_model(tmp_path / "before.keras")
    images, labels = pictures(model, 6), np.array([0, 1, 2, 0, 1, 2])
    cut = frontier.cut(twin)
    activations = run(cut.prefix, images)
    for trained, values in ((model, images), (cut.suffix, activations)):
        trained.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", run_eagerly=True)
        for _ in range(2):
            trained.train_on_batch(values, labels)
    before = keras.models.load_model(tmp_path / "before.keras").get_weights()
    moved = [not np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)]
    assert sum(moved) == len(model.trainable_variables)
    for one, other in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_model_saves_what_the_suffix_has_learned(tmp_path):
    backbone = small()
    model = classify(backbone, dropout=0.5)
    freeze_all_but(backbone, {"c_conv"})
    for _ in range(2):  # a model may be cut in each phase
        cut = frontier.cut(model)
        cut.suffix.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
        cut.suffix.train_on_batch(run(cut.prefix, pictures(model)), np.array([0, 1]))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [layer.name for layer in loaded.layers] == [layer.name for layer in model.layers]
    np.testing.assert_array_equal(run(loaded, pictures(model)), run(model, pictures(model)))


def test_dropout_of_the_head_stays_active_above_the_frontier():
    backbone = small()
    backbone.trainable = False
    cut = frontier.cut(classify(backbone, dropout=0.5))
    assert cut.layer == "pool"
    values = np.ones((4, 4), "float32")
    first, second = (np.asarray(cut.suffix(values, training=True)) for _ in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (keras.layers.Dropout(0.1, name="odd"), "draws random numbers"),
        (keras.layers.GaussianNoise(0.1, name="odd"), "draws random numbers"),
        (keras.layers.RandomFlip(name="odd"), "draws random numbers"),
        (keras.layers.BatchNormalization(center=False, scale=False, name="odd"), "updates its statistics"),
        (keras.layers.Conv2D(3, 1, name="odd"), "weights train"),
    ],
)
def test_what_varies_stops_the_frontier_and_is_named(layer, reason):
    images = keras.Input((8, 8, 3))
    value = layer(keras.layers.Rescaling(1 / 255, name="rescaling")(images))
    model = keras.Model(images, keras.layers.Dense(2)(keras.layers.Flatten()(value)))
    cut = frontier.cut(model)
    assert cut.layer == "rescaling"
    assert cut.stopped_by.startswith("odd")
    assert reason in cut.stopped_by


def test_an_inert_dropout_does_not_stop_the_frontier():
    dropout = keras.layers.Dropout(0.3)
    model = keras.Sequential([keras.Input((4,)), dropout, keras.layers.ReLU(name="relu"), keras.layers.Dense(2)])
    assert frontier.cut(model).prefix is None
    dropout.rate = 0.0
    assert frontier.cut(model).layer == "relu"


def test_several_inputs_are_refused():
    one, two = keras.Input((2,), name="left"), keras.Input((2,), name="right")
    model = keras.Model([one, two], keras.layers.Dense(1)(keras.layers.Add()([one, two])))
    with pytest.raises(ValueError, match=r"has 2 \(left, right\).*views: 0"):
        frontier.cut(model)


def test_a_model_without_a_graph_is_refused():
    class Own(keras.Model):
        def call(self, values):
            return values

    with pytest.raises(ValueError, match="Own without a graph"):
        frontier.cut(Own(name="own"))


def test_a_frozen_model_is_refused():
    model = classify(small())
    model.trainable = False
    with pytest.raises(ValueError, match="Nothing trains"):
        frontier.cut(model)


def norms(model: keras.Model) -> int:
    return sum(isinstance(layer, keras.layers.BatchNormalization) for layer in model._flatten_layers())


def test_folding_leaves_no_normalization_behind_a_convolution():
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, strides=2, use_bias=False),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same"),
            layers.BatchNormalization(scale=False),
            layers.ReLU(6.0),
            layers.Conv2D(8, 1, groups=2),
            layers.BatchNormalization(center=False),
            layers.Flatten(),
            layers.Dense(3),
            layers.BatchNormalization(),
        ]
    )
    folded = inference.fold(lively(model))
    assert norms(folded) == 0
    np.testing.assert_allclose(run(folded, pictures(model)), run(model, pictures(model)), rtol=1e-4, atol=1e-3)


def test_folding_leaves_what_it_must_not_touch():
    layers = keras.layers
    images = keras.Input((8, 8, 3))
    active = layers.BatchNormalization()(layers.Conv2D(4, 3, activation="relu")(images))
    twice = layers.Conv2D(4, 3)(images)
    value = layers.Add()([layers.BatchNormalization()(twice), twice, active])
    model = lively(keras.Model(images, layers.BatchNormalization()(layers.ReLU()(value))))
    folded = inference.fold(model)
    assert norms(folded) == 3
    np.testing.assert_allclose(run(folded, pictures(model)), run(model, pictures(model)), rtol=1e-4, atol=1e-3)


def test_folding_of_layers_that_are_called_twice_and_of_names_that_recur():
    layers = keras.layers
    images = keras.Input((8, 8, 3))
    inner = keras.Model(images, layers.ReLU(name="relu")(layers.Conv2D(3, 1, name="conv")(images)))
    conv, norm = layers.Conv2D(3, 1, name="conv"), layers.BatchNormalization()
    value = norm(conv(layers.ReLU(name="relu")(norm(conv(inner(images))))))
    model = lively(keras.Model(images, value))
    folded = inference.fold(model)
    assert norms(folded) == 0
    np.testing.assert_allclose(run(folded, pictures(model)), run(model, pictures(model)), rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_a_cut_under_jax():
    here = os.path.dirname(os.path.abspath(__file__))
    code = (
        "import test_frontier as t, keras, numpy as np\n"
        "assert keras.backend.backend() == 'jax'\n"
        "backbone = t.small(); model = t.classify(backbone); t.freeze_all_but(backbone, {'c_conv'})\n"
        "cut = t.frontier.cut(model); images = t.pictures(model); values = t.inference.fast(cut.prefix)(images)\n"
        "np.testing.assert_allclose(t.run(cut.suffix, values), t.run(model, images), atol=1e-5)\n"
    )
    environment = os.environ | {"KERAS_BACKEND": "jax"}
    environment["PYTHONPATH"] = os.pathsep.join([here, os.path.dirname(here), environment.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_rounding_spares_the_first_layers():
    backbone = lively(backbones.build("efficientnet_lite0", 64, "none"))
    backbone.trainable = False
    prefix = frontier.cut(classify(backbone)).prefix
    rounded, images = inference._rounded(inference.fold(prefix)), pictures(prefix)
    kinds = {layer.name: layer.compute_dtype for layer in rounded._flatten_layers() if layer.weights}
    assert [kind for name, kind in kinds.items() if name.startswith("stem")] == ["float32"]
    assert {kind for name, kind in kinds.items() if name.startswith("block3")} == {"bfloat16"}
    exact = run(prefix, images)
    off = np.abs(inference.fast(prefix, rounded=True)(images) - exact).max()
    assert 0 < off < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("on_cpu", "seconds", "fits", "expected"),
    [
        (True, lambda count: 0.01, 999, 4),
        (False, lambda count: 0.02, 999, 32),
        (False, lambda count: 0.02, 16, 16),
        (False, lambda count: 0.005 * count, 999, 4),
        (False, lambda count: 0.02 if count < 10 else 0.02 * count, 999, 8),
    ],
    ids=["a CPU is not asked", "the more the faster", "until memory runs out", "no gain", "until it gets slower"],
)
def test_the_batch_of_a_gpu_is_the_fastest_that_fits(monkeypatch, on_cpu, seconds, fits, expected):
    clock = [0.0]  # of the test's own, since a busy machine would decide otherwise
    monkeypatch.setattr(inference.hardware, "on_cpu", lambda: on_cpu)
    monkeypatch.setattr(inference.time, "perf_counter", lambda: clock[0])

    def run(images):
        if len(images) > fits:
            raise MemoryError
        clock[0] += seconds(len(images))
        return images

    assert inference.quickest_batch(run, np.zeros((4, 2))) == expected
