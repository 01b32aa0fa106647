"""Backbones by name: networks that take RGB 0-255 and return a feature map, or tokens.

The names are those of the families in `FAMILIES`. A family's own preprocessing is part of the graph and uses only
standard Keras, so a saved backbone opens anywhere with Keras. Reading the names needs no Keras; building imports it.
"""

import collections
import re
from pathlib import Path
from typing import Any

import numpy as np

from helpers.core import project, words
from helpers.models.families import applications, efficientnet_lite, family, kerashub, torchvision

FAMILIES = (applications.FAMILY, efficientnet_lite.FAMILY, torchvision.FAMILY, kerashub.FAMILY)


def names() -> list[str]:
    """Return all names except the presets of KerasHub, which are ``hub:<preset>``."""
    return sorted(name for one in FAMILIES for name in one.specs)


def spec(name: str) -> family.Spec:
    """Return the spec of a backbone; needs no Keras.

    Args:
        name: one of `names()` or ``hub:<preset>``.

    Raises:
        ValueError: the name is unknown; the message lists similar names.
    """
    return _find(name)[1]


def build(name: str, image_size: int | tuple[int, int], weights: str = "imagenet"):
    """Build a backbone whose input is RGB 0-255 and whose output is a feature map, or tokens.

    Args:
        name: one of `names()` or ``hub:<preset>``.
        image_size: pixels; an int for squares, else (height, width).
        weights: "imagenet", "none" (random), or a file: ``.keras`` (a backbone or a whole Thaw model),
            ``.weights.h5``, ``.h5``, for EfficientNet-Lite and torchvision also ``.pth``, ``.safetensors``.

    Returns:
        keras.Model named "backbone": (batch, height, width, 3), float32 or uint8 in 0-255 -> (batch, h, w, channels),
        or (batch, tokens, channels) of a transformer. Its attribute `prefix_tokens` counts those before the patches'.

    Raises:
        ValueError: unknown name, image too small, or weights of another architecture.
        FileNotFoundError: the weights file is missing, or ImageNet weights could not be downloaded.
        ImportError: ``hub:`` without KerasHub.
    """
    import keras

    own_family, own_spec = _find(name)
    height, width = _check_size(own_spec, image_size)
    path = None if weights in ("imagenet", "none") else _check_path(own_family, weights)
    inputs = keras.Input((height, width, 3), name="image")
    model = keras.Model(inputs, own_family.features(own_spec, inputs, weights == "imagenet"), name="backbone")
    _number_automatic_names(model)
    model.prefix_tokens = own_family.prefix_tokens(model)
    if path is None:
        own_family.finish(model, own_spec, weights == "imagenet")
        return model
    try:
        own_family.load(model, own_spec, path)
    except (ValueError, KeyError, OSError, TypeError, AttributeError, IndexError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"{path} does not hold the weights of {own_spec.name}: {reason}") from error
    return model


def imagenet_classifier(name: str = "efficientnet_lite0", image_size: int | None = None):
    """Return a whole network with its ImageNet classifier, to check the weights or to label photos.

    Args:
        name: "efficientnet_lite0", "efficientnet_lite1" or "efficientnet_lite2".
        image_size: pixels; None: the size of its training.

    Returns:
        keras.Model: RGB 0-255 (batch, image_size, image_size, 3) -> logits (batch, 1000), the ILSVRC-2012 classes
        in their usual order.

    Raises:
        ValueError: another backbone.
    """
    import keras

    own_family, own_spec = _find(name)
    if type(own_family).classify is family.Family.classify:
        own_family.classify(None, own_spec)  # raises before anything is built
    backbone = build(name, image_size or own_spec.size)
    return keras.Model(backbone.input, own_family.classify(backbone, own_spec), name=name)


def weights_installed(name: str) -> bool:
    """Return whether the ImageNet weights of a backbone come with a package that is installed; loads no Keras.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError: the package is missing; the message names it.
    """
    own_family, own_spec = _find(name)
    return own_family.installed(own_spec)


def own_size(name: str) -> int:
    """Return the height and width in pixels that the ImageNet weights of a backbone were trained at.

    Raises:
        ValueError: the name is unknown.
        ImportError: ``hub:`` without KerasHub.
    """
    own_family, own_spec = _find(name)
    return own_spec.size or own_family.own_size(own_spec)


def weights_here() -> list[str]:
    """Return the names of the backbones whose ImageNet weights are on this machine; loads no Keras."""
    return sorted(name for one in FAMILIES for name in one.here())


def automatic_stem(layer) -> str:
    """Return the name that Keras gives a layer without a name, without its number: Conv2D -> "conv2d"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(layer).__name__).lower()


def _find(name: str) -> tuple[family.Family, Any]:
    for one in FAMILIES:
        if own_spec := one.spec(name):
            return one, own_spec
    hint = words.did_you_mean(str(name).lower(), [*names(), "hub:<preset>"])
    raise ValueError(f"Unknown backbone {name!r}.{hint}")


def _check_size(own_spec: family.Spec, image_size) -> tuple[int, int]:
    sides = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    whole = len(sides) == 2 and all(
        isinstance(side, (int, np.integer)) and not isinstance(side, bool) for side in sides
    )
    if not whole:
        raise ValueError(f"image_size must be one whole number of pixels or (height, width); got {image_size!r}.")
    if min(sides) < own_spec.min_size:
        raise ValueError(
            f"{own_spec.name} needs images of at least {own_spec.min_size} px; got image_size {image_size}."
        )
    return int(sides[0]), int(sides[1])


def _check_path(own_family: family.Family, weights: str) -> Path:
    path = project.resolve(weights)
    if not path.name.endswith(own_family.endings):
        raise ValueError(
            f'weights must be "imagenet", "none" or a file ending in {", ".join(own_family.endings)}; got {weights!r}.'
        )
    if not path.is_file():
        raise FileNotFoundError(f'No weights file {path}. Set an existing file, "imagenet" or "none".')
    return path


def _number_automatic_names(model) -> None:
    """Renumber ``conv2d_37`` from 0, so that names do not depend on what was built before in this process."""
    count = collections.Counter()
    for layer in model.operations:
        stem = automatic_stem(layer)
        if re.fullmatch(stem + r"(_\d+)?", layer.name):
            layer.name = f"{stem}_{count[stem]}" if count[stem] else stem
            count[stem] += 1
