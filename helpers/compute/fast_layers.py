"""Convolutions that train fast on a CPU.

Keras trains a convolution under a frozen BatchNormalization as the convolution and two more passes over its whole
output. TensorFlow's filter gradient of a large depthwise convolution takes several times as long as the convolution.
Keras uses float32 also on a processor that is fast in bfloat16. `faster` computes the same layers in another way, and
so trains the model itself.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from helpers.compute import inference

KNOWN = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
LEAST_DEPTHWISE = 5  # side of the smallest depthwise kernel where `_depthwise` is faster than TensorFlow's own gradient


def faster(model: keras.Model, *, rounded: bool = False) -> keras.Model:
    """Return a model that computes the same as `model`, with the same weights, and trains faster on a CPU.

    Frozen BatchNormalization is folded into the convolution below it, which still trains. Every other layer is
    the model's own.

    Args:
        model: a functional or sequential model whose trainable flags are set; any other is returned unchanged.
        rounded: in training, round the factors of convolutions with a kernel of one pixel to bfloat16, in gradients
            too. Sums and weights stay float32, and prediction and validation round nothing.
    """
    if inference.frontier.graph_of(model) is None:
        return model

    def join(layer: Any, norm: keras.layers.BatchNormalization | None) -> Any:
        return Convolution(layer, norm, rounded=rounded) if _is_known(layer) else layer

    return inference.rewrite(
        model, join, name="faster", folds=lambda layer, norm: _is_known(layer) and not norm.trainable
    )


def _is_known(layer: Any) -> bool:
    is_plain = type(layer) in KNOWN and layer.data_format == "channels_last" and layer.compute_dtype == "float32"
    return is_plain and getattr(layer, "groups", 1) == 1 and {*layer.dilation_rate} == {1}


class Convolution(keras.layers.Layer):
    """A Conv2D or DepthwiseConv2D, with the frozen BatchNormalization above it, if any, computed in one step."""

    def __init__(self, layer: keras.layers.Layer, norm: keras.layers.BatchNormalization | None, *, rounded: bool):
        super().__init__(name=f"{layer.name}_faster")
        self.layer, self.norm, self.rounded = layer, norm, rounded
        self.multiply = _way(layer)
        if norm is not None:
            scale, self.shift = (np.asarray(part, "float32") for part in inference.scale_and_shift(norm))
            self.scale = scale[:, None] if isinstance(layer, keras.layers.DepthwiseConv2D) else scale
        self.built = True

    def get_config(self) -> dict[str, Any]:
        """Return the settings for TensorBoard; the layer is never saved, only the model's own layers are."""
        parts = {"layer": self.layer, "norm": self.norm}
        parts = {name: part and keras.saving.serialize_keras_object(part) for name, part in parts.items()}
        return super().get_config() | parts | {"rounded": self.rounded}

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return self.layer.compute_output_shape(input_shape)

    def call(self, images: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        kernel, bias = tf.convert_to_tensor(self.layer.kernel), self.layer.bias
        if self.norm is not None:
            kernel = kernel * self.scale
            bias = self.shift if bias is None else bias * self.scale + self.shift
        outputs = self.multiply(images, kernel, bool(self.rounded and training))
        return self.layer.activation(outputs if bias is None else outputs + bias)


def _way(layer: keras.layers.Layer) -> Callable[[tf.Tensor, tf.Tensor, bool], tf.Tensor]:
    """Return the fastest function (images, kernel, rounded) -> outputs for a layer, without its bias."""
    is_depthwise, padding = isinstance(layer, keras.layers.DepthwiseConv2D), layer.padding
    sides, strides = {*layer.kernel_size}, {*layer.strides}
    if not is_depthwise and sides == {1} and len(strides) == 1:
        return lambda images, kernel, rounded: _pointwise(images, kernel, *strides, rounded)
    is_large = len(sides) == 1 and min(sides) >= LEAST_DEPTHWISE and min(sides) % 2
    if is_depthwise and is_large and strides == {1} and padding == "same" and layer.depth_multiplier == 1:
        return lambda images, kernel, rounded: _depthwise(images, kernel)
    compute = keras.ops.depthwise_conv if is_depthwise else keras.ops.conv
    return lambda images, kernel, rounded: compute(images, kernel, layer.strides, padding)


def _pointwise(images: tf.Tensor, kernel: tf.Tensor, stride: int, rounded: bool) -> tf.Tensor:
    """Return a convolution with a kernel of one pixel, as a product of two matrices."""
    images = images[:, ::stride, ::stride]
    rows, matrix = tf.reshape(images, (-1, images.shape[-1])), kernel[0, 0]
    if rounded:
        rows, matrix = tf.cast(rows, tf.bfloat16), tf.cast(matrix, tf.bfloat16)
    outputs = tf.cast(tf.matmul(rows, matrix), tf.float32)
    return tf.reshape(outputs, tf.concat([tf.shape(images)[:-1], tf.shape(matrix)[1:]], 0))


@tf.custom_gradient
def _depthwise(images: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """Return a depthwise convolution, stride 1 and padding "same", whose gradients are depthwise convolutions too.

    The filter gradient of one image is the padded image, convolved with the gradient of the outputs as kernel.
    """
    one, edge = [1, 1, 1, 1], kernel.shape[0] // 2

    def gradient(above: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        def of_image(pair: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
            image, above = pair
            return tf.nn.depthwise_conv2d(image[None], above[..., None], one, "VALID")[0]

        padded = tf.pad(images, [[0, 0], [edge, edge], [edge, edge], [0, 0]])
        by_image = tf.map_fn(of_image, (padded, above), fn_output_signature=images.dtype)
        flipped = kernel[::-1, ::-1]
        return tf.nn.depthwise_conv2d(above, flipped, one, "SAME"), tf.reduce_sum(by_image, 0)[..., None]

    return tf.nn.depthwise_conv2d(images, kernel, one, "SAME"), gradient
