"""Networks as torchvision defines them: those of PyTorch that keras.applications lacks, or has in another form.

Layers, names and numbers follow torchvision 0.29 (BSD 3-Clause), whose weights they take, and those of timm under the
same names. In `tv_resnet50` a block's stride is in its 3x3 convolution, unlike in `resnet50` of keras.applications.
Importing this module does not load Keras.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helpers.models import torch_weights
from helpers.models.families import family

HOST = "https://download.pytorch.org/models/"
EPSILON = 1e-5  # of every BatchNormalization
UNUSED = ("classifier.", "fc.", "head.", "pre_logits.")  # first parts of the names of the ImageNet classifier's tensors
VGG_CHANNELS = (64, 128, 256, 512, 512)
DENSE_CHANNELS = 4  # of a layer's first convolution, in growths


@dataclass(frozen=True)
class Spec(family.Spec):
    """The facts about a network of torchvision.

    Attributes:
        kind: "resnet", "vgg" or "densenet".
        repeats: blocks of each stage of a ResNet, convolutions of a VGG's, layers of a DenseNet's.
        file: of its ImageNet weights (IMAGENET1K_V1). The part after "-" is the start of the file's SHA-256.
        bottleneck: a ResNet's block has three convolutions, not two.
        groups: of the 3x3 convolutions of a bottleneck.
        width: channels of each group where the stage has 64.
    """

    kind: str
    repeats: tuple[int, ...]
    file: str
    bottleneck: bool = False
    groups: int = 1
    width: int = 64


def _resnet_specs() -> list[Spec]:
    small, large, largest = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
    return [
        Spec("resnet18", 224, 32, "resnet", (2, 2, 2, 2), "resnet18-f37072fd.pth"),
        Spec("resnet34", 224, 32, "resnet", small, "resnet34-b627a593.pth"),
        Spec("tv_resnet50", 224, 32, "resnet", small, "resnet50-0676ba61.pth", True),
        Spec("tv_resnet101", 224, 32, "resnet", large, "resnet101-63fe2227.pth", True),
        Spec("tv_resnet152", 224, 32, "resnet", largest, "resnet152-394f9c45.pth", True),
        Spec("resnext50_32x4d", 224, 32, "resnet", small, "resnext50_32x4d-7cdf4587.pth", True, 32, 4),
        Spec("resnext101_32x8d", 224, 32, "resnet", large, "resnext101_32x8d-8ba56ff5.pth", True, 32, 8),
        Spec("wide_resnet50_2", 224, 32, "resnet", small, "wide_resnet50_2-95faca4d.pth", True, 1, 128),
        Spec("wide_resnet101_2", 224, 32, "resnet", large, "wide_resnet101_2-32ee1156.pth", True, 1, 128),
    ]


SPECS = {
    spec.name: spec
    for spec in (
        *_resnet_specs(),
        Spec("vgg11_bn", 224, 32, "vgg", (1, 1, 2, 2, 2), "vgg11_bn-6002323d.pth"),
        Spec("vgg13_bn", 224, 32, "vgg", (2, 2, 2, 2, 2), "vgg13_bn-abd245e5.pth"),
        Spec("vgg16_bn", 224, 32, "vgg", (2, 2, 3, 3, 3), "vgg16_bn-6c64b313.pth"),
        Spec("vgg19_bn", 224, 32, "vgg", (2, 2, 4, 4, 4), "vgg19_bn-c79401a0.pth"),
        Spec("densenet161", 224, 32, "densenet", (6, 12, 36, 24), "densenet161-8d451a50.pth", width=48),
    )
}


class Torchvision(family.Family):
    """Networks of torchvision; their ImageNet weights are PyTorch files, which are downloaded once or provided."""

    specs = SPECS
    endings = (*family.Family.endings, *torch_weights.ENDINGS)

    def features(self, spec: Spec, image: Any, imagenet: bool) -> Any:
        """Build the network after its preprocessing; see `family.Family`."""
        return BUILD[spec.kind](spec, family.standardised(image))

    def finish(self, model: Any, spec: Spec, imagenet: bool) -> None:
        """Load the ImageNet weights, downloading them the first time; see `family.Family`."""
        if imagenet:
            give(model, spec, torch_weights.read(_fetch(spec)))

    def load(self, model: Any, spec: Spec, path: Path) -> None:
        """Read weights from a file, also from one of torchvision or timm; see `family.Family`."""
        if path.suffix in torch_weights.ENDINGS:
            give(model, spec, torch_weights.read(path))
        else:
            super().load(model, spec, path)

    def here(self) -> list[str]:
        """Return the networks whose file Keras or PyTorch has downloaded."""
        return [name for name, spec in self.specs.items() if _on_this_machine(spec)]


def give(model: Any, spec: Spec, tensors: dict[str, np.ndarray]) -> None:
    """Set every weight of a model from a state dict of torchvision or timm, by name.

    Raises:
        ValueError: a tensor is missing, belongs to no layer, or has another shape. The model is unchanged.
    """
    # DenseNet files from before 2018 have norm.1 for norm1
    named_tensors = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", name): tensors[name] for name in tensors}
    new, used = {}, set()
    for layer in (layer for layer in model.layers if layer.weights and not layer.name.startswith(family.PREPROCESS)):
        name = torch_name(spec, layer.name)
        own_names = [
            key for key in named_tensors if key.startswith(f"{name}.") and not key.endswith("num_batches_tracked")
        ]
        shapes = [tuple(weight.shape) for weight in layer.weights]
        arrays = torch_weights.arrays_of(named_tensors, name) if f"{name}.weight" in named_tensors else []
        if [array.shape for array in arrays] != shapes:
            raise ValueError(f"{name} holds {[array.shape for array in arrays]} in it, expected {shapes}")
        new[layer], used = arrays, used.union(own_names)
    rest = [name for name in named_tensors if name not in used and not name.startswith(UNUSED)]
    if rest := [name for name in rest if not name.endswith("num_batches_tracked")]:
        raise ValueError(f"{len(rest)} arrays in it belong to no layer, {rest[0]} the first")
    for layer, arrays in new.items():
        layer.set_weights(arrays)


def torch_name(spec: Spec, name: str) -> str:
    """Return torchvision's name of a layer with weights: ``layer1_0_conv2`` -> ``layer1.0.conv2``."""
    block, layer, part = (*name.split("_"), "")[:3]
    if spec.kind == "resnet":
        return {"stem_conv": "conv1", "stem_norm": "bn1"}.get(name, name.replace("_", "."))
    if spec.kind == "densenet":
        if layer == "transition":
            return f"features.transition{int(block[5:]) - 1}.{part}"
        ends = {"stem_conv": "features.conv0", "stem_norm": "features.norm0", "top_norm": "features.norm5"}
        return ends.get(name) or f"features.dense{block}.dense{layer}.{part}"
    number, index = int(block[5:]), int(layer[4:])  # VGG counts convolutions, norms, activations and pools together
    before = sum(spec.repeats[: number - 1]) + index - 1
    return f"features.{3 * before + number - 1 + (layer[:4] == 'norm')}"


