"""Presets of KerasHub, ``hub:<preset>``; their weights are downloaded, or read from a folder.

Convolutional backbones end in a feature map, (batch, height, width, channels), vision transformers in tokens, (batch,
tokens, channels). A transformer's encoder is one layer in KerasHub; here each of its blocks is a layer, ``block1`` to
``block12``, so that some of them can train while the outputs of the others are cached.
"""

import inspect
import re
from dataclasses import dataclass
from typing import Any

from helpers.core.mended import kerashub as mended
from helpers.models.families import family

SMALLEST = 32  # pixels
GIVES = {
    "map": ("CSPNet", "DenseNet", "EfficientNet", "MobileNet", "ResNet", "VGG", "Xception"),
    "tokens": ("DeiT", "DINOV2", "DINOV3", "SigLIP", "ViT"),
}  # kinds of backbones. KerasHub 0.32 cannot load its own saved Swin and MiT; HGNetV2 gives several maps


class KerasHub(family.Family):
    """Every preset of the installed KerasHub whose backbone returns a feature map or tokens."""

    def spec(self, name: str) -> family.Spec | None:
        """Return the preset of a name such as ``hub:resnet_50_imagenet``, without a check that it exists."""
        is_preset = isinstance(name, str) and re.fullmatch(r"hub:\S+", name)
        return family.Spec(name, None, SMALLEST) if is_preset else None

    def features(self, spec: family.Spec, image: Any, imagenet: bool) -> Any:
        """Build a preset after its image converter's scale and offset, flattened so that its layers have names."""
        import keras

        keras_hub = _keras_hub(spec.name)
        preset = spec.name.removeprefix("hub:")
        hub = _preset(spec.name, preset, tuple(image.shape[1:]), imagenet)
        converter = keras_hub.layers.ImageConverter.from_preset(preset)
        scale = 1.0 if converter.scale is None else converter.scale
        offset = 0.0 if converter.offset is None else converter.offset
        x = keras.layers.Rescaling(scale, offset=offset, name=family.PREPROCESS + "rescale")(image)
        blocks = _blocks(hub)
        if blocks is None:
            return hub.call(dict.fromkeys(hub.input, x) if isinstance(hub.input, dict) else x)
        embedding, encoder, norm = blocks
        embedding.name = "tokens"
        x = embedding(x)
        for number, block in enumerate(encoder, start=1):
            block.name = f"block{number}"
            returns_pairs = "return_attention_scores" in inspect.signature(block.call).parameters  # DeiT
            x = block(x, return_attention_scores=True)[0] if returns_pairs else block(x)
        norm.name = "top_norm"
        return norm(x)

    def own_size(self, spec: family.Spec) -> int:
        """Return the size of images that the preset itself is made for; see `family.Family`."""
        backbone = _keras_hub(spec.name).models.Backbone
        hub = backbone.from_preset(spec.name.removeprefix("hub:"), load_weights=False)
        return getattr(hub, "vision_encoder", hub).inputs[0].shape[1] or super().own_size(spec)

    def prefix_tokens(self, model: Any) -> int:
        """Return how many tokens come before those of the image's patches; see `family.Family`."""
        for layer in model.layers:
            if type(layer).__name__ == "DeiTEmbeddings":
                return 2  # the class's and the distillation's
            if type(layer).__name__.startswith("DINO") and hasattr(layer, "num_register_tokens"):
                return 1 + layer.num_register_tokens
            if hasattr(layer, "use_class_token"):
                return int(layer.use_class_token)
        return 0


@dataclass(frozen=True)
class Preset:
    """The facts about a preset in the installed KerasHub, before it is downloaded.

    Attributes:
        name: as recipes take it, ``hub:<preset>``.
        weights: their number, with the text tower of a pair; 0 where KerasHub does not state it.
        size: height and width in pixels that its name or description states; None where they do not.
        gives: "map" or "tokens".
    """

    name: str
    weights: int
    size: int | None
    gives: str


