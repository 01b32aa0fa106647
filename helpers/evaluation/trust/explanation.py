"""What does the model look at? A map of each image that shows how much each place supports the predicted class.

A map is the feature map of the backbone times the gradient of the class's score, summed over channels (HiResCAM,
Draelos and Carin, 2020). If the head is a layer on means of the map, it is the class activation map (Zhou et al.,
2016), to the last digit, and that of Grad-CAM (Selvaraju et al., 2017); if the head has hidden layers, reads maxima
or deviations, it still sums to what the map adds to the score, which Grad-CAM does not. Only the layers above the maps
are differentiated, so it costs little more than a prediction.
"""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from helpers.compute import frontier
from helpers.core import wiring
from helpers.evaluation.trust import novelty

BATCH = 16


def heat(model: keras.Model, images: np.ndarray, classes: Iterable[int] | None = None) -> np.ndarray:
    """Return for each image how much each pixel supports a class, against the mean of the other classes.

    Args:
        model: a classifier of Thaw, as trained, loaded, mirrored or calibrated; mirrored images do not count.
        images: (n, H, W, 3), RGB 0-255.
        classes: a class for each image; the predicted one by default.

    Returns:
        float32 (n, H, W); positive where the place supports the class. The maps of several levels are added up.
    """
    parts = _Parts(novelty.base_of(model))
    rows = [None] * len(images) if classes is None else list(classes)
    maps = [parts.heat(images[at : at + BATCH], rows[at : at + BATCH]) for at in range(0, len(images), BATCH)]
    return np.concatenate(maps) if maps else np.zeros((0, *model.input_shape[1:3]), np.float32)


class _Parts:
    """A classifier in two: images -> the maps that its head reads, and maps -> the input of its last layer."""

    def __init__(self, base: keras.Model):
        nodes, last = [*wiring.nodes_of(base)], base.get_layer(novelty.LAST)
        place = next(number for number, node in enumerate(nodes) if frontier.graph_of(node.operation) is not None)
        graph = frontier.graph_of(nodes[place].operation)
        pooling = [node for node in wiring.nodes_of(graph) if node.operation.name.startswith(wiring.LEVEL)]
        read = [tensor for node in pooling for tensor in node.input_tensors if not wiring.is_vector(tensor)]
        maps = [*{id(tensor): tensor for tensor in read}.values()] or [graph.output]
        self.below = keras.Model(graph.inputs[0], maps)
        inputs = [keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype) for tensor in maps]
        values = dict(zip(map(id, maps), inputs, strict=True))
        features = frontier.replay(graph, pooling, values) if read else inputs[0]
        head = keras.Model(base.input, last.input)
        values = {id(nodes[place].output_tensors[0]): features}
        self.above = keras.Model(inputs, frontier.replay(head, [*wiring.nodes_of(head)][place + 1 :], values))
        self.kernel, self.bias = (np.asarray(weight, np.float32) for weight in last.get_weights())
        self.size = base.input_shape[1:3]

    def heat(self, images: np.ndarray, classes: list[int | None]) -> np.ndarray:
        """Return the maps of one batch, float32 (n, H, W)."""
        maps = self.below(np.asarray(images, np.float32), training=False)
        maps = list(maps) if isinstance(maps, list | tuple) else [maps]
        features = keras.ops.cast(self.above(maps, training=False), "float32")
        logits = keras.ops.convert_to_numpy(features) @ self.kernel + self.bias
        rows = [own if own is not None else int(best) for own, best in zip(classes, logits.argmax(axis=1), strict=True)]
        chosen = np.eye(logits.shape[1], dtype=np.float32)[rows]
        towards = self.kernel @ (chosen - (1 - chosen) / (logits.shape[1] - 1)).T

        def score(parts: list) -> Any:
            features = keras.ops.cast(self.above(parts, training=False), "float32")
            return keras.ops.sum(features * towards.T)

        total = tf.zeros((len(images), *self.size))
        for part, gradient in zip(maps, _gradients(score, maps), strict=True):
            part, gradient = (tf.cast(keras.ops.convert_to_numpy(one), tf.float32) for one in (part, gradient))
            each = _in_place(tf.reduce_sum(part * gradient, axis=-1))
            # Resizing must not change what a map adds to the score, or small maps would count more than large ones.
            share = each.shape[1] * each.shape[2] / (self.size[0] * self.size[1])
            total += share * tf.image.resize(each, self.size, method="bilinear")[..., 0]
        return total.numpy()


def _gradients(score: Callable[[list], Any], maps: list) -> list:
    """Return the gradient of a number for each of the tensors that it is computed from."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.grad(score)(maps)
    with tf.GradientTape() as tape:
        tape.watch(maps)
        value = score(maps)
    return tape.gradient(value, maps)


def _in_place(each: tf.Tensor) -> tf.Tensor:
    """Return (n, h, w, 1) of (n, h, w), or of the tokens (n, t) of a transformer that are places."""
    if len(each.shape) == 2:
        side = int(each.shape[1] ** 0.5)
        each = tf.reshape(each[:, each.shape[1] - side * side :], (-1, side, side))
    return each[..., None]