def _fetch(spec: Spec) -> Path:
    import keras

    if path := _on_this_machine(spec):
        return path
    try:
        path = Path(keras.utils.get_file(spec.file, HOST + spec.file, cache_subdir="models"))
    except Exception as error:  # a failed download is a bare Exception
        raise family.no_download(spec.name, spec.file, error) from error
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(Path(spec.file).stem.split("-")[1]):
        path.unlink()
        raise family.no_download(spec.name, spec.file, ValueError(f"what {HOST}{spec.file} sent is damaged"))
    return path


def _on_this_machine(spec: Spec) -> Path | None:
    """Return the file that Keras or PyTorch has downloaded, None without one."""
    torch_home = Path(os.environ.get("TORCH_HOME") or Path.home() / ".cache" / "torch")
    places = (family.keras_home() / "models", torch_home / "hub" / "checkpoints")
    return next((place / spec.file for place in places if (place / spec.file).is_file()), None)


def _resnet(spec: Spec, x: Any) -> Any:
    """Build a ResNet (He et al., 2015), ResNeXt (Xie et al., 2016) or Wide ResNet (Zagoruyko and Komodakis, 2016)."""
    x = _stem(x, 64)
    for stage, repeats in enumerate(spec.repeats, start=1):
        for number in range(repeats):
            x = _residual(spec, x, f"layer{stage}_{number}_", 64 * 2 ** (stage - 1), stage > 1 and number == 0)
    return x


