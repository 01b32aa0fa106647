"""How the operations of a Keras graph are connected. Nothing here loads Keras: the caller passes the graph.

A graph is a functional model, a node one call of one of its operations.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

LEVEL = "level_"  # prefix of the layers that pool a level for the head; they are not the backbone's own


def nodes_of(graph: Any) -> Iterator[Any]:
    """Yield the calls of a graph, each after the calls that it needs."""
    by_depth = graph._nodes_by_depth
    for depth in sorted(by_depth, reverse=True):
        yield from (node for node in by_depth[depth] if not node.is_input)


def uses_of(graph: Any) -> Counter:
    """Count how often each tensor of a graph is read; an output counts once more, as the caller reads it."""
    read = [tensor for node in nodes_of(graph) for tensor in node.input_tensors]
    return Counter(id(tensor) for tensor in (*read, *graph.outputs))


def live_after(graph: Any, nodes: Iterable[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Yield each call and the tensors that later calls still read: all that passes from the calls so far to the rest.

    Every call is on a path from the input to an output, so every path passes through a single live tensor.

    Args:
        graph: with one input.
        nodes: its calls, each after the calls that it needs.
    """
    uses, live = uses_of(graph), {id(graph.inputs[0]): graph.inputs[0]}
    for node in nodes:
        uses.subtract(id(tensor) for tensor in node.input_tensors)
        live |= {id(tensor): tensor for tensor in node.output_tensors}
        live = {key: tensor for key, tensor in live.items() if uses[key]}
        yield node, [*live.values()]


def is_vector(tensor: Any) -> bool:
    """Return whether a tensor holds one row of numbers per image, (batch, n) or (batch,), and so is small."""
    return len(tensor.shape) <= 2
