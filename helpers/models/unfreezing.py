"""Which weights of a model train."""

import re
from collections.abc import Sequence

import keras
import pandas as pd

from helpers.core import wiring, words
from helpers.models import backbones
from helpers.models.families import family

SHOWN_BLOCKS = 20  # a message lists this many of the last blocks: NASNet has about seventy


def unfreeze(model: keras.Model, what: str | int | float | dict) -> pd.DataFrame:
    """Set which layers of the backbone train. Compile afterwards: a compiled model ignores the change.

    BatchNormalization layers of the backbone stay frozen, so that their moving statistics do not change. The
    head does not change.

    Args:
        model: a model with a sub-model "backbone", or a backbone.
        what: "none"; "all"; a block or layer name ("block7", "conv5", "block14_sepconv1"): from its first layer to
            the backbone's end; an int: the number of last layers; a float in (0, 1]: the shortest tail of layers that
            holds this share of the backbone's weights (1 is one layer, 1.0 is all);
            {"from_index": n}: from the n-th layer on, in keras.applications' own numbering (the input is 0).

    Returns:
        The table of `trainable_table`.

    Raises:
        ValueError: an unknown name (the message lists similar names and the blocks), a number out of range, or a choice
            under which no weight of the backbone would train.
    """
    body = backbone_of(model)
    layers = layers_of(body)
    start = first_trainable(body, what)
    parts = (part for layer in layers[start:] for part in parts_of(layer))
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
    """Return the share of the learning rate of each weight that trains; lower layers of the backbone have less.

    Args:
        model: a classifier whose trainable flags are set.
        decay: the factor from a layer with weights that train to the next lower one, in (0, 1]. The uppermost layer of
            the backbone has `decay` itself; the head has 1.

    Returns:
        id of the variable -> share; the head's are not in it.
    """
    layers = [layer for layer in reversed(backbone_of(model).layers) if layer.trainable_weights]
    return {id(weight): decay**depth for depth, layer in enumerate(layers, 1) for weight in layer.trainable_weights}


def trainable_table(model: keras.Model) -> pd.DataFrame:
    """Return a table of what trains.

    Returns:
        One row each for the backbone's frozen part, its thawed part and the head: first and last layer, number of
        layers, of weights (scalars), and of the weights that train (BatchNormalization makes the difference).
    """
    body = backbone_of(model)
    layers = layers_of(body)
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
    """Return the sub-model "backbone", or the model itself if it is one.

    Raises:
        ValueError: there is none.
    """
    if model.name == "backbone":
        return model
    for layer in model.layers:
        if layer.name == "backbone":
            return layer
    raise ValueError(f'The model {model.name!r} has no sub-model named "backbone"; models.classifier makes one.')


def layers_of(backbone: keras.Model) -> list[keras.layers.Layer]:
    """Return the backbone's own layers, without those that pool its levels for the head."""
    return [layer for layer in backbone.layers if not layer.name.startswith(wiring.LEVEL)]


def first_trainable(backbone: keras.Model, what: str | int | float | dict) -> int:
    """Return the index in `layers_of` of the first layer that `what` thaws; their number if it thaws none.

    Args:
        backbone: from `backbones.build`.
        what: see `unfreeze`.

    Raises:
        ValueError: see `unfreeze`.
    """
    layers = layers_of(backbone)
    own = [i for i, layer in enumerate(layers) if not layer.name.startswith(family.PREPROCESS)]
    if what == "none":
        return len(layers)
    if what == "all":
        return 0
    if isinstance(what, str):
        return _index_of_name(layers, what)
    if isinstance(what, float) and 0 < what <= 1:
        return _index_of_share(layers, what)
    if isinstance(what, dict) and what.keys() == {"from_index"}:
        return own[whole(what["from_index"], 0, len(own) - 1, "unfreeze from_index")]
    if isinstance(what, int) and not isinstance(what, bool):
        return own[-whole(what, 1, len(own), "unfreeze, a number of layers,")]
    raise ValueError(
        'unfreeze takes "none", "all", a block or layer name, a whole number of layers, a fraction in (0, 1] or '
        f"{{'from_index': n}}; got {what!r}."
    )


def whole(value, least: int, most: int, what: str) -> int:
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
    known_names = dict.fromkeys([*blocks, *(layer.name for layer in layers)])
    hint = words.near(name, known_names)
    shown = f"Its last {SHOWN_BLOCKS} blocks" if len(blocks) > SHOWN_BLOCKS else "Its blocks"
    raise ValueError(
        f"The backbone has no block or layer {name!r}.{hint} {shown}: {', '.join(blocks[-SHOWN_BLOCKS:])}."
    )


def _without_family(name: str) -> str:
    """``convnext_tiny_stage_3_block_0`` -> ``stage_3_block_0``: only ConvNeXt puts its own name before its layers'."""
    return re.sub(r"^convnext_[a-z]+_(?=[a-z])", "", name)


def block_names(layers: Sequence[keras.layers.Layer]) -> list[str]:
    """Return the blocks by which `layers` can be unfrozen, in order: ``block7``, ``conv5``, ``stage_3``."""
    return list(dict.fromkeys(block for layer in layers if (block := block_of(layer))))


def block_of(operation, within: str = "") -> str:
    """Return the block in an operation's name; `within` where Keras named it, "" where it is in no block."""
    if operation.name.startswith(backbones.automatic_stem(operation)):
        return within
    match = re.match(r"[A-Za-z_]*?\d+", _without_family(operation.name))
    return match.group() if match else ""


def parts_of(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Return the layer and all layers in it. Keras has no public function for layers that are not models."""
    return list(layer._flatten_layers())
