"""Adapters: small matrices that train beside a thawed layer's own weights, which do not change.

A layer with the kernel W computes with W + A B; only A and B train (LoRA, Hu et al., 2021). Keras makes them; `merge`
adds them to the kernels after the training, so that the model then has the same layers as before.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import pandas as pd

from helpers.core import words
from helpers.models import unfreezing

KINDS = (keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
MOST = 4096  # rank


def rank(adapter: Mapping[str, Any]) -> int:
    """Return the rank in 04's parameter `adapter`, 0 where it is empty.

    Raises:
        ValueError: it is neither {} nor {"lora": rank}.
    """
    if not adapter:
        return 0
    if unknown := [key for key in adapter if key != "lora"]:
        raise ValueError(f"adapter has no {unknown[0]!r}.{words.did_you_mean(str(unknown[0]), ['lora'])}")
    return unfreezing.whole(adapter["lora"], 1, MOST, "adapter.lora, the rank,")


def takers(backbone: keras.Model, adapter: Mapping[str, Any]) -> list[keras.layers.Layer]:
    """Return the layers of the thawed part that can have an adapter, from low to high.

    They are dense layers (those of attention too) and convolutions, except depthwise ones, whose adapter has fewer
    weights than the kernel.

    Args:
        backbone: after `unfreezing.unfreeze`.
        adapter: 04's parameter.

    Raises:
        ValueError: there are none.
    """
    lowrank = rank(adapter)
    thawed = [layer for layer in unfreezing.layers_of(backbone) if layer.trainable]
    parts = {id(part): part for layer in thawed for part in unfreezing.parts_of(layer) if isinstance(part, KINDS)}
    layers = [part for part in parts.values() if _size(part, lowrank) < math.prod(part.kernel.shape)]
    if lowrank and not layers:
        raise ValueError(
            f"adapter: no layer of the thawed part takes {dict(adapter)}. It takes dense layers and convolutions (not"
            " depthwise ones) whose kernel has more weights than the adapter. Thaw more (unfreeze), set a smaller"
            " rank, or remove the adapter."
        )
    return layers if lowrank else []


def add(model: keras.Model, adapter: Mapping[str, Any], *, seed: int = 0) -> pd.DataFrame:
    """Add adapters to the thawed part, and freeze its own weights. Compile afterwards.

    Nothing changes where `adapter` is empty. The model's output does not change: B is zero at first. Files of weights
    that are written before `merge` hold kernels and adapters separately, so that a training can resume.

    Args:
        model: a classifier after `unfreezing.unfreeze`. The head trains as before.
        adapter: {"lora": rank}, or {}.
        seed: of A.

    Returns:
        The table of `unfreezing.trainable_table`.

    Raises:
        ValueError: no thawed layer can have one.
    """
    merge(model)  # where the cell runs again
    body = unfreezing.backbone_of(model)
    layers = takers(body, adapter)
    if layers:
        for weight in body.trainable_weights:
            weight.trainable = False
    for number, layer in enumerate(layers):
        drawn = keras.initializers.HeUniform(seed=seed + number)
        layer.enable_lora(rank(adapter), a_initializer=drawn)
        layer.save_own_variables = functools.partial(_save, layer)
        layer.load_own_variables = functools.partial(_load, layer)
    return unfreezing.trainable_table(model)


def merge(model: keras.Model) -> None:
    """Add the adapters to the kernels and remove them; the model's output does not change.

    Afterwards the same layers are thawed as after `unfreezing.unfreeze`.

    Args:
        model: with adapters; without, nothing happens.
    """
    parts = unfreezing.parts_of(unfreezing.backbone_of(model))
    adapted = [part for part in parts if getattr(part, "lora_enabled", False)]
    for layer in adapted:
        a, b = layer.lora_kernel_a, layer.lora_kernel_b
        product = np.matmul(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b))
        # Not `layer.kernel`, which is rounded where the model computes in half precision
        layer._kernel.assign(keras.ops.convert_to_numpy(layer._kernel) + layer.lora_alpha / layer.lora_rank * product)
        b.assign(np.zeros(b.shape))  # for graphs that were compiled before
        for weight in (a, b):
            layer._untrack_variable(weight)
        layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None
        del layer.save_own_variables, layer.load_own_variables
    for part in parts if adapted else ():
        for (
            weight
        ) in part._trainable_variables:  # `layer.trainable = True` does nothing to a layer that is trainable already
            weight.trainable = part.trainable


def _size(layer: keras.layers.Layer, lowrank: int) -> int:
    *rest, channels = layer.kernel.shape
    return (math.prod(rest) + channels) * lowrank


def _save(layer: keras.layers.Layer, store: Any) -> None:
    """Write the kernel and its adapter; Keras would write their sum, and no training could resume from that."""
    layer.lora_enabled = False
    try:
        type(layer).save_own_variables(layer, store)
    finally:
        layer.lora_enabled = True
    store["lora_kernel_a"], store["lora_kernel_b"] = layer.lora_kernel_a, layer.lora_kernel_b


def _load(layer: keras.layers.Layer, store: Any) -> None:
    """Read what `_save` wrote, or weights without an adapter: then A does not change, and B becomes zero."""
    a = keras.ops.convert_to_numpy(layer.lora_kernel_a)
    type(layer).load_own_variables(layer, store)  # makes A zero too; with both zero, neither trains
    has_adapter = "lora_kernel_a" in store.keys()  # noqa: SIM118 - a store of Keras is not a dictionary
    layer.lora_kernel_a.assign(store["lora_kernel_a"] if has_adapter else a)
    if has_adapter:
        layer.lora_kernel_b.assign(store["lora_kernel_b"])
