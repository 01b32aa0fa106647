"""Every network of keras.applications, in snake case (``resnet50_v2``); Keras downloads their ImageNet weights."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helpers.models.families import family

CAFFE_MEAN = (123.68, 116.779, 103.939)  # RGB, of pixels in 0-255


@dataclass(frozen=True)
class Spec(family.Spec):
    """The facts about a network of keras.applications.

    Attributes:
        class_name: the function in keras.applications.
        module: the module in keras.applications that holds its ``preprocess_input``.
        contract: the preprocessing of RGB 0-255. "tf": scaled to -1..1; "torch": standardised with the ImageNet
            statistics; "caffe": changed to BGR and centred; "inside": part of the network's graph.
    """

    class_name: str
    module: str
    contract: str


# module of keras.applications, smallest image, contract: name, function, size of the images it was trained on
NETWORKS = {
    ("convnext", 32, "inside"): (
        ("convnext_tiny", "ConvNeXtTiny", 224),
        ("convnext_small", "ConvNeXtSmall", 224),
        ("convnext_base", "ConvNeXtBase", 224),
        ("convnext_large", "ConvNeXtLarge", 224),
        ("convnext_xlarge", "ConvNeXtXLarge", 224),
    ),
    ("densenet", 32, "torch"): (
        ("densenet121", "DenseNet121", 224),
        ("densenet169", "DenseNet169", 224),
        ("densenet201", "DenseNet201", 224),
    ),
    ("efficientnet", 32, "inside"): (
        ("efficientnet_b0", "EfficientNetB0", 224),
        ("efficientnet_b1", "EfficientNetB1", 240),
        ("efficientnet_b2", "EfficientNetB2", 260),
        ("efficientnet_b3", "EfficientNetB3", 300),
        ("efficientnet_b4", "EfficientNetB4", 380),
        ("efficientnet_b5", "EfficientNetB5", 456),
        ("efficientnet_b6", "EfficientNetB6", 528),
        ("efficientnet_b7", "EfficientNetB7", 600),
    ),
    ("efficientnet_v2", 32, "inside"): (
        ("efficientnet_v2_b0", "EfficientNetV2B0", 224),
        ("efficientnet_v2_b1", "EfficientNetV2B1", 240),
        ("efficientnet_v2_b2", "EfficientNetV2B2", 260),
        ("efficientnet_v2_b3", "EfficientNetV2B3", 300),
        ("efficientnet_v2_s", "EfficientNetV2S", 384),
        ("efficientnet_v2_m", "EfficientNetV2M", 480),
        ("efficientnet_v2_l", "EfficientNetV2L", 480),
    ),
    ("inception_resnet_v2", 75, "tf"): (("inception_resnet_v2", "InceptionResNetV2", 299),),
    ("inception_v3", 75, "tf"): (("inception_v3", "InceptionV3", 299),),
    ("mobilenet", 32, "tf"): (("mobilenet", "MobileNet", 224),),
    ("mobilenet_v2", 32, "tf"): (("mobilenet_v2", "MobileNetV2", 224),),
    ("mobilenet_v3", 32, "inside"): (
        ("mobilenet_v3_large", "MobileNetV3Large", 224),
        ("mobilenet_v3_small", "MobileNetV3Small", 224),
    ),
    ("nasnet", 32, "tf"): (
        ("nasnet_large", "NASNetLarge", 331),
        ("nasnet_mobile", "NASNetMobile", 224),
    ),
    ("resnet", 32, "caffe"): (
        ("resnet50", "ResNet50", 224),
        ("resnet101", "ResNet101", 224),
        ("resnet152", "ResNet152", 224),
    ),
    ("resnet_v2", 32, "tf"): (
        ("resnet50_v2", "ResNet50V2", 224),
        ("resnet101_v2", "ResNet101V2", 224),
        ("resnet152_v2", "ResNet152V2", 224),
    ),
    ("vgg16", 32, "caffe"): (("vgg16", "VGG16", 224),),
    ("vgg19", 32, "caffe"): (("vgg19", "VGG19", 224),),
    ("xception", 71, "tf"): (("xception", "Xception", 299),),
}


SPECS = {
    name: Spec(name, size, min_size, function, module, contract)
    for (module, min_size, contract), networks in NETWORKS.items()
    for name, function, size in networks
}


class Applications(family.Family):
    """keras.applications."""

    specs = SPECS

    def features(self, spec: Spec, image: Any, imagenet: bool) -> Any:
        """Build the network after its preprocessing; see `family.Family`."""
        import keras

        network, x = getattr(keras.applications, spec.class_name), _preprocess(image, spec.contract)
        weights = "imagenet" if imagenet else None
        try:
            return network(include_top=False, weights=weights, input_tensor=x, input_shape=x.shape[1:]).output
        except Exception as error:  # a failed download is a bare Exception, a damaged file an OSError or ValueError
            if imagenet and (type(error) is Exception or isinstance(error, OSError) or "corrupted" in str(error)):
                raise _no_download(spec, error) from error
            raise

    def finish(self, model: Any, spec: Spec, imagenet: bool) -> None:
        """Set the ImageNet statistics of random EfficientNets; see `family.Family`."""
        if spec.module == "efficientnet" and not imagenet:
            _set_normalization(model)

    def load(self, model: Any, spec: Spec, path: Path) -> None:
        """Read weights from a file, also from one that keras.applications downloads; see `family.Family`."""
        super().load(model, spec, path)
        if spec.module == "efficientnet":
            layer = next(layer for layer in model.layers if type(layer).__name__ == "Normalization")
            if np.allclose(layer.adapt_variance, family.IMAGENET_STD, atol=1e-4):
                _set_normalization(model)

    def here(self) -> list[str]:
        """Return the networks whose file without the classifier Keras has downloaded."""
        files = (path.name for path in (family.keras_home() / "models").glob("*no*top*.h5"))
        return sorted({name for file in files if (name := _name_of(file))})


def _name_of(file: str) -> str:
    """Return the network whose weights a file of Keras holds: its name, in some spelling, starts the file's."""
    begin = _bare(file.removeprefix("weights_"))
    return max((name for name in SPECS if begin.startswith(_bare(name))), key=len, default="")


def _bare(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _preprocess(inputs, contract: str):
    """Return what preprocess_input gives, from standard Keras layers and operations, which reload in safe mode."""
    import keras

    if contract == "tf":
        return keras.layers.Rescaling(1 / 127.5, offset=-1.0, name=family.PREPROCESS + "rescale")(inputs)
    if contract == "torch":
        return family.standardised(inputs)
    if contract == "caffe":
        name = family.PREPROCESS + "centre"
        centred = keras.layers.Normalization(mean=CAFFE_MEAN, variance=(1.0, 1.0, 1.0), name=name)(inputs)
        return keras.ops.flip(centred, axis=-1)
    return inputs


def _no_download(spec: Spec, error: Exception) -> FileNotFoundError:
    url = re.search(r"https?://\S+[^\s:]", str(error))
    return family.no_download(spec.name, Path(url.group()).name if url else "", error)


def _set_normalization(model) -> None:
    """Set the ImageNet statistics in the Normalization layer of EfficientNet B0-B7.

    Keras divides by the square root of the deviation twice, the second time in a Rescaling layer that exists only
    with weights="imagenet". Without that layer, the true variance here gives the same function of the pixels.
    """
    layer = next(layer for layer in model.layers if type(layer).__name__ == "Normalization")
    layer.adapt_mean.assign(family.IMAGENET_MEAN)
    layer.adapt_variance.assign(np.square(family.IMAGENET_STD))
    layer.finalize_state()


FAMILY = Applications()
