"""Levels: the outputs of a backbone that a head reads. The ends of its blocks, and "top", the last feature map.

Low levels detect textures and edges, high levels objects. For images unlike ImageNet's (X-rays, solar cells), several
levels together often classify better (Head2Toe, Evci et al., ICML 2022).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import keras

from helpers.core import wiring, words
from helpers.models import unfreezing

Pool = Literal["mean", "mean_max", "mean_std", "class", "class_mean"]
MOST = 12  # up to this many block ends, all are read; of more, the last of each resolution, or every second one ...
EPSILON = 1e-5  # under the root: without it, the gradient is not a number where a map is flat


def read(backbone: keras.Model, levels: str | Sequence[str], pool: Pool) -> keras.Model:
    """Return the backbone with pooled levels as its output, instead of the last feature map.

    Args:
        backbone: from `backbones.build`; its layers are shared.
        levels: "all", or names from `names`.
        pool: the statistics of each channel, see `pooled`.

    Returns:
        keras.Model named "backbone": images -> (batch, n), the levels from low to high. The added layers have no
        weights and names ``level_...``.

    Raises:
        ValueError: an unknown level or pool.
    """
    ends = _ends(backbone)
    chosen = [*ends] if levels == "all" else check(levels, ends)
    first = prefix_tokens(backbone)
    vectors = [pooled(ends[name], pool, wiring.LEVEL + name, first) for name in ends if name in chosen]
    joined = keras.layers.Concatenate(name=wiring.LEVEL + "features")(vectors) if vectors[1:] else vectors[0]
    return keras.Model(backbone.input, joined, name="backbone")


def names(backbone: keras.Model) -> list[str]:
    """Return the levels that a head can read, from low to high: names of blocks, and "top"."""
    return [*_ends(backbone)]


def check(levels: Any, known_names: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Return the names in `levels`, each once.

    Raises:
        ValueError: `levels` is not a list of known names.
    """
    level_names = [levels] if isinstance(levels, str) else levels
    if not isinstance(level_names, Sequence) or not level_names:
        raise ValueError(f"levels must be top, all, auto, or a list of names; got {levels!r}.")
    for name in level_names:
        if name not in known_names:
            hint = words.near(str(name), [*known_names])
            raise ValueError(
                f"The backbone has no level {name!r}.{hint} Its levels: {', '.join(known_names)}; or all, auto."
            )
    return [*dict.fromkeys(level_names)]


def prefix_tokens(backbone: keras.Model) -> int:
    """Return how many tokens of a backbone come before those of the image's patches; 0 for a feature map."""
    return getattr(backbone, "prefix_tokens", 0)


def pooled(features: Any, pool: Pool, name: str, first: int = 0) -> Any:
    """Return (batch, channels), or twice as many numbers, from a map (batch, h, w, channels) or from tokens.

    Args:
        features: the map, or tokens (batch, tokens, channels).
        pool: the mean of each channel; or also its maximum, or its standard deviation, as sqrt(variance + 1e-5). For
            tokens, only the patches count. "class" is the class token, "class_mean" that and the mean.
        name: of the new layer.
        first: the number of tokens before those of the patches; the class token is the first.

    Raises:
        ValueError: an unknown pool, or "class" where there is no class token.
    """
    if pool not in get_args(Pool):
        raise ValueError(f"pool is {pool!r}; choose one of {', '.join(get_args(Pool))}.")
    if pool.startswith("class") and not first:
        raise ValueError(f"pool is {pool!r}, but this backbone has no class token; take mean, mean_max or mean_std.")
    are_tokens = len(features.shape) == 3
    if pool == "mean" and not first:
        kind = keras.layers.GlobalAveragePooling1D if are_tokens else keras.layers.GlobalAveragePooling2D
        return kind(name=name)(features)
    exact = {"dtype": "float32"}  # half precision cannot hold the squares
    inputs = keras.Input(features.shape[1:], **exact)
    parts = []
    if pool.startswith("class"):
        one = keras.layers.Cropping1D((0, features.shape[1] - 1), name="class", **exact)(inputs)
        parts.append(keras.layers.Flatten(name="class_vector", **exact)(one))
    if pool != "class":
        patches = keras.layers.Cropping1D((first, 0), name="patches", **exact)(inputs) if first else inputs
        parts += _statistics(patches, pool)
    both = keras.layers.Concatenate(name="both", **exact)(parts) if parts[1:] else parts[0]
    return keras.Model(inputs, both, name=name)(features)


def _statistics(values: Any, pool: Pool) -> list[Any]:
    exact, where = {"dtype": "float32"}, "1D" if len(values.shape) == 3 else "2D"
    average = getattr(keras.layers, f"GlobalAveragePooling{where}")
    mean = average(name="mean", **exact)(values)
    if pool == "mean_max":
        return [mean, getattr(keras.layers, f"GlobalMaxPooling{where}")(name="max", **exact)(values)]
    if pool != "mean_std":
        return [mean]
    ones = (1,) * (len(values.shape) - 2)
    centre = keras.layers.Reshape((*ones, values.shape[-1]), name="centre", **exact)(mean)
    apart = keras.layers.Subtract(name="apart", **exact)([values, centre])
    squares = keras.layers.Multiply(name="squares", **exact)([apart, apart])
    variance = average(name="variance", **exact)(squares)
    return [mean, keras.ops.sqrt(variance + EPSILON)]


def _ends(backbone: keras.Model) -> dict[str, Any]:
    """Map each level to its feature map or tokens.

    A block ends with the last map through which everything passes before the next block begins; a zero padding does not
    count.
    """
    block, ends = "", {}
    for node, live in wiring.live_after(backbone, wiring.nodes_of(backbone)):
        block = unfreezing.block_of(node.operation, within=block)
        is_framed = isinstance(node.operation, keras.layers.ZeroPadding2D)
        if block and len(live) == 1 and len(live[0].shape) in (3, 4) and not is_framed:
            ends[block] = live[0]
    top = backbone.output
    ends = {name: value for name, value in ends.items() if value is not top}
    if len(ends) > MOST and len(top.shape) == 3:  # all blocks of a transformer have one size
        kept = [*ends][:: -math.ceil(len(ends) / MOST)]
        ends = {name: value for name, value in ends.items() if name in kept}
    if len(ends) > MOST:
        sizes = {name: tuple(value.shape[1:3]) for name, value in ends.items()}
        last = {size: name for name, size in sizes.items() if size != tuple(top.shape[1:3])}
        ends = {name: value for name, value in ends.items() if name in last.values()}
    return ends | {"top": top}
