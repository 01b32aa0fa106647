"""Images in a fixed order and their augmented views, the same for the same seed wherever the work begins."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

GROUP = 32  # images that are augmented together: a layer draws for a whole batch, so another number gives other views
MIXING = (keras.layers.MixUp, keras.layers.CutMix)


@dataclass(frozen=True)
class Images:
    """Images in a fixed order.

    Attributes:
        pixels: dataset of uint8 batches (any batch size, H, W, 3) or one array (n, H, W, 3), in the order of `keys`.
        keys: one text an image that changes whenever its pixels do, e.g. content hash and image size.
        labels: (n,) class indices, or (n, classes) shares of each class.
    """

    pixels: tf.data.Dataset | np.ndarray
    keys: Sequence[str]
    labels: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.keys) or len(self.keys) != len(self.labels):
            raise ValueError(
                f"Images need one key and one label each; got {len(self.keys)} keys and {len(self.labels)} labels."
            )

    def groups(self, start: int) -> Iterator[np.ndarray]:
        """Yield the images from index `start`, a multiple of `GROUP`, on in batches of `GROUP`, decoded ahead."""
        if isinstance(self.pixels, tf.data.Dataset):
            yield from self.pixels.rebatch(GROUP).skip(start // GROUP).prefetch(4).as_numpy_iterator()
        else:
            yield from (self.pixels[at : at + GROUP] for at in range(start, len(self.pixels), GROUP))


def in_views(
    images: Images, start: int, views: int, augment: keras.layers.Layer | None, seed: int
) -> Iterator[tuple[int, slice, np.ndarray, np.ndarray]]:
    """Yield (view, rows, float32 images, labels), group by group, each made while the one before it is used.

    Args:
        images: the images.
        start: index of the first image, a multiple of `GROUP`.
        views: versions of each image; the first is plain.
        augment: Keras layer or model, needed for more than one view.
        seed: seed of the augmentation.

    Raises:
        ValueError: there are not as many images as keys.
    """

    def each() -> Iterator:
        n, at, change = len(images.keys), start, _seeded(augment)
        for pixels in images.groups(start):
            rows = slice(at, at + len(pixels))
            at = rows.stop
            if at > n or (len(pixels) < GROUP and at < n):
                break
            plain, labels = pixels.astype("float32"), images.labels[rows]
            yield 0, rows, plain, labels
            for view in range(1, views):
                yield view, rows, *change(plain, labels, [seed, view, rows.start])
        if at != n:
            raise ValueError(f"There must be one image for each of {n} keys; there are {at}{' or more' * (at > n)}.")

    return _ahead(each())


def _ahead(items: Iterator) -> Iterator:
    """Yield `items`, each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


def _seeded(augment: keras.layers.Layer | None) -> Callable | None:
    """Return `augment` as a function (images, labels, seed numbers) that gives the same for the same seed numbers."""
    if augment is None:
        return None
    mixes, states = (
        mixes_images(augment),
        [part for part in augment.variables if part.path.endswith("seed_generator_state")],
    )

    def call(images: Any, labels: Any) -> tuple:
        if mixes:
            mixed = augment({"images": images, "labels": labels}, training=True)
            return mixed["images"], mixed["labels"]
        return augment(images, training=True), labels

    compiled = tf.function(call, reduce_retracing=True) if keras.backend.backend() == "tensorflow" else call

    def run(images: np.ndarray, labels: np.ndarray, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
        for state, number in zip(states, np.random.SeedSequence(seed).generate_state(len(states) or 1), strict=False):
            state.assign([number, 0])
        changed = compiled(images, labels.astype("float32") if mixes else labels)
        return tuple(map(keras.ops.convert_to_numpy, changed))

    return run


def mixes_images(augment: keras.layers.Layer | None, views: int = 2) -> bool:
    return views > 1 and augment is not None and any(isinstance(part, MIXING) for part in augment._flatten_layers())
