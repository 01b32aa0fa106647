"""Presets of KerasHub, ``hub:<preset>``; their weights are downloaded, or read from a folder."""

import re
from typing import Any

from helpers.models.families import family

SMALLEST = 32  # pixels


class KerasHub(family.Family):
    """Every preset of the installed KerasHub whose backbone returns a feature map."""

    def spec(self, name: str) -> family.Spec | None:
        """Return the preset that a name such as ``hub:resnet_50_imagenet`` means; whether it exists is not known."""
        is_preset = isinstance(name, str) and re.fullmatch(r"hub:\S+", name)
        return family.Spec(name, None, SMALLEST) if is_preset else None

    def features(self, spec: family.Spec, image: Any, imagenet: bool) -> Any:
        """Build a preset, its image converter's scale and offset first, laid flat so that its layers can be named."""
        import keras

        try:
            import keras_hub
        except ImportError as error:
            raise ImportError(f'{spec.name} needs KerasHub: pip install -e ".[hub]".') from error
        preset = spec.name.removeprefix("hub:")
        size = tuple(image.shape[1:])
        hub = keras_hub.models.Backbone.from_preset(preset, load_weights=imagenet, image_shape=size)
        if len(hub.output.shape) != 4:
            shape = hub.output.shape
            raise ValueError(f"{spec.name} does not return a feature map (height, width, channels) but {shape}.")
        converter = keras_hub.layers.ImageConverter.from_preset(preset)
        scale = 1.0 if converter.scale is None else converter.scale
        offset = 0.0 if converter.offset is None else converter.offset
        x = keras.layers.Rescaling(scale, offset=offset, name=family.PREPROCESS + "rescale")(image)
        return hub.call(x)  # not hub(x), which would put all its layers into one


FAMILY = KerasHub()
