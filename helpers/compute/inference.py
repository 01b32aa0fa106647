"""Run a frozen model as fast as the machine allows.

Keras computes a frozen BatchNormalization as a multiplication and an addition over the whole activation. `fold` moves
both into the convolution below it, whose weights are constants here, and `fast` compiles the result. `rewrite` replaces
the convolutions of a graph by other layers; `fast_layers` does the same for layers that train.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from helpers.compute import frontier, hardware
from helpers.core import wiring

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D, keras.layers.Dense)
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
ROUNDED = "mixed_bfloat16"
LARGEST = 400_000_000  # weights; TensorFlow cannot hold a graph with 2 GB of constants
LEAST_GAIN = 0.1  # in images/s, to justify the memory of twice the images at a time
TRIES = 3
COLOURS = 3
UNUSED = ("regularizer", "constraint", "initializer")  # settings without effect on existing weights


def fast(model: keras.Model, *, rounded: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that computes `model` in inference, as fast as the machine allows.

    On a CPU with TensorFlow, BatchNormalization is folded and the graph is frozen to constants, so that TensorFlow
    fuses convolution, bias and activation; never XLA, which is many times slower there. With JAX it is folded too, and
    compiled for the first device of this process, also where several train together. Elsewhere it is Keras's own
    compiled prediction. The function keeps the weights that the model has now.

    Args:
        model: a functional or sequential model with one input and one output.
        rounded: compute in bfloat16 where the graph is frozen, except the first layers: at least 1.5 times as fast on
            a CPU with instructions for it, with an error of a few per cent of a layer's output.

    Returns:
        A function, images (n, *input shape) of any number type -> outputs (n, *output shape), float32 or the model's
        own output type.
    """
    if keras.backend.backend() == "jax":
        return _compiled(fold(model))
    if hardware.on_cpu() and model.count_params() < LARGEST:
        folded = fold(model)
        return _frozen(_rounded(folded) if rounded else folded)
    return model.predict_on_batch


