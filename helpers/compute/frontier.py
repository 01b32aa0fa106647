"""Cut a model at its frozen frontier.

The frontier is the last tensor such that nothing below it changes while the model trains. The part below it, the
prefix, gives the same output for the same image in every epoch, so it runs only once per image. The part above it, the
suffix, shares its layers with the model: training the suffix trains the model.

Where a head reads pooled levels of the backbone, those below the frontier pass beside its tensor: hundreds or thousands
of numbers per image. All of them are packed into one row, so that a cache always holds one array.

    cut = frontier.cut(model)                # after the trainable flags are set
    activations = inference.fast(cut.prefix)(images)
    cut.suffix.compile(...); cut.suffix.fit(activations, labels)
    model.save("model.keras")                # holds what the suffix has learned
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
from keras.src.models.functional import Functional  # Keras exports no type for "a model that is a graph"

from helpers.core import wiring

INERT_WHEN_ZERO = ("rate", "drop_path_rate", "stddev", "_dropout")


@dataclass(frozen=True)
class Cut:
    """A model in two parts: `suffix(prefix(images))` is the model's output in inference.

    Attributes:
        prefix: frozen model, images -> activations; None when nothing is below the frontier.
        suffix: model, activations -> the model's outputs; from the model's own layers. The model itself when
            `prefix` is None.
        layer: name of the layer whose output is the frontier; "" when `prefix` is None.
        shape: shape of one image's activations, without the batch axis; (n,) where levels are packed beside it.
        levels: the number of pooled levels that pass beside the layer's output.
        stopped_by: name of the first layer that stops the frontier, and the reason.
        model: the model that is cut.
    """

    prefix: keras.Model | None
    suffix: keras.Model
    layer: str
    shape: tuple[int, ...]
    stopped_by: str
    model: keras.Model
    levels: int = 0

    @property
    def is_worth_it(self) -> bool:
        """Return whether the prefix does more than scale the images."""
        return self.prefix is not None and self.shape != self.model.input_shape[1:]

    def __str__(self) -> str:
        if self.prefix is None:
            return f"There is no frontier: nothing is below {self.stopped_by}."
        below, above = self.prefix.count_params(), self.suffix.count_params()
        beside = f", with {self.levels} pooled levels beside it" if self.levels else ""
        return (
            f"The frontier is after the layer {self.layer}{beside}. {self.shape} pass through it for each image.\n"
            f"{below:,} weights are below it, {above:,} above. What stops it: {self.stopped_by}."
        )


def cut(model: keras.Model) -> Cut:
    """Cut `model` at its frozen frontier, with its present trainable flags.

    A layer stops the frontier when it has a trainable weight, when it draws random numbers in training (dropout with
    a rate above 0, augmentation), or when it updates statistics (BatchNormalization that is not frozen). When
    the outer model trains, Keras still runs the layers of a sub-model called with `training=False` in training mode, so
    such a call removes none of the three. A rate of 0 makes a dropout inside a frozen backbone inert.

    Args:
        model: a functional or sequential model with one input. Sub-models are searched too.

    Raises:
        ValueError: the model has several inputs, is not a graph of layers, or nothing in it trains.
    """
    graph = graph_of(model)
    if graph is None:
        raise ValueError(
            f"The frontier needs the graph of a functional or sequential model; {model.name!r} is a"
            f" {type(model).__name__} without a graph. Train it without the cache: views: 0."
        )
    if len(graph.inputs) != 1:
        names = ", ".join(tensor.name for tensor in graph.inputs)
        raise ValueError(
            f"A cut needs a model with one input; {model.name!r} has {len(graph.inputs)} ({names}). Train it without"
            " the cache: views: 0."
        )
    if not model.trainable_variables:
        raise ValueError(f"Nothing trains in {model.name!r}: set trainable=True on its head before the cut.")
    path, stopped_by = _find(graph)
    tensors, source = path[-1].tensors, graph.inputs[0]
    if all(step.is_input for step in path):
        return Cut(None, model, "", tuple(source.shape[1:]), stopped_by, model)
    images = keras.Input(batch_shape=source.shape, dtype=source.dtype, name="images")
    below = _below(path, images)
    activations = keras.Input(batch_shape=(None, *below.shape[1:]), dtype=below.dtype, name="activations")
    prefix = keras.Model(images, below, name="prefix")
    suffix = keras.Model(activations, _above(path, activations), name="suffix")
    layer, shape = tensors[0]._keras_history.operation.name, tuple(below.shape[1:])
    return Cut(prefix, suffix, layer, shape, stopped_by, model, len(tensors) - 1)


@dataclass(frozen=True)
class _Step:
    """A frontier in one graph: only `tensors` pass from `nodes[:done]` to `nodes[done:]`, vectors after the first."""

    graph: keras.Model
    nodes: list
    done: int
    tensors: list[keras.KerasTensor]

    @property
    def is_input(self) -> bool:
        return not self.done


def _find(graph: keras.Model) -> tuple[list[_Step], str]:
    """Return the frontier as a path into nested graphs, outermost first, and what stops it."""
    nodes = _early(graph)
    step, stopped_by = _Step(graph, nodes, 0, [graph.inputs[0]]), ""
    for index, (node, live) in enumerate(wiring.live_after(graph, nodes)):
        if reason := why_it_varies(node.operation):
            stopped_by = f"{node.operation.name} ({reason})"
            break
        live = sorted(live, key=wiring.is_vector)  # the map, if there is one, comes first
        by_image = all(tensor.shape[0] is None for tensor in live)  # DINOv3's positions pass beside its tokens
        if by_image and sum(not wiring.is_vector(tensor) for tensor in live) <= 1:
            step = _Step(graph, nodes, index + 1, live)
    path = [step]
    inner = graph_of(nodes[step.done].operation) if step.done < len(nodes) else None
    if inner is not None and _is_sole_use(step, inner):
        below, inner_stop = _find(inner)
        stopped_by = inner_stop
        if not all(part.is_input for part in below):
            path += below
    return path, stopped_by


def _early(graph: keras.Model) -> list:
    """Return the calls in an order where each call that pools a map into a vector comes as early as possible."""
    waiting, ordered = [*wiring.nodes_of(graph)], []
    known_ids = {id(tensor) for tensor in graph.inputs}
    while waiting:
        pools = (node for node in waiting if id(node.input_tensors[0]) in known_ids and _pools(node))
        node = next(pools, waiting[0])
        waiting.remove(node)
        ordered.append(node)
        known_ids |= {id(tensor) for tensor in node.output_tensors}
    return ordered


def _pools(node: Any) -> bool:
    """Return whether a call makes a vector of one map, always in the same way while the model trains."""
    is_small = all(wiring.is_vector(tensor) for tensor in node.output_tensors)
    is_of_map = len(node.input_tensors) == 1 and not wiring.is_vector(node.input_tensors[0])
    return is_small and is_of_map and not why_it_varies(node.operation)


def why_it_varies(operation: Any) -> str:
    """Return why the same input may give another output during training; "" if it cannot."""
    graph = graph_of(operation)
    if graph is not None:
        reasons = ((node.operation, why_it_varies(node.operation)) for node in wiring.nodes_of(graph))
        return next((f"{part.name}: {reason}" for part, reason in reasons if reason), "")
    if not isinstance(operation, keras.layers.Layer):
        return ""  # a bare operation, such as x + y, has no state
    if operation.trainable_variables:
        return "its weights train"
    if any(_draws(layer) for layer in operation._flatten_layers()):
        return "it draws random numbers in training"
    if operation.trainable and operation.weights and "training" in inspect.signature(operation.call).parameters:
        return "it updates its statistics in training; set trainable=False to freeze it"
    return ""


def _draws(layer: keras.layers.Layer) -> bool:
    if not any(isinstance(value, keras.random.SeedGenerator) for value in vars(layer).values()):
        return False
    rates = [getattr(layer, name) for name in INERT_WHEN_ZERO if hasattr(layer, name)]
    return not rates or any(rates)


def graph_of(operation: Any) -> keras.Model | None:
    """Return the graph of a functional or sequential model, None for anything else."""
    if isinstance(operation, keras.Sequential) and operation.built:
        return keras.Model(operation.inputs[0], operation.outputs[0])
    is_plain = isinstance(operation, Functional) and type(operation).call is Functional.call
    return operation if is_plain else None


def _is_sole_use(step: _Step, inner: keras.Model) -> bool:
    """Return whether the next sub-model is the only reader of the frontier and reads nothing else."""
    inputs = step.nodes[step.done].input_tensors
    (tensor, *others) = step.tensors
    reads_it_alone = len(inner.inputs) == 1 and len(inputs) == 1 and inputs[0] is tensor and not others
    return reads_it_alone and wiring.uses_of(step.graph)[id(tensor)] == 1


def _below(path: list[_Step], value: keras.KerasTensor) -> keras.KerasTensor:
    values = [value]
    for step in path:
        if not step.is_input:
            values = keras.Model(step.graph.inputs[0], step.tensors)(*values)
    return _packed(values)


def _above(path: list[_Step], value: keras.KerasTensor) -> Any:
    """Call again, on `value`, everything above the frontier; sub-models stay sub-models."""
    step, *deeper = path
    nodes = step.nodes[step.done :]
    if deeper:
        values, part, nodes = {id(step.tensors[0]): value}, nodes[0], nodes[1:]
        entry = keras.Input(batch_shape=value.shape, dtype=value.dtype)
        rest = keras.Model(entry, _above(deeper, entry), name=part.operation.name)
        _, kwargs = part.arguments.fill_in(values)
        _store(values, part, rest(value, **kwargs))
    else:
        values = dict(zip(map(id, step.tensors), _unpacked(value, step.tensors), strict=True))
    return replay(step.graph, nodes, values)


def _packed(tensors: list[keras.KerasTensor]) -> keras.KerasTensor:
    """Join the tensors of a frontier into one row (batch, n), unless there is only one."""
    if len(tensors) == 1:
        return tensors[0]
    return keras.layers.Concatenate(name="packed")([keras.layers.Flatten()(tensor) for tensor in tensors])


def _unpacked(value: keras.KerasTensor, tensors: list[keras.KerasTensor]) -> list[keras.KerasTensor]:
    """Return the part of a packed row for each of `tensors`."""
    if len(tensors) == 1:
        return [value]
    ends = [math.prod(tensor.shape[1:]) for tensor in tensors]
    parts = keras.ops.split(value, [sum(ends[: place + 1]) for place in range(len(ends) - 1)], axis=-1)
    return [keras.layers.Reshape(tensor.shape[1:])(part) for part, tensor in zip(parts, tensors, strict=True)]


def replay(graph: keras.Model, nodes: list, values: dict[int, Any], call: Callable[..., Any] | None = None) -> Any:
    """Call the operations of `nodes` again, starting from `values` (id of a tensor of `graph` -> new value).

    Args:
        call: called as `call(node, *args, **kwargs)` instead of the node's operation.

    Returns:
        The new values of the graph's outputs, in the graph's own structure.
    """
    for node in nodes:
        args, kwargs = node.arguments.fill_in(values)
        _store(values, node, call(node, *args, **kwargs) if call else node.operation(*args, **kwargs))
    return keras.tree.map_structure(lambda tensor: values[id(tensor)], graph.output)


def _store(values: dict[int, Any], node: Any, outputs: Any) -> None:
    values.update(zip(map(id, node.output_tensors), keras.tree.flatten(outputs), strict=True))