def _residual(spec: Spec, x: Any, block: str, channels: int, strided: bool) -> Any:
    import keras

    entry, stride, out = x, 2 if strided else 1, channels * 4 if spec.bottleneck else channels
    if spec.bottleneck:
        wide = channels * spec.width // 64 * spec.groups
        x = _relu(_norm(_conv(x, block + "conv1", wide, 1), block + "bn1"), block + "relu1")
        x = _conv(x, block + "conv2", wide, 3, stride, groups=spec.groups)
        x = _relu(_norm(x, block + "bn2"), block + "relu2")
        x = _norm(_conv(x, block + "conv3", out, 1), block + "bn3")
    else:
        x = _relu(_norm(_conv(x, block + "conv1", out, 3, stride), block + "bn1"), block + "relu1")
        x = _norm(_conv(x, block + "conv2", out, 3), block + "bn2")
    if strided or entry.shape[-1] != out:
        entry = _norm(_conv(entry, block + "downsample_0", out, 1, stride), block + "downsample_1")
    return _relu(keras.layers.Add(name=block + "add")([x, entry]), block + "relu")


def _vgg(spec: Spec, x: Any) -> Any:
    """Build a VGG with BatchNormalization (Simonyan and Zisserman, 2014)."""
    import keras

    for block, (repeats, channels) in enumerate(zip(spec.repeats, VGG_CHANNELS, strict=True), start=1):
        for number in range(1, repeats + 1):
            x = _conv(x, f"block{block}_conv{number}", channels, 3, use_bias=True)
            x = _relu(_norm(x, f"block{block}_norm{number}"), f"block{block}_relu{number}")
        x = keras.layers.MaxPooling2D(2, name=f"block{block}_pool")(x)
    return x


def _densenet(spec: Spec, x: Any) -> Any:
    """Build a DenseNet (Huang et al., 2016). A block begins with the transition from the previous one."""
    import keras

    x = _stem(x, 2 * spec.width)
    for block, layers in enumerate(spec.repeats, start=1):
        if block > 1:
            part = f"block{block}_transition_"
            x = _conv(_relu(_norm(x, part + "norm"), part + "relu"), part + "conv", x.shape[-1] // 2, 1)
            x = keras.layers.AveragePooling2D(2, name=part + "pool")(x)
        for number in range(1, layers + 1):
            part = f"block{block}_layer{number}_"
            new = _relu(_norm(x, part + "norm1"), part + "relu1")
            new = _conv(new, part + "conv1", DENSE_CHANNELS * spec.width, 1)
            new = _conv(_relu(_norm(new, part + "norm2"), part + "relu2"), part + "conv2", spec.width, 3)
            x = keras.layers.Concatenate(name=part + "concat")([x, new])
    return _relu(_norm(x, "top_norm"), "top_relu")


BUILD = {"resnet": _resnet, "vgg": _vgg, "densenet": _densenet}


def _stem(x: Any, channels: int) -> Any:
    import keras

    x = _relu(_norm(_conv(x, "stem_conv", channels, 7, 2), "stem_norm"), "stem_relu")
    x = keras.layers.ZeroPadding2D(1, name="stem_frame")(x)  # no value is below zero, so zeros never change the maximum
    return keras.layers.MaxPooling2D(3, 2, name="stem_pool")(x)


def _conv(x: Any, name: str, channels: int, kernel: int, stride: int = 1, **options: Any) -> Any:
    """Add a convolution padded by half its kernel on each side, as PyTorch does it."""
    import keras

    if stride > 1 and kernel > 1:  # "same" would pad one side only
        x = keras.layers.ZeroPadding2D(kernel // 2, name=name + "_frame")(x)
    padding = "same" if stride == 1 else "valid"
    options = {"use_bias": False, "kernel_initializer": "he_normal", "padding": padding, "name": name} | options
    return keras.layers.Conv2D(channels, kernel, stride, **options)(x)


def _norm(x: Any, name: str) -> Any:
    import keras

    return keras.layers.BatchNormalization(momentum=0.9, epsilon=EPSILON, name=name)(x)


def _relu(x: Any, name: str) -> Any:
    import keras

    return keras.layers.ReLU(name=name)(x)


FAMILY = Torchvision()