def quickest_batch(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> int:
    """Return the fastest number of images at a time for `run`, by trials with 1, 2, 4 or 8 times `images`.

    On a CPU it is the number of `images`, without a trial: more were not faster, and another number changes the last
    digits, so a measurement would make runs differ.

    Args:
        run: from `fast`.
        images: (n, *input shape).
    """
    best, size = 0.0, len(images)
    for times in (1, 2, 4, 8) if not hardware.on_cpu() else ():
        try:
            rate = _rate(run, np.concatenate([images] * times))
        except Exception as error:
            if not hardware.is_out_of_memory(error):
                raise
            break
        if rate < (1 + LEAST_GAIN) * best:
            break
        best, size = rate, times * len(images)
    return size


def _rate(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> float:
    run(images)  # compiles
    begin = time.perf_counter()
    for _ in range(TRIES):
        run(images)
    return TRIES * len(images) / (time.perf_counter() - begin)


def fold(model: keras.Model) -> keras.Model:
    """Return a copy of `model`, for inference only, with each BatchNormalization that follows a convolution folded in.

    Layers that are not folded are shared with `model`; folded convolutions are new. A BatchNormalization stays where
    the tensor below it has another reader or no convolution, or where the convolution has an activation.
    """
    return rewrite(model, lambda layer, norm: layer if norm is None else _merged(layer, norm), name="folded")


def rewrite(
    model: keras.Model,
    join: Callable[[Any, Any], Any],
    *,
    name: str,
    folds: Callable[[Any, Any], bool] = lambda layer, norm: True,
) -> keras.Model:
    """Return a copy of a model's graph, sub-models included, with other layers.

    Args:
        model: a functional or sequential model.
        join: called as `join(operation, norm)`: returns the replacement of an operation and of the BatchNormalization
            that follows it; `norm` is None where none follows that can be folded.
        name: suffix of the names of the models.
        folds: called as `folds(layer, norm)`: whether this BatchNormalization may be folded into this convolution.
    """
    graph = frontier.graph_of(model)
    nodes, joined = list(wiring.nodes_of(graph)), {}
    pairs = _pairs(graph, nodes, folds)
    norms = {id(norm) for norm in pairs.values()}

    def call(node: Any, *args: Any, **kwargs: Any) -> Any:
        if id(node) in norms:
            return args[0]
        layer, norm = node.operation, pairs[id(node)].operation if id(node) in pairs else None
        key = id(layer), id(norm)  # a layer that is called several times is made once
        if key not in joined:
            is_model = frontier.graph_of(layer) is not None
            joined[key] = rewrite(layer, join, name=name, folds=folds) if is_model else join(layer, norm)
        return joined[key](*args, **kwargs)

    inputs = [keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype) for tensor in graph.inputs]
    values = {id(old): new for old, new in zip(graph.inputs, inputs, strict=True)}
    inputs = keras.tree.pack_sequence_as(graph.input, inputs)
    return keras.Model(inputs, frontier.replay(graph, nodes, values, call), name=f"{model.name}_{name}")


def _pairs(graph: keras.Model, nodes: list, folds: Callable[[Any, Any], bool]) -> dict[int, Any]:
    """Map the id of each convolution's call to the call of the BatchNormalization that folds into it."""
    uses = wiring.uses_of(graph)
    makers = {id(tensor): node for node in nodes for tensor in node.output_tensors}
    pairs = {}
    for node in nodes:
        norm, source = node.operation, makers.get(id(node.input_tensors[0]))
        if source is None or not isinstance(norm, keras.layers.BatchNormalization):
            continue
        is_sole_reader = uses[id(node.input_tensors[0])] == 1
        if is_sole_reader and _takes(source.operation, norm) and folds(source.operation, norm):
            pairs[id(source)] = node
    return pairs


def _takes(layer: Any, norm: keras.layers.BatchNormalization) -> bool:
    if type(layer) not in CONVOLUTIONS + DEPTHWISE or layer.activation is not keras.activations.linear:
        return False
    channels_last = getattr(layer, "data_format", "channels_last") == "channels_last"
    return channels_last and norm.axis in (-1, len(layer.output.shape) - 1)


def _merged(layer: keras.layers.Layer, norm: keras.layers.BatchNormalization) -> keras.layers.Layer:
    """Return a copy of a convolution that includes `norm` as in inference."""
    kept = {key: value for key, value in layer.get_config().items() if not key.endswith(UNUSED)}
    first = "depthwise_initializer" if isinstance(layer, DEPTHWISE) else "kernel_initializer"
    config = kept | {"use_bias": True, first: "zeros", "name": f"{layer.name}_{norm.name}"}
    merged = type(layer).from_config(config)
    merged.build(layer.input.shape)
    scale, shift = scale_and_shift(norm)
    kernel, *bias = layer.get_weights()
    # A depthwise kernel is (..., channels, multiplier), and channel c with multiplier m is output c * multipliers + m.
    by_channel = scale.reshape(kernel.shape[-2:]) if isinstance(layer, DEPTHWISE) else scale
    merged.set_weights([kernel * by_channel, shift + (bias[0] * scale if bias else 0)])
    return merged


def scale_and_shift(norm: keras.layers.BatchNormalization) -> tuple[np.ndarray, np.ndarray]:
    """Return the factor and the shift of inference, one per channel, computed in float64."""
    mean, variance = (np.asarray(part, "float64") for part in (norm.moving_mean, norm.moving_variance))
    scale = 1 / np.sqrt(variance + norm.epsilon)
    scale = scale * (np.asarray(norm.gamma, "float64") if norm.scale else 1)
    return scale, (np.asarray(norm.beta, "float64") if norm.center else 0) - mean * scale


def _frozen(model: keras.Model) -> Callable[[np.ndarray], np.ndarray]:
    dtype = model.inputs[0].dtype
    state = model.trainable_variables, model.non_trainable_variables
    trainable, rest = ([np.asarray(variable) for variable in variables] for variables in state)

    @tf.function(input_signature=[tf.TensorSpec(model.inputs[0].shape, dtype)], autograph=False, jit_compile=False)
    def predict(images: tf.Tensor) -> tf.Tensor:
        # Constants of the graph, since TensorFlow fuses only layers with constant weights; one of each, also if a
        # sub-model is called several times.
        constants = ([tf.constant(value) for value in values] for values in (trainable, rest))
        return model.stateless_call(*constants, images, training=False)[0]

    output_type = model.outputs[0].dtype
    array_type = "float32" if output_type == "bfloat16" else output_type  # NumPy has no bfloat16
    return lambda images: tf.cast(predict(tf.cast(images, dtype)), array_type).numpy()


def _rounded(model: keras.Model) -> keras.Model:
    """Return the model in bfloat16 except the layers as wide as half the image or more, where errors are largest.

    On EfficientNet-Lite0 and solar cells they cost a sixth of the speed, and the error is 3 % instead of 7 %. Layers
    that pool a map stay exact too: it costs nothing.
    """
    is_of_images = model.input_shape[-1] == COLOURS
    side = model.input_shape[1] / 2 if is_of_images else math.inf
    return hardware.in_precision(model, ROUNDED, of=("float32",), keep=_to_keep(model, side))


def _to_keep(model: keras.Model, side: float) -> set[str]:
    """Return the names of the layers that give images or activations of at least `side` pixels, or pool them."""
    names = set()
    for node in wiring.nodes_of(frontier.graph_of(model)):
        output = node.output_tensors[0]
        graph, is_wide = frontier.graph_of(node.operation), len(output.shape) == 4 and output.shape[1] >= side
        if graph is not None and graph.weights:
            names |= _to_keep(graph, side)
        elif is_wide or wiring.is_vector(output):
            names.add(node.operation.name)
    return names


def _compiled(model: keras.Model) -> Callable[[np.ndarray], np.ndarray]:
    import jax

    dtype = model.inputs[0].dtype
    state = model.trainable_variables, model.non_trainable_variables
    trainable, rest = ([jax.numpy.asarray(np.asarray(variable)) for variable in variables] for variables in state)

    @jax.jit
    def predict(trainable: list, rest: list, images: Any) -> Any:
        return model.stateless_call(trainable, rest, images, training=False)[0]

    return lambda images: np.asarray(predict(trainable, rest, np.asarray(images, dtype)))
