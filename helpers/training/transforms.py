"""Augmentation: how training images are varied, and how pairs of them are blended.

    augment = make("default", flip="horizontal", mix="mixup")
    change = augment.function()
    images, labels = change(images, labels, views.key(seed, epoch, step))

Every draw follows from that key and from nothing else. Each image has its own key, split from it, so no two images
share a draw. Several Keras layers (RandAugment, RandomGaussianBlur, RandomElasticTransform) would make one draw for a
whole batch.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import keras
import numpy as np
import tensorflow as tf

from helpers.compute import views

DEFAULT: list[dict[str, dict[str, Any]]] = [
    {"RandomRotation": {"factor": 0.03, "fill_mode": "reflect"}},
    {"RandomTranslation": {"height_factor": 0.05, "width_factor": 0.05, "fill_mode": "reflect"}},
    {"RandomContrast": {"factor": 0.1, "value_range": [0, 255]}},
]
ENHANCED: list[dict[str, dict[str, Any]]] = [
    {"RandomRotation": {"factor": 0.08, "fill_mode": "reflect"}},
    {"RandomTranslation": {"height_factor": 0.05, "width_factor": 0.05, "fill_mode": "reflect"}},
    {"RandomShear": {"x_factor": 0.1, "y_factor": 0.1, "fill_mode": "reflect"}},
    {"RandomZoom": {"height_factor": 0.15, "fill_mode": "reflect"}},
    {"RandomContrast": {"factor": 0.2, "value_range": [0, 255]}},
    {"GaussianNoise": {"stddev": 0.03}},
    {"RandomErasing": {"factor": 0.5, "scale": [0.02, 0.1], "fill_value": 127.0, "value_range": [0, 255]}},
]
PRESETS = {"none": [], "default": DEFAULT, "enhanced": ENHANCED}
UNFIT = ("RandomCrop", "AugMix")  # one changes the size, the other draws with Python's `random` and ignores the seed
OTHERS = ("Equalization", "GaussianNoise", "Solarization")  # augmentations without Random or Auto in their names
WARPS = (
    keras.layers.RandomRotation,
    keras.layers.RandomShear,
    keras.layers.RandomTranslation,
    keras.layers.RandomZoom,
)
BORDERS = {
    "constant": cv2.BORDER_CONSTANT,
    "nearest": cv2.BORDER_REPLICATE,
    "reflect": cv2.BORDER_REFLECT,
    "wrap": cv2.BORDER_WRAP,
}
INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "nearest": cv2.INTER_NEAREST}

# Each move is made with a chance of one half, so that all symmetries are equally likely; moves are pixel permutations.
MOVES: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "horizontal": partial(tf.reverse, axis=[1]),
    "vertical": partial(tf.reverse, axis=[0]),
    "diagonal": partial(tf.transpose, perm=[1, 0, 2]),
}
FLIPS = {
    "none": (),
    "horizontal": ("horizontal",),
    "vertical": ("vertical",),
    "both": ("horizontal", "vertical"),
    "dihedral": ("horizontal", "vertical", "diagonal"),  # all eight symmetries of the square
}
# MixUp as in Zhang et al. (2018), whose alpha for ImageNet is 0.1 to 0.4; CutMix as in Yun et al. (2019), alpha 1.
MIXES = {
    "none": {},
    "mixup": {"MixUp": {"alpha": 0.2}},
    "cutmix": {"CutMix": {"factor": [1.0, 1.0]}},
    "both": {"MixUp": {"alpha": 0.2}, "CutMix": {"factor": [1.0, 1.0]}},  # each image by one of them, equally often
}


@dataclass(frozen=True)
class Augmentation:
    """The changes to training images. It holds only settings, so that two of them have different fingerprints.

    Attributes:
        layers: (name in keras.layers, arguments), applied in this order after the flips.
        flip: a key of FLIPS.
        mix: a key of MIXES, applied last.
    """

    layers: tuple[tuple[str, dict[str, Any]], ...] = ()
    flip: str = "none"
    mix: str = "none"

    @property
    def mixes(self) -> bool:
        """Whether it blends images, and with them their labels."""
        return self.mix != "none"

    def function(self) -> Callable[[tf.Tensor, Any, tf.Tensor], tuple[tf.Tensor, Any]]:
        """Return (images, labels, key) -> (images, labels), made of new layers, for eager use or a TensorFlow graph.

        Images are (n, H, W, 3), 0-255, and come back as float32; a key is what `key` returns. Labels come back as they
        are, unless images are mixed: they must be float32 (n, classes) then.
        """
        draws = _Draws(seed=0)
        steps = [partial(_moved, FLIPS[self.flip], draws), *_steps(self.layers, draws)]
        blend = _blend(self.mix, draws)

        def one(image: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
            draws.begin(key)
            image = tf.cast(image, tf.float32)
            for step in steps:
                image = step(image)
            return tf.clip_by_value(image, 0.0, 255.0) if self.layers else image

        @tf.autograph.experimental.do_not_convert
        def change(images: tf.Tensor, labels: Any, key: tf.Tensor) -> tuple[tf.Tensor, Any]:
            with tf.device("CPU:0"):  # many small steps an image
                keys = tf.random.split(key, tf.shape(images)[0] + 1)
                result = tf.TensorSpec(images.shape[1:], tf.float32)
                images = tf.map_fn(lambda each: one(*each), (images, keys[1:]), fn_output_signature=result)
                draws.begin(keys[0])
                return blend(images, labels) if self.mixes else (images, labels)

        return change


def make(
    spec: str | Sequence[dict[str, dict[str, Any]]] = "default",
    flip: str = "none",
    mix: str = "none",
    *,
    before: Mapping[str, Any] | None = None,
) -> Augmentation | None:
    """Return the augmentation, None if it does nothing.

    Args:
        spec: a preset ("none", "default", "enhanced") or a list of {layer of keras.layers: arguments}, e.g.
            `[{"RandomZoom": {"height_factor": 0.2}}]`. Each image is varied separately, even if the layer varies a
            batch as one. The `stddev` of GaussianNoise is a share of the range 0-255, since Keras expects it below 1.
        flip: "none", "horizontal", "vertical", "both", or "dihedral", all flips and quarter turns; never part of a
            preset, since only the user knows whether such an image still belongs to its class.
        mix: "none", "mixup", "cutmix" or "both": pairs of images are blended, and their labels in the same shares.
        before: augmentation, flip and mix of an earlier phase, which "same" means.

    Raises:
        ValueError: an unknown preset, flip, mix or layer, or arguments that the layer refuses.
    """
    if before is not None:
        choices = {"augmentation": spec, "flip": flip, "mix": mix}
        spec, flip, mix = (before[name] if value == "same" else value for name, value in choices.items())
    for name, value, names in (("flip", flip, FLIPS), ("mix", mix, MIXES)):
        if value not in names:
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(names)}.")
    if isinstance(spec, str) and spec not in PRESETS:
        raise ValueError(f"augmentation: {spec!r} is not a preset. Take one of {', '.join(PRESETS)}, or list layers.")
    layers = tuple(_checked(item) for item in (PRESETS[spec] if isinstance(spec, str) else spec))
    return Augmentation(layers, flip, mix) if layers or flip != "none" or mix != "none" else None


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return class indices (n,) as float32 shares of each class, (n, classes)."""
    return np.eye(classes, dtype=np.float32)[labels]


