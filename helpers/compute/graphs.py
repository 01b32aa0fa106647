"""A hash of what a model computes: the same for the same graph, settings and weights, with any names."""

import hashlib
import json
from typing import Any

import keras
import numpy as np

from helpers.compute import frontier
from helpers.core import wiring

UNIMPORTANT = {"name", "trainable", "build_config"}  # settings of a layer that do not change what it computes


def signature(model: keras.Model) -> str:
    """Return a hash of what a model computes: its graph, the settings of its layers and its weights, but no names."""
    graph = json.dumps(structure(model), sort_keys=True).encode()
    return digest(graph, *(np.ascontiguousarray(value) for value in model.get_weights()))


def structure(operation: Any) -> Any:
    """Return the kinds, settings and wiring of an operation as JSON values, without names and trainable flags."""
    if isinstance(operation, keras.Sequential):  # it may not be built yet
        return [structure(layer) for layer in operation.layers]
    graph = frontier.graph_of(operation)
    if graph is None:
        is_layer = isinstance(operation, keras.layers.Layer)
        public = {name: value for name, value in vars(operation).items() if not name.startswith("_")}
        config = operation.get_config() if is_layer else public  # the rest counts its calls
        return [type(operation).__name__, getattr(operation, "compute_dtype", None), _plain(config)]
    places = {id(tensor): [-1, index] for index, tensor in enumerate(graph.inputs)}
    calls = []
    for index, node in enumerate(wiring.nodes_of(graph)):
        call = [structure(node.operation), [places[id(tensor)] for tensor in node.input_tensors]]
        calls.append(call + _constants(node))
        places |= {id(tensor): [index, at] for at, tensor in enumerate(node.output_tensors)}
    return [calls, [places[id(tensor)] for tensor in graph.outputs]]


def _constants(node: Any) -> list:
    """Return the constants in the call of a bare operation, such as x + 1e-5; a layer has them in its settings."""
    if isinstance(node.operation, keras.layers.Layer):
        return []
    arguments = keras.tree.flatten([node.arguments.args, node.arguments.kwargs])
    return [[_plain(value) for value in arguments if not isinstance(value, keras.KerasTensor)]]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items() if key not in UNIMPORTANT}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


def digest(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(len(part) if isinstance(part, bytes) else part.shape).encode() + b":")
        digest.update(part)
    return digest.hexdigest()