def presets() -> list[Preset]:
    """Return the presets of the installed KerasHub that can be backbones, by name.

    Raises:
        ImportError: KerasHub is not installed.
    """
    models = _keras_hub("The list of presets").models
    all_presets = []
    for gives, kinds in GIVES.items():
        for kind in (getattr(models, f"{kind}Backbone", None) for kind in kinds):
            all_presets += [_facts(name, entry, gives) for name, entry in getattr(kind, "presets", {}).items()]
    return sorted(all_presets, key=lambda preset: preset.name)


def _facts(name: str, entry: dict[str, Any], gives: str) -> Preset:
    facts = entry.get("metadata", {})
    stated = re.search(r"(\d{3})x\1|image size (\d{3})", facts.get("description", ""))
    size = next(filter(None, stated.groups())) if stated else None
    return Preset(f"hub:{name}", int(facts.get("params") or 0), size and int(size), gives)


def _keras_hub(what: str) -> Any:
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(f'{what} needs KerasHub: pip install -e ".[hub]".') from error
    mended.correct()
    return keras_hub


def _preset(name: str, preset: str, shape: tuple[int, int, int], imagenet: bool) -> Any:
    """Return the backbone of a preset for images of a size; raise an error if it takes only its own size."""
    import keras_hub

    backbone = keras_hub.models.Backbone
    try:
        try:
            hub = backbone.from_preset(preset, load_weights=imagenet, image_shape=shape)
        except TypeError:  # a pair of towers, for images and for texts, has no own shape
            hub = backbone.from_preset(preset, load_weights=imagenet)
    except ValueError as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"{name} cannot be built for images of {shape[0]}x{shape[1]} px: {reason} Most transformers take only the"
            " size of their pre-training, a multiple of their patches: set resize.image_size to it."
        ) from error
    known_kinds = [kind for kinds in GIVES.values() for kind in kinds]
    if (kind := type(hub).__name__.removesuffix("Backbone")) not in known_kinds:
        raise ValueError(f"{name} is a {kind}, which cannot be a backbone here. Take one of {', '.join(known_kinds)}.")
    hub = _in_force(getattr(hub, "vision_encoder", hub))
    own = tuple(hub.inputs[0].shape[1:])
    if len(hub.inputs) != 1 or own[:2] not in (shape[:2], (None, None)):
        raise ValueError(f"{name} takes images of {own[0]}x{own[1]} px only: set resize.image_size to {own[0]}.")
    if _blocks(hub) is None and len(hub.outputs[0].shape) not in (3, 4):
        raise ValueError(f"{name} returns no feature map and no tokens but {hub.outputs[0].shape}.")
    return hub


def _in_force(hub: Any) -> Any:
    """Return the network in the precision in force; a tower in a pair keeps that of its file."""
    import keras

    policy = keras.config.dtype_policy().name
    if hub.dtype_policy.name == policy:
        return hub
    same = type(hub).from_config(hub.get_config() | {"dtype": policy})
    same.set_weights(hub.get_weights())
    return same


def _blocks(hub: Any) -> tuple[Any, list[Any], Any] | None:
    """Return the parts of a transformer: what makes tokens, its blocks, its last norm; None for other networks."""
    kind = type(hub).__name__
    if kind in ("ViTBackbone", "DeiTBackbone"):
        encoder = next(layer for layer in hub.layers if hasattr(layer, "encoder_layers"))
        embedding = next(layer for layer in hub.layers if layer.name.endswith("patching_and_embedding"))
        return embedding, encoder.encoder_layers, encoder.layer_norm
    if kind == "DINOV2Backbone":
        return hub.embeddings, hub.encoder.layers, hub.layernorm
    if kind == "SigLIPVisionEncoder":
        return hub.embedding, hub.encoder_layers, hub.post_layer_norm
    return None


FAMILY = KerasHub()