def copies(
    examples: Mapping[str, np.ndarray], augment: Augmentation | None, count: int = 6, seed: int = 0
) -> dict[str, list[np.ndarray]]:
    """Return for each class an image and `count` augmented copies of it, uint8 (H, W, 3) each.

    Args:
        examples: class name -> images (k, H, W, 3); the first is taken.
        augment: as `make` returns it. Where it mixes images, the classes' images are mixed with one another.
    """
    plain = np.stack([images[0] for images in examples.values()])
    labels = np.eye(len(plain), dtype=np.float32)
    show = _shown(augment)
    changed = [show(plain, labels, views.key(seed, number)) for number in range(count)]
    return {name: [plain[row], *(images[row] for images in changed)] for row, name in enumerate(examples)}


def pairs(
    examples: Iterable[tuple[str, np.ndarray]], augment: Augmentation | None, seed: int = 0
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (class, images, the same images augmented), uint8 (k, H, W, 3) each.

    Args:
        examples: class names and images (k, H, W, 3), as `datasets.examples` gives them.
        augment: as `make` returns it. Images are not mixed here, since each pair holds one class.
    """
    show = _shown(Augmentation(augment.layers, augment.flip) if augment else None)
    for number, (name, images) in enumerate(examples):
        yield name, images, show(images, np.zeros(len(images)), views.key(seed, number))


def _shown(augment: Augmentation | None) -> Callable[[np.ndarray, np.ndarray, tf.Tensor], np.ndarray]:
    """Return (images, labels, key) -> the changed images, as uint8, by one graph for all calls."""
    if augment is None:
        return lambda images, labels, key: images
    change = tf.function(augment.function(), reduce_retracing=True)
    return lambda images, labels, key: tf.cast(change(images, labels, key)[0], tf.uint8).numpy()


class _Draws(keras.random.SeedGenerator):
    """A seed generator without a state: its seeds follow from the key that `begin` got."""

    def begin(self, key: tf.Tensor) -> None:
        self.key, self.count = key, 0

    def next(self, ordered: bool = True) -> tf.Tensor:
        self.count += 1
        return self.key + tf.constant([0, self.count])


def _checked(item: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments of a layer, or raise if there is no such layer."""
    if not isinstance(item, dict) or len(item) != 1:
        raise ValueError(f"augmentation: expected {{layer name: {{argument: value}}}}, got {item!r}.")
    (name, arguments), *_ = item.items()
    if name in ("MixUp", "CutMix"):
        raise ValueError(f"augmentation: {name} blends images and labels. Ask for it by mix: {name.lower()}.")
    names = [n for n in dir(keras.layers) if n.startswith(("Rand", "Auto")) and n not in UNFIT] + list(OTHERS)
    if name not in names:
        raise ValueError(f"augmentation: keras.layers has no augmentation {name!r}. There are: {', '.join(names)}.")
    try:
        _layer(name, arguments or {}, _Draws(seed=0))
    except (TypeError, ValueError) as error:
        raise ValueError(f"augmentation: {name} refused its arguments: {error}") from None
    return name, arguments or {}


def _layer(name: str, arguments: dict[str, Any], draws: _Draws) -> keras.layers.Layer:
    """Return a layer that takes every seed from `draws`, as do the layers in it."""
    kind = getattr(keras.layers, name)
    if "seed" in inspect.signature(kind).parameters:  # without one it takes a number of Python's `random`
        arguments = arguments | {"seed": 0}
    layer = kind(**arguments)
    for part in layer._flatten_layers():  # past Keras' tracking, which would take it for a part of a built layer
        object.__setattr__(part, "_get_seed_generator", lambda backend=None: draws)
    return layer


def _steps(layers: Iterable[tuple], draws: _Draws) -> list[Callable[[tf.Tensor], tf.Tensor]]:
    """Return the layers as functions of one image; those in a row that only move pixels become one warp."""
    steps = []
    for border, group in itertools.groupby((_layer(*each, draws) for each in layers), _border):
        if border is not None:
            steps.append(partial(_warped, list(group), border))
        else:
            steps += [partial(KINDS.get(type(layer), _applied), layer, draws) for layer in group]
    return steps


def _border(layer: keras.layers.Layer) -> tuple | None:
    """Return what two warps must share to become one, None for a layer that is no warp."""
    return (layer.fill_mode, layer.interpolation, layer.fill_value) if isinstance(layer, WARPS) else None


def _moved(moves: Sequence[str], draws: _Draws, image: tf.Tensor) -> tf.Tensor:
    for move in moves:
        chosen = tf.random.stateless_uniform((), draws.next()) < 0.5
        image = tf.cond(chosen, partial(MOVES[move], image), partial(tf.identity, image))
    return image


def _applied(layer: keras.layers.Layer, draws: _Draws, image: tf.Tensor) -> tf.Tensor:
    return layer(image[None], training=True)[0]


def _with_noise(layer: keras.layers.GaussianNoise, draws: _Draws, image: tf.Tensor) -> tf.Tensor:
    return image + tf.random.stateless_normal(tf.shape(image), draws.next(), stddev=255.0 * layer.stddev)


def _rand_augmented(layer: keras.layers.RandAugment, draws: _Draws, image: tf.Tensor) -> tf.Tensor:
    """Change an image by `num_ops` of the layer's parts; Keras computes all of them each time and keeps some."""
    parts = [getattr(layer, name) for name in layer._AUGMENT_LAYERS]
    for _ in range(layer.num_ops):
        drawn = tf.random.stateless_uniform((), draws.next(), 0, len(parts), tf.int32)
        image = tf.switch_case(drawn, [partial(_applied, part, draws, image) for part in parts])
    return image


def _warped(layers: Sequence[keras.layers.Layer], border: tuple, image: tf.Tensor) -> tf.Tensor:
    """Move the pixels once, as all `layers` together would; OpenCV takes half the time of TensorFlow's kernel."""
    matrix = tf.eye(3)
    for layer in layers:
        matrix = matrix @ _matrix(layer, image[None])
    warp = partial(_warp, border)
    return tf.ensure_shape(tf.numpy_function(warp, [image, matrix], tf.float32, stateful=False), image.shape)


def _warp(border: tuple, image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    fill_mode, interpolation, fill_value = border
    return cv2.warpAffine(
        image,
        matrix[:2],
        image.shape[1::-1],
        flags=INTERPOLATIONS[interpolation] | cv2.WARP_INVERSE_MAP,
        borderMode=BORDERS[fill_mode],
        borderValue=[fill_value] * 3,
    )


def _matrix(layer: keras.layers.Layer, image: tf.Tensor) -> tf.Tensor:
    """Return a draw of `layer` for a batch of one image as the matrix (3, 3) from new to old pixel coordinates."""
    layer.backend.set_backend("tensorflow")  # on every backend of Keras
    drawn = layer.get_random_transformation(image, training=True)
    if isinstance(layer, keras.layers.RandomRotation):
        rows = tf.unstack(drawn["rotation_matrix"][0])
    elif isinstance(layer, keras.layers.RandomTranslation):
        right, down = tf.unstack(drawn["translations"][0])
        rows = [1.0, 0.0, -right, 0.0, 1.0, -down, 0.0, 0.0]
    elif isinstance(layer, keras.layers.RandomZoom):
        across, along = drawn["width_zoom"][0, 0], drawn["height_zoom"][0, 0]
        height, width = image.shape[1], image.shape[2]
        middle = (1.0 - across) * (width - 1) / 2, (1.0 - along) * (height - 1) / 2
        rows = [across, 0.0, middle[0], 0.0, along, middle[1], 0.0, 0.0]
    else:
        across, along = tf.unstack(drawn["shear_factor"][0])
        rows = [1.0, across, 0.0, along, 1.0, 0.0, 0.0, 0.0]
    return tf.reshape(tf.stack([*rows, 1.0]), (3, 3))


def _blend(mix: str, draws: _Draws) -> Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Return (images, shares) -> (images, shares) in which each image is blended with another one of the batch."""
    layers = [_layer(name, arguments, draws) for name, arguments in MIXES[mix].items()]

    def blend(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        results = [layer({"images": images, "labels": labels}, training=True) for layer in layers]
        first, last = results[0], results[-1]
        chosen = tf.random.stateless_uniform(tf.shape(images)[:1], draws.next()) < 0.5
        images = tf.where(chosen[:, None, None, None], first["images"], last["images"])
        return images, tf.where(chosen[:, None], first["labels"], last["labels"])

    return blend


KINDS = {keras.layers.GaussianNoise: _with_noise, keras.layers.RandAugment: _rand_augmented}
