"""Images in a fixed order and their augmented views: the same for the same seed, from any starting image."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

GROUP = 32  # images that are augmented together: they share a seed and are mixed with one another


class Augmentation(Protocol):
    """An augmentation, as `transforms.make` returns it: settings only, so that two have different fingerprints."""

    @property
    def mixes(self) -> bool:
        """Return whether it blends images and their labels."""

    def function(self) -> Callable[[tf.Tensor, Any, tf.Tensor], tuple[tf.Tensor, Any]]:
        """Return (images, labels, key) -> (images, labels); a key is what `key` returns."""


@dataclass(frozen=True)
class Images:
    """Images in a fixed order.

    Attributes:
        pixels: dataset of uint8 batches (any batch size, H, W, 3) or one array (n, H, W, 3), in the order of `keys`.
        keys: one text per image that changes with its pixels, e.g. content hash and image size.
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
        """Yield batches of `GROUP` images, decoded ahead, from index `start`, a multiple of `GROUP`."""
        if isinstance(self.pixels, tf.data.Dataset):
            yield from self.pixels.rebatch(GROUP).skip(start // GROUP).prefetch(4).as_numpy_iterator()
        else:
            yield from (self.pixels[at : at + GROUP] for at in range(start, len(self.pixels), GROUP))


def key(seed: int, *numbers: int | tf.Tensor) -> tf.Tensor:
    """Return the int32 key of shape (2,) that belongs to a seed (0 to 2**32 - 1) and numbers such as epoch and step."""
    value = tf.constant(np.array([seed, 0], np.uint32).view(np.int32))
    for number in numbers:
        value = tf.random.fold_in(value, number)
    return value


def in_views(
    images: Images, start: int, views: int, augment: Augmentation | None, seed: int
) -> Iterator[tuple[int, slice, np.ndarray, np.ndarray]]:
    """Yield (view, rows, float32 images, labels), group by group, each made while the previous one is in use.

    Args:
        images: the images.
        start: index of the first image, a multiple of `GROUP`.
        views: versions of each image; the first is plain.
        augment: needed for more than one view.
        seed: seed of the augmentation.

    Raises:
        ValueError: there are not as many images as keys.
    """

    def each() -> Iterator:
        n, at = len(images.keys), start
        change = tf.function(augment.function(), reduce_retracing=True) if views > 1 else None
        for pixels in images.groups(start):
            rows = slice(at, at + len(pixels))
            at = rows.stop
            if at > n or (len(pixels) < GROUP and at < n):
                break
            plain, labels = pixels.astype("float32"), images.labels[rows]
            yield 0, rows, plain, labels
            for view in range(1, views):
                changed, shares = change(plain, labels, key(seed, view, rows.start))
                yield view, rows, changed.numpy(), shares.numpy()
        if at != n:
            raise ValueError(f"There must be one image for each of {n} keys; there are {at}{' or more' * (at > n)}.")

    return _ahead(each())


def _ahead(items: Iterator) -> Iterator:
    """Yield `items`, each made in a thread while the previous one is in use."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


def mixes_images(augment: Augmentation | None, views: int) -> bool:
    """Return whether views hold blends, whose labels are shares of the classes."""
    return views > 1 and augment is not None and augment.mixes
