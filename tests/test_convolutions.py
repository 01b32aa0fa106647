"""Convolutions that train fast on a CPU: the same outputs, gradients and training as the model's own layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import dear
from test_frontier import FAMILIES, classify, lively, pictures, small

from helpers.compute import fast_layers, frontier
from helpers.models import backbones

LABELS = np.array([0, 2])
DEEP = ["resnet50", "xception"]


def thawed(name: str) -> keras.Model:
    """A classifier whose last third of layers trains, as `unfreezing.unfreeze` leaves it."""
    backbone = lively(backbones.build(name, FAMILIES[name], "none"))
    for index, layer in enumerate(backbone.layers):
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = index > len(backbone.layers) * 2 // 3 and not is_norm
    return classify(backbone)


def gradients(model: keras.Model, values: np.ndarray, variables: list) -> list[np.ndarray]:
    with tf.GradientTape() as tape:
        loss = keras.losses.sparse_categorical_crossentropy(LABELS, model(values, training=False))
    found = tape.gradient(loss, [variable.value for variable in variables])
    return [np.zeros(v.shape) if g is None else g.numpy() for v, g in zip(variables, found, strict=True)]


def train(model: keras.Model, values: np.ndarray, *, steps: int = 3) -> None:
    model.compile(optimizer=keras.optimizers.SGD(0.01), loss="sparse_categorical_crossentropy")
    model.fit(values, LABELS, epochs=steps, verbose=0)


@pytest.mark.parametrize(
    "name", dear(["efficientnet_lite0", "efficientnet_b0", "mobilenet_v2", "vgg16", "convnext_tiny", *DEEP], DEEP)
)
def test_outputs_and_gradients_are_those_of_the_model(name):
    suffix = frontier.cut(thawed(name)).suffix
    faster = fast_layers.faster(suffix)
    values = np.random.default_rng(3).normal(size=(2, *suffix.input_shape[1:])).astype("float32")
    np.testing.assert_allclose(faster(values), suffix(values), atol=1e-5)
    trained = suffix.trainable_variables
    assert trained and {id(v) for v in faster.trainable_variables} == {id(v) for v in trained}
    assert {id(v) for v in faster.variables} == {id(v) for v in suffix.variables}, "or a backup would lack something"
    for variable, one, other in zip(
        trained, gradients(suffix, values, trained), gradients(faster, values, trained), strict=True
    ):
        np.testing.assert_allclose(other, one, atol=1e-4 * np.abs(one).max() + 1e-7, err_msg=variable.path)


@pytest.mark.parametrize(
    ("side", "strides", "padding", "multiplier"),
    [(5, 1, "same", 1), (7, 1, "same", 1), (5, 2, "same", 1), (5, 1, "valid", 1), (3, 1, "same", 1), (5, 1, "same", 2)],
)
def test_every_kind_of_depthwise_convolution(side, strides, padding, multiplier):
    kind = {"strides": strides, "padding": padding, "depth_multiplier": multiplier, "name": "it"}
    images = keras.Input((9, 8, 3))
    outputs = keras.layers.DepthwiseConv2D(side, **kind)(images)
    model = keras.Model(images, keras.layers.Dense(3, activation="softmax")(keras.layers.Flatten()(outputs)))
    faster, values = fast_layers.faster(model), np.random.default_rng(1).normal(size=(2, 9, 8, 3)).astype("float32")
    np.testing.assert_allclose(faster(values), model(values), atol=1e-6)
    both = [gradients(one, values, model.trainable_variables) for one in (model, faster)]
    for expected, found in zip(*both, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gradients_reach_the_layers_below_a_depthwise_convolution():
    images = keras.Input((9, 8, 3))
    value = keras.layers.Conv2D(4, 1, strides=2, name="below")(images)
    value = keras.layers.Flatten()(keras.layers.DepthwiseConv2D(5, padding="same")(value))
    model = keras.Model(images, keras.layers.Dense(3, activation="softmax")(value))
    faster, values = fast_layers.faster(model), np.random.default_rng(1).normal(size=(2, 9, 8, 3)).astype("float32")
    below = model.get_layer("below").trainable_variables
    for expected, found in zip(*(gradients(one, values, below) for one in (model, faster)), strict=True):
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_to_train_it_is_to_train_the_model():
    models = [classify(small()) for _ in range(2)]
    models[1].set_weights(models[0].get_weights())
    for model in models:
        for layer in model.layers[1].layers:
            layer.trainable = not isinstance(layer, keras.layers.BatchNormalization)
    before, values = models[0].get_weights(), pictures(models[0]) / 255
    train(models[0], values)
    train(fast_layers.faster(models[1]), values)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(before, models[0].get_weights(), strict=True))
    for expected, found in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_statistics_that_train_are_not_folded():
    model = classify(small())
    faster = fast_layers.faster(model)
    norm = model.layers[1].get_layer("b_norm")
    before = norm.moving_mean.numpy()
    train(faster, pictures(model) / 255)
    assert np.abs(norm.moving_mean.numpy() - before).max() > 1e-4
    assert [layer.name for layer in faster._flatten_layers()].count("b_norm") == 1


def pointwise() -> keras.Model:
    images = keras.Input((6, 6, 16))
    value = keras.layers.Conv2D(32, 1, activation="relu", name="wide")(images)
    value = keras.layers.GlobalAveragePooling2D()(value)
    return keras.Model(images, keras.layers.Dense(3, activation="softmax")(value))


def test_rounding_is_for_training_only():
    model = pointwise()
    exact, rounded = (fast_layers.faster(model, rounded=flag) for flag in (False, True))
    values = np.random.default_rng(1).normal(size=(2, 6, 6, 16)).astype("float32")
    np.testing.assert_array_equal(rounded(values), exact(values))
    np.testing.assert_array_equal(rounded.predict(values, verbose=0), exact.predict(values, verbose=0))
    off = np.abs(np.asarray(rounded(values, training=True)) - exact(values, training=True)).max()
    assert 0 < off < 1e-2


def test_rounded_training_goes_where_exact_training_does():
    """In `fit`, in a sub-model that was called with training=False, as a backbone is."""
    weights, values = [], np.random.default_rng(1).normal(size=(2, 6, 6, 16)).astype("float32")
    for flag in (False, True):
        keras.utils.set_random_seed(1)
        body, images = pointwise(), keras.Input((6, 6, 16))
        model = keras.Model(images, body(images, training=False))
        before = model.get_weights()
        train(fast_layers.faster(model, rounded=flag), values)
        weights.append([after - first for after, first in zip(model.get_weights(), before, strict=True)])
        assert all(weight.dtype == np.float32 for weight in model.get_weights())
    exact, rounded = (np.concatenate([part.ravel() for part in parts]) for parts in weights)
    assert 0 < np.linalg.norm(rounded - exact) < 0.02 * np.linalg.norm(exact)


def test_tensorboard_shows_the_graph():
    suffix = frontier.cut(thawed("efficientnet_lite0")).suffix
    shown = fast_layers.faster(suffix).to_json()
    assert all(layer.name in shown for layer in suffix.layers[1:])


def test_weights_are_backed_up_and_restored(tmp_path):
    first, second = (fast_layers.faster(classify(small())) for _ in range(2))
    train(first, pictures(first) / 255)
    first.save_weights(tmp_path / "it.weights.h5")
    values = pictures(first)
    assert np.abs(np.asarray(first(values)) - second(values)).max() > 1e-4
    second.load_weights(tmp_path / "it.weights.h5")
    np.testing.assert_array_equal(second(values), first(values))
