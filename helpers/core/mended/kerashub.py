"""Corrections of KerasHub 0.32: some of its layers report wrong settings or a wrong shape and cannot be saved.

KerasHub saves a transformer as a whole; Thaw saves it block by block, so that blocks can be thawed.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any


def correct() -> None:
    """Correct these layers where KerasHub is loaded. Call it before a model with them is built or saved."""
    if "keras_hub" not in sys.modules:
        return
    from keras_hub.src.models.deit import deit_layers
    from keras_hub.src.models.siglip.siglip_layers import SigLIPVisionEmbedding
    from keras_hub.src.models.vit import vit_layers

    for module in (deit_layers, vit_layers):  # they report settings, such as num_patches, that they do not accept
        for kind in vars(module).values():
            is_layer = getattr(kind, "__module__", "") == module.__name__ and "get_config" in vars(kind)
            if is_layer and not hasattr(kind.get_config, "whole"):
                kind.get_config = _with_accepted_settings(kind, kind.get_config)
    SigLIPVisionEmbedding.compute_output_shape = _shape  # it reports one token too many


def _with_accepted_settings(kind: type, whole: Callable[[Any], dict]) -> Callable[[Any], dict]:
    parameters = [*inspect.signature(kind.__init__).parameters]
    accepted_names = {*parameters, "name", "trainable", "dtype"}

    def get_config(layer: Any) -> dict:
        missing = {name: getattr(layer, name) for name in parameters[1:] if name in vars(layer)}  # ViT's use_patch_bias
        return missing | {name: value for name, value in whole(layer).items() if name in accepted_names}

    get_config.whole = whole
    return get_config


def _shape(layer: Any, input_shape: tuple) -> tuple:
    return (input_shape[0], layer.num_positions, layer.hidden_dim)
