"""Classifiers on a frozen backbone, and thawing: which of their weights train.

A classifier is input -> sub-model "backbone" (called with training=False) -> head: ``head_pool``, ``head_dropout``,
optional dense layers, ``probabilities``. `unfreeze` says what of the backbone trains; the head always does.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import pandas as pd

from helpers.models import backbones

DENSE_DEFAULTS = {"activation": "relu", "dropout": 0.0, "batch_norm": False, "l1": 0.0, "l2": 0.0}
OUTPUT_DEFAULTS = {"batch_norm": False, "l1": 0.0, "l2": 0.0}
SHOWN_BLOCKS = 20  # of those, a message lists the last: NASNet has some seventy


def classifier(
    backbone: str,
    n_classes: int,
    *,
    image_size: int | tuple[int, int],
    weights: str = "imagenet",
    dropout: float = 0.2,
    batch_norm: bool = False,
    dense: Sequence[int | dict] = (),
    l1: float = 0.0,
    l2: float = 0.0,
) -> keras.Model:
    """Builds a classifier on a frozen backbone.

    Args:
        backbone: a name of `backbones.names()` or ``hub:<preset>``.
        n_classes: number of classes, at least 2.
        image_size: pixels; an int for squares, else (height, width).
        weights: of the backbone: "imagenet", "none" or a file.
        dropout: share of the pooled features dropped in training, 0 to below 1.
        batch_norm: BatchNormalization after that dropout.
        dense: hidden layers, each a number of units or a dict of ``units`` and any of ``activation`` ("relu"),
            ``dropout`` (0), ``batch_norm`` (False), ``l1``, ``l2`` (0); dense, dropout, BatchNormalization follow
            one another in this order.
        l1: lasso penalty on the kernel of the last layer.
        l2: ridge penalty on the kernel of the last layer.

    Returns:
        keras.Model: (batch, height, width, 3), float32 or uint8 RGB 0-255 -> float32 probabilities (batch, n_classes).

    Raises:
        ValueError: a value out of its range, an unknown backbone or an unknown key in `dense`.

    Example:
        >>> classifier("resnet50", 196, image_size=224, batch_norm=True,
        ...            dense=[{"units": 1024, "dropout": 0.5, "batch_norm": True}, 512])
    """
    _whole(n_classes, 2, 10**6, "n_classes")
    hidden = check_dense(dense)
    body = backbones.build(backbone, image_size, weights)
    body.trainable = False
    for part in _parts(body):
        if isinstance(part, keras.layers.Dropout):  # stochastic depth: `fit` would draw it despite training=False
            part.rate = 0.0
    inputs = keras.Input(body.input_shape[1:], name="image")
    x = keras.layers.GlobalAveragePooling2D(name="head_pool")(body(inputs, training=False))
    x = _regularised(x, "", dropout, batch_norm)
    for number, layer in enumerate(hidden, start=1):
        x = _hidden(x, f"_{number}", layer)
    outputs = keras.layers.Dense(
        n_classes, activation="softmax", kernel_regularizer=_penalty(l1, l2), dtype="float32", name="probabilities"
    )(x)
    return keras.Model(inputs, outputs, name="classifier")


def check_dense(dense: Sequence[int | dict]) -> list[dict]:
    """Returns the hidden layers of `classifier` with everything written out.

    Raises:
        ValueError: an unknown key or activation, or a value out of its range.
    """
    return [_dense_spec(entry) for entry in dense]


def _dense_spec(entry: int | dict) -> dict:
    given = dict(entry) if isinstance(entry, dict) else {"units": entry}
    unknown = given.keys() - {"units", *DENSE_DEFAULTS}
    if unknown:
        raise ValueError(f"A dense layer has no {sorted(unknown)}; it takes units, {', '.join(DENSE_DEFAULTS)}.")
    _whole(given.get("units"), 1, 10**6, "units of a dense layer")
    spec = DENSE_DEFAULTS | given
    try:
        keras.activations.get(spec["activation"])
    except (TypeError, ValueError):
        raise ValueError(f"A dense layer's activation is one of Keras, such as relu; got {given!r}.") from None
    _check_head(spec, "a dense layer")
    _share_dropped(spec["dropout"])
    return spec


def output_settings(output: Mapping[str, Any]) -> dict:
    """Returns what 03's parameter `output` means as arguments of `classifier`: batch_norm, l1 and l2.

    Args:
        output: any of ``batch_norm``, of the pooled features, and ``l1`` and ``l2``, of the last layer.

    Raises:
        ValueError: an unknown key, or a value out of its range.
    """
    unknown = [key for key in output if key not in OUTPUT_DEFAULTS]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), OUTPUT_DEFAULTS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"output has no {unknown[0]!r}.{hint} It takes {', '.join(OUTPUT_DEFAULTS)}.")
    return _check_head(OUTPUT_DEFAULTS | dict(output), "output")


def _check_head(spec: dict, what: str) -> dict:
    for name in ("l1", "l2"):
        if isinstance(spec[name], bool) or not isinstance(spec[name], int | float) or spec[name] < 0:
            raise ValueError(f"{name} of {what} is a number of at least 0; got {spec[name]!r}.")
    if not isinstance(spec["batch_norm"], bool):
        raise ValueError(f"batch_norm of {what} is true or false; got {spec['batch_norm']!r}.")
    return spec


def _hidden(x, suffix: str, layer: dict):
    penalty = _penalty(layer["l1"], layer["l2"])
    name = "head_dense" + suffix
    x = keras.layers.Dense(layer["units"], activation=layer["activation"], kernel_regularizer=penalty, name=name)(x)
    return _regularised(x, suffix, layer["dropout"], layer["batch_norm"])


def _regularised(x, suffix: str, dropout: float, batch_norm: bool):
    _share_dropped(dropout)
    if dropout:
        x = keras.layers.Dropout(dropout, name="head_dropout" + suffix)(x)
    return keras.layers.BatchNormalization(name="head_norm" + suffix)(x) if batch_norm else x


def _share_dropped(dropout: float) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout is a share in [0, 1); got {dropout!r}.")


def _penalty(l1: float, l2: float):
    return keras.regularizers.L1L2(l1, l2) if l1 or l2 else None


def unfreeze(model: keras.Model, what: str | int | float | dict) -> pd.DataFrame:
    """Says which layers of the backbone train. Compile afterwards: a compiled model does not notice.

    BatchNormalization layers of the backbone stay frozen, so that their moving statistics stay what they are.
    The head is not touched.

    Args:
        model: a model with a sub-model "backbone", or a backbone.
        what: "none"; "all"; a block or layer name ("block7", "conv5", "block14_sepconv1"): from its first layer to
            the backbone's end; an int: that many last layers; a float in (0, 1]: the shortest tail of layers that
            holds this share of the backbone's weights (1 is one layer, 1.0 is all);
            {"from_index": n}: from the n-th layer on, in keras.applications' own numbering (the input is 0).

    Returns:
        The table of `trainable_table`.

    Raises:
        ValueError: an unknown name (close ones and the blocks are listed), a number out of range, or a choice under
            which no weight of the backbone would train.
    """
    body = backbone_of(model)
    layers = body.layers
    start = first_trainable(body, what)
    parts = (part for layer in layers[start:] for part in _parts(layer))
    norms = [part for part in parts if isinstance(part, keras.layers.BatchNormalization)]
    if start < len(layers) and _weight_ids(layers[start:]) == _weight_ids(norms):
        raise ValueError(
            f"unfreeze {what!r}: no weight would train, only layers without weights or BatchNormalization."
        )
    body.trainable = start < len(layers)
    for index, layer in enumerate(layers):
        layer.trainable = index >= start
    for norm in norms:
        norm.trainable = False
    return trainable_table(model)


def _weight_ids(layers: list) -> set[int]:
    return {id(weight) for layer in layers for weight in layer.weights}


def layer_shares(model: keras.Model, decay: float) -> dict[int, float]:
    """The share of the learning rate for each weight that trains, less with each layer of the backbone downwards.

    Args:
        model: a classifier whose trainable flags are set.
        decay: the share of a layer with weights that train, as a share of the next such layer above it, in (0, 1]. The
            backbone's uppermost has `decay` itself; the head has 1.

    Returns:
        id of the variable -> share; the head's are not in it.
    """
    layers = [layer for layer in reversed(backbone_of(model).layers) if layer.trainable_weights]
    return {id(weight): decay**depth for depth, layer in enumerate(layers, 1) for weight in layer.trainable_weights}


def trainable_table(model: keras.Model) -> pd.DataFrame:
    """Shows what trains.

    Returns:
        One row each for the backbone's frozen part, its thawed part and the head: first and last layer, number of
        layers, of weights (scalars), and of the weights that train (BatchNormalization makes the difference).
    """
    body = backbone_of(model)
    layers = body.layers
    start = next((i for i, layer in enumerate(layers) if layer.trainable_weights), len(layers))
    parts = {"backbone, frozen": layers[:start], "backbone, thawed": layers[start:]}
    if body is not model:
        parts["head"] = [layer for layer in model.layers if layer is not body and layer is not model.layers[0]]
    return pd.DataFrame([_row(name, part) for name, part in parts.items() if part]).set_index("part")


def _row(name: str, layers: list) -> dict:
    return {
        "part": name,
        "from": layers[0].name,
        "to": layers[-1].name,
        "layers": len(layers),
        "weights": sum(layer.count_params() for layer in layers),
        "trainable": sum(_size(layer.trainable_weights) for layer in layers),
    }


def _size(weights) -> int:
    return sum(int(keras.ops.size(weight)) for weight in weights)


def backbone_of(model: keras.Model) -> keras.Model:
    """The sub-model "backbone", or the model itself if it is one.

    Raises:
        ValueError: there is none.
    """
    if model.name == "backbone":
        return model
    for layer in model.layers:
        if layer.name == "backbone":
            return layer
    raise ValueError(f'The model {model.name!r} has no sub-model named "backbone"; models.classifier makes one.')


def first_trainable(backbone: keras.Model, what: str | int | float | dict) -> int:
    """The index in ``backbone.layers`` of the first layer that `what` thaws; their number if nothing.

    Args:
        backbone: from `backbones.build`.
        what: see `unfreeze`.

    Raises:
        ValueError: see `unfreeze`.
    """
    layers = backbone.layers
    own = [i for i, layer in enumerate(layers) if not layer.name.startswith(backbones.PREPROCESS)]
    if what == "none":
        return len(layers)
    if what == "all":
        return 0
    if isinstance(what, str):
        return _index_of_name(layers, what)
    if isinstance(what, float) and 0 < what <= 1:
        return _index_of_share(layers, what)
    if isinstance(what, dict) and what.keys() == {"from_index"}:
        return own[_whole(what["from_index"], 0, len(own) - 1, "unfreeze from_index")]
    if isinstance(what, int) and not isinstance(what, bool):
        return own[-_whole(what, 1, len(own), "unfreeze, a number of layers,")]
    raise ValueError(
        'unfreeze takes "none", "all", a block or layer name, a whole number of layers, a fraction in (0, 1] or '
        f"{{'from_index': n}}; got {what!r}."
    )


def _whole(value, least: int, most: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{what} must be a whole number from {least} to {most}; got {value!r}.")
    return value


def _index_of_share(layers: list, share: float) -> int:
    sizes = [layer.count_params() for layer in layers]
    held = 0
    for index in range(len(layers) - 1, -1, -1):
        held += sizes[index]
        if held >= share * sum(sizes):
            return index
    return 0


def _index_of_name(layers: list, name: str) -> int:
    labels = [_without_family(layer.name) for layer in layers]
    # "block7" begins block7a_expand_conv and block7_pool, but not block70_conv
    begins = re.compile(re.escape(_without_family(name)) + r"((?<=\d)[a-z])?(_|$)")
    for index, layer in enumerate(layers):
        if layer.name == name:
            return index
    for index, label in enumerate(labels):
        if name and begins.match(label):
            return index
    blocks = block_names(layers)
    known = dict.fromkeys([*blocks, *(layer.name for layer in layers)])
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    shown = f"Its last {SHOWN_BLOCKS} blocks" if len(blocks) > SHOWN_BLOCKS else "Its blocks"
    raise ValueError(
        f"The backbone has no block or layer {name!r}.{hint} {shown}: {', '.join(blocks[-SHOWN_BLOCKS:])}."
    )


def _without_family(name: str) -> str:
    """``convnext_tiny_stage_3_block_0`` -> ``stage_3_block_0``: ConvNeXt alone puts its own name before its layers'."""
    return re.sub(r"^convnext_[a-z]+_(?=[a-z])", "", name)


def block_names(layers: Sequence[keras.layers.Layer]) -> list[str]:
    """The blocks by which `layers` can be unfrozen, in order: ``block7``, ``conv5``, ``stage_3``."""
    named = [layer for layer in layers if not layer.name.startswith(backbones.automatic_stem(layer))]
    found = (re.match(r"[A-Za-z_]*?\d+", _without_family(layer.name)) for layer in named)
    return list(dict.fromkeys(match.group() for match in found if match))


def _parts(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layer and all within it. Keras has no public walk through layers that are not models."""
    return list(layer._flatten_layers())
