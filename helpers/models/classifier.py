"""Classifiers on a frozen backbone.

A classifier is input -> sub-model "backbone" (called with training=False) -> head: ``head_pool`` (or, within the
backbone, a ``level_...`` for each level that is read), ``head_scale`` if requested, ``head_dropout``, optional dense
layers, ``probabilities``. `unfreezing.unfreeze` sets what of the backbone trains; the head always does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from helpers.core import words
from helpers.models import backbones, unfreezing
from helpers.models import levels as levels_of

SCALE = "head_scale"
DENSE_DEFAULTS = {"activation": "relu", "dropout": 0.0, "batch_norm": False, "l1": 0.0, "l2": 0.0}
OUTPUT_DEFAULTS = {"batch_norm": False, "l1": 0.0, "l2": 0.0}


def build(
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
    levels: str | Sequence[str] = "top",
    pool: levels_of.Pool = "mean",
    standardised: bool = False,
) -> keras.Model:
    """Build a classifier on a frozen backbone.

    Args:
        backbone: a name of `backbones.names()` or ``hub:<preset>``.
        n_classes: number of classes, at least 2.
        image_size: pixels; an int for squares, else (height, width).
        weights: of the backbone: "imagenet", "none" or a file.
        dropout: share of the pooled features dropped in training, 0 to below 1.
        batch_norm: BatchNormalization after that dropout.
        dense: hidden layers, each a number of units or a dict of ``units`` and any of ``activation`` ("relu"),
            ``dropout`` (0), ``batch_norm`` (False), ``l1``, ``l2`` (0); the order is dense, dropout,
            BatchNormalization.
        l1: lasso penalty on the kernel of the last layer.
        l2: ridge penalty on the kernel of the last layer.
        levels: what the head reads: "top", the last feature map; "all", the ends of the backbone's blocks too; or
            names, such as ``["block3", "block5", "top"]``. With several, the backbone's output is the pooled levels.
        pool: the statistics of each channel of a feature map: its mean, or also its maximum or its standard deviation,
            which gives twice as many features. For tokens also "class", the class token, and "class_mean".
        standardised: add a layer ``head_scale`` that gives each feature mean 0 and standard deviation 1, after
            `features.standardise` has set it; several levels always have it.

    Returns:
        keras.Model: (batch, height, width, 3), float32 or uint8 RGB 0-255 -> float32 probabilities (batch, n_classes).

    Raises:
        ValueError: a value out of its range, an unknown backbone or an unknown key in `dense`.

    Example:
        >>> classifier("resnet50", 196, image_size=224, batch_norm=True,
        ...            dense=[{"units": 1024, "dropout": 0.5, "batch_norm": True}, 512])
    """
    unfreezing.whole(n_classes, 2, 10**6, "n_classes")
    hidden = check_dense(dense)
    body = backbones.build(backbone, image_size, weights)
    if levels != "top":
        body = levels_of.read(body, levels, pool)
    body.trainable = False
    for part in unfreezing.parts_of(body):
        for rate in ("rate", "drop_path_rate", "_dropout"):  # `fit` would drop values despite training=False
            if isinstance(getattr(part, rate, None), float):
                setattr(part, rate, 0.0)
    inputs = keras.Input(body.input_shape[1:], name="image")
    x = body(inputs, training=False)
    x = levels_of.pooled(x, pool, "head_pool", levels_of.prefix_tokens(body)) if levels == "top" else x
    if standardised or levels != "top":
        x = keras.layers.BatchNormalization(center=False, scale=False, epsilon=1e-6, name=SCALE)(x)
    x = _regularised(x, "", dropout, batch_norm)
    for number, layer in enumerate(hidden, start=1):
        x = _hidden(x, f"_{number}", layer)
    outputs = keras.layers.Dense(
        n_classes, activation="softmax", kernel_regularizer=_penalty(l1, l2), dtype="float32", name="probabilities"
    )(x)
    return keras.Model(inputs, outputs, name="classifier")


def check_dense(dense: Sequence[int | dict]) -> list[dict]:
    """Return the hidden layers of `classifier` with all settings, also the defaults.

    Raises:
        ValueError: an unknown key or activation, or a value out of its range.
    """
    return [_dense_spec(entry) for entry in dense]


def _dense_spec(entry: int | dict) -> dict:
    settings = dict(entry) if isinstance(entry, dict) else {"units": entry}
    unknown = settings.keys() - {"units", *DENSE_DEFAULTS}
    if unknown:
        raise ValueError(f"A dense layer has no {sorted(unknown)}; it takes units, {', '.join(DENSE_DEFAULTS)}.")
    unfreezing.whole(settings.get("units"), 1, 10**6, "units of a dense layer")
    spec = DENSE_DEFAULTS | settings
    try:
        keras.activations.get(spec["activation"])
    except (TypeError, ValueError):
        raise ValueError(f"A dense layer's activation must be one of Keras, such as relu; got {settings!r}.") from None
    _check_head(spec, "a dense layer")
    _share_dropped(spec["dropout"])
    return spec


def output_settings(output: Mapping[str, Any]) -> dict:
    """Return 03's parameter `output` as arguments of `build`: batch_norm, l1 and l2.

    Args:
        output: any of ``batch_norm`` for the pooled features, and ``l1`` and ``l2`` for the last layer.

    Raises:
        ValueError: an unknown key, or a value out of its range.
    """
    unknown = [key for key in output if key not in OUTPUT_DEFAULTS]
    if unknown:
        hint = words.near(str(unknown[0]), OUTPUT_DEFAULTS)
        raise ValueError(f"output has no {unknown[0]!r}.{hint} It takes {', '.join(OUTPUT_DEFAULTS)}.")
    return _check_head(OUTPUT_DEFAULTS | dict(output), "output")


def _check_head(spec: dict, what: str) -> dict:
    for name in ("l1", "l2"):
        if isinstance(spec[name], bool) or not isinstance(spec[name], int | float) or spec[name] < 0:
            raise ValueError(f"{name} of {what} must be a number of at least 0; got {spec[name]!r}.")
    if not isinstance(spec["batch_norm"], bool):
        raise ValueError(f"batch_norm of {what} must be true or false; got {spec['batch_norm']!r}.")
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
        raise ValueError(f"dropout must be a share in [0, 1); got {dropout!r}.")


def _penalty(l1: float, l2: float):
    return keras.regularizers.L1L2(l1, l2) if l1 or l2 else None
