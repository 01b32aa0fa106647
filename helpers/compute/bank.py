"""The bank: the output of a frozen prefix for every image and augmented view, computed once and kept on disk.

A bank is a folder named after its fingerprint, so that any run with the same prefix, images, augmentation, number of
views and seed finds it again; several runs with one folder share their banks.

    banks = bank.fill(cut.prefix, train_images, val_images, out / "cache", views=8, augment=augment)
    train, val = banks  # banks is None when they would not fit
    data, clock = train.batches(64, seed=seed)
    cut.suffix.fit(data, validation_data=val.in_order(256), epochs=50, shuffle=False, callbacks=[clock])
"""

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from filelock import FileLock

from helpers.compute import graphs, hardware, inference, ranks
from helpers.compute.views import GROUP, Augmentation, Images, in_views, mixes_images
from helpers.core import disk, progress
from helpers.core.machine import free_memory

FORMAT = 2  # raise it when the same settings give different files
SECONDS_BETWEEN_MARKS = 5
SHARE_OF_RAM = 0.25  # of the free memory: a smaller bank is copied to memory
SHARE_OF_DISK = 0.9  # of the free disk space


@dataclass
class Bank:
    """Activations of `views` versions of n images; view 0 is the plain image.

    Attributes:
        activations: (views, n, *shape) float16 or float32, memory-mapped, read-only.
        labels: (n,) class indices, (n, classes) shares, or (views, n, classes) shares where augmentation mixes images.
        folder: its folder.
        seconds: the time to compute all of it, measured during the computation; 0 where it was on disk already.
    """

    activations: np.ndarray
    labels: np.ndarray
    folder: Path
    seconds: float = 0.0
    _epoch: int = field(default=0, repr=False)

    @property
    def views(self) -> int:
        return self.activations.shape[0]

    def __len__(self) -> int:
        return self.activations.shape[1]

    def in_order(self, batch_size: int, rows: np.ndarray | None = None) -> tf.data.Dataset:
        """Return batches (activations float32, labels) of every plain image, or of those at `rows`, in order."""
        rows = np.arange(len(self)) if rows is None else rows
        return self._dataset(batch_size, lambda: rows, None, -(-len(rows) // batch_size))

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        probabilities: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> tuple[tf.data.Dataset, keras.callbacks.Callback]:
        """Return the training data and the callback that sets its epoch.

        An epoch holds `draw(bank, seed, epoch, probabilities)`: it depends only on the seed and the epoch's number, so
        training that resumes in epoch k sees the same as uninterrupted training. For that, pass the callback to `fit`;
        without it every epoch is the first.

        Args:
            batch_size: images per batch. The last batch is smaller; if several devices train together it is left out,
                and holds different images in every epoch. With several ranks, each gets its part of each batch.
            seed: seed of the order and the views.
            probabilities: (n,) chance of each image to be drawn, adding up to 1, e.g. for balanced classes.
            weights: (n,) weight of each image in the loss; batches then are (activations, labels, weights).

        Raises:
            ValueError: `probabilities` or `weights` do not have one value per image.
        """
        for name, values in {"probabilities": probabilities, "weights": weights}.items():
            if values is not None and np.shape(values) != (len(self),):
                raise ValueError(
                    f"`{name}` must have one value for each of {len(self)} images; got {np.shape(values)}."
                )
        steps, part = hardware.steps(len(self), batch_size), batch_size // ranks.count()

        def rows() -> np.ndarray:
            return ranks.of_batches(draw(self, seed, self._epoch, probabilities), batch_size)

        data = self._dataset(part, rows, weights, steps)
        return data, keras.callbacks.LambdaCallback(on_epoch_begin=self._set_epoch)

    def _set_epoch(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch = epoch

    @tf.autograph.experimental.do_not_convert
    def _dataset(self, batch_size: int, rows: Callable, weights: np.ndarray | None, steps: int) -> tf.data.Dataset:
        read = self._reader(weights)
        epoch = tf.data.Dataset.range(1).map(lambda _: tf.ensure_shape(tf.numpy_function(rows, [], tf.int64), [None]))
        data = epoch.flat_map(
            lambda drawn: tf.data.Dataset.range(0, steps * batch_size, batch_size).map(
                lambda at: drawn[at : at + batch_size]
            )
        )
        data = data.map(read, num_parallel_calls=2, deterministic=True)
        data = data.apply(tf.data.experimental.assert_cardinality(steps)).prefetch(4)
        options = tf.data.Options()
        options.autotune.enabled = False  # nothing to tune here, and its thread sometimes needs half a second to end
        return data.with_options(options)

    def _reader(self, weights: np.ndarray | None) -> Callable[[tf.Tensor], tuple]:
        """Return the function from row numbers (view * n + image, int64) to a batch."""
        take, count = _taker(self.activations.reshape(-1, *self.activations.shape[2:])), len(self)
        per_view = self.labels.ndim == 3
        labels = tf.constant(self.labels.reshape(-1, self.labels.shape[-1]) if per_view else self.labels)
        weights = None if weights is None else tf.constant(weights, tf.float32)

        def read(rows: tf.Tensor) -> tuple:
            image = rows % count
            batch = tf.cast(take(rows), tf.float32), tf.gather(labels, rows if per_view else image)
            return batch if weights is None else (*batch, tf.gather(weights, image))

        return read


def draw(bank: Bank, seed: int, epoch: int, probabilities: np.ndarray | None = None) -> np.ndarray:
    """Return the rows (view * n + image, int64) that an epoch holds, in order.

    It holds every image once, in a new order and as the next of its views, so that after `views` epochs each image has
    been seen as each of its views. With `probabilities` it holds n draws with replacement, each in a random view.
    """
    n, rng = len(bank), np.random.default_rng([seed, 1 + epoch])
    if probabilities is not None:
        return rng.integers(bank.views, size=n) * n + rng.choice(n, size=n, p=probabilities)
    first_views, order = np.random.default_rng([seed, 0]).integers(bank.views, size=n), rng.permutation(n)
    return (first_views[order] + epoch) % bank.views * n + order


def _taker(table: np.ndarray) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return the function that gathers rows of `table`, from memory when it fits there."""
    if table.nbytes <= SHARE_OF_RAM * free_memory():
        kept = tf.constant(table)
        return lambda rows: tf.gather(kept, rows)
    shape = (None, *table.shape[1:])
    return lambda rows: tf.ensure_shape(tf.numpy_function(lambda at: table[at], [rows], table.dtype), shape)


def fill(
    prefix: keras.Model,
    train: Images,
    val: Images,
    folder: str | os.PathLike,
    *,
    views: int,
    augment: Augmentation | None = None,
    seed: int = 0,
    cache_gb: float = 20.0,
    rounded: bool = False,
) -> tuple[Bank, Bank] | None:
    """Return the banks of the training images in `views` views and of the plain validation images.

    They are kept as float16, or as float32 where float16 cannot hold them. When they would need more than `cache_gb` or
    most of the free disk, they hold fewer views. When not even two views fit (one, without augmentation), print the
    reason and return None: then train the whole model.

    Args:
        prefix: frozen model, images -> activations.
        train: training images. Where `augment` mixes images (MixUp, CutMix), in shuffled order, with shares as labels.
        val: validation images.
        folder: folder of banks; each bank gets a folder in it.
        views: versions of each training image, at least 1; the first is plain, the others augmented.
        augment: as `transforms.make` returns it.
        seed: seed of the augmentation.
        cache_gb: disk that the two banks may take, in 1e9 bytes.
        rounded: compute the training images as `inference.fast` does with `rounded`; validation is always exact.

    Raises:
        ValueError: the shape of the activations is not fixed; or as `make`.
    """
    if None in prefix.output_shape[1:]:
        raise ValueError(
            f"A cache needs activations of one shape, got {prefix.output_shape}. Set a fixed input size of the model."
        )
    views = views if augment is not None else 1
    for dtype in ("float16", "float32"):
        fitting = _views_that_fit(prefix, (len(train.keys), len(val.keys)), Path(folder), views, cache_gb, dtype)
        if fitting < min(views, 2):
            return None
        try:
            val_bank = make(prefix, val, folder, dtype=dtype, label="validation images")
            form = {"views": fitting, "augment": augment, "seed": seed, "dtype": dtype, "rounded": rounded}
            return make(prefix, train, folder, **form), val_bank
        except OverflowError as error:
            print(f"{error} The cache uses float32.")
    return None


def _views_that_fit(
    prefix: keras.Model, counts: tuple[int, int], folder: Path, views: int, cache_gb: float, dtype: str
) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    train, val = (count * int(np.prod(prefix.output_shape[1:])) * np.dtype(dtype).itemsize / 1e9 for count in counts)
    held = sum(path.stat().st_blocks * 512 for path in folder.rglob("*.npy"))
    room = min(cache_gb, (SHARE_OF_DISK * shutil.disk_usage(folder).free + held) / 1e9)
    fitting = ranks.agreed(int(np.clip((room - val) // train, 0, views)))
    if fitting < views:
        kept = f"{fitting} views are kept" if fitting >= min(views, 2) else "nothing is cached, the whole model trains"
        print(f"A cache of {views} views takes {views * train + val:.3g} GB, there is room for {room:.3g} GB: {kept}.")
    return fitting


def make(
    prefix: keras.Model,
    images: Images,
    folder: str | os.PathLike,
    *,
    views: int = 1,
    augment: Augmentation | None = None,
    seed: int = 0,
    dtype: str = "float16",
    label: str = "training images",
    rounded: bool = False,
) -> Bank:
    """Return one bank: read from `folder` if it is there, continued if it was interrupted, made otherwise.

    Args:
        label: the name of the images in messages.
        rounded: as in `inference.fast`. The other arguments are those of `fill`.

    Raises:
        OverflowError: `dtype` cannot hold the activations.
        ValueError: the prefix gives no finite number for an image, or there are not as many images as keys.
    """
    settings = _settings(prefix, images, views, augment, seed, dtype) | {"rounded": rounded}
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
    home = Path(folder) / name
    home.mkdir(parents=True, exist_ok=True)
    count, seconds = len(images.keys), 0.0
    with FileLock(home / "lock"):
        mark = home / "bank.json"
        done = disk.read_json(mark)["done"] if mark.exists() else 0
        if done < count:
            begin = time.monotonic()
            _Filling(prefix, images, home, views, augment, seed, dtype, label, rounded).run(done, settings)
            seconds = (time.monotonic() - begin) * count / (count - done)
        else:
            print(f"Cache of the {label}: {views} x {count:,} are there already.")
    labels = np.load(home / "labels.npy") if mixes_images(augment, views) else np.asarray(images.labels)
    return Bank(np.load(home / "activations.npy", mmap_mode="r"), labels, home, seconds)


def lift(lower: Bank, middle: keras.Model, folder: str | os.PathLike, *, label: str, rounded: bool = False) -> Bank:
    """Return the bank of a higher frontier, computed from the bank of a lower one instead of from the images.

    Args:
        lower: a bank of `fill`.
        middle: frozen model, the lower bank's activations -> those of the higher frontier.
        folder, label, rounded: as in `make`.
    """
    count, views = len(lower), lower.views
    below = lower.activations.reshape(views * count, *lower.activations.shape[2:])
    rows = Images(below, [f"{lower.folder.name}:{row}" for row in range(views * count)], np.zeros(views * count))
    form = {"label": label, "rounded": rounded}
    try:
        upper = make(middle, rows, folder, dtype=str(below.dtype), **form)
    except OverflowError:
        upper = make(middle, rows, folder, dtype="float32", **form)
    lifted = upper.activations.reshape(views, count, *upper.activations.shape[2:])
    seconds = lower.seconds + upper.seconds if lower.seconds and upper.seconds else 0.0
    return Bank(lifted, lower.labels, upper.folder, seconds)


@dataclass(frozen=True)
class _Filling:
    """The making of one bank. A part that is made twice is the same, so the making can resume anywhere."""

    prefix: keras.Model
    images: Images
    home: Path
    views: int
    augment: Augmentation | None
    seed: int
    dtype: str
    label: str
    rounded: bool

    def run(self, done: int, settings: dict[str, Any]) -> None:
        """Write the activations from image `done` on, and record the progress every few seconds."""
        n, start, last_mark = len(self.images.keys), done // GROUP * GROUP, time.monotonic()
        mixes = mixes_images(self.augment, self.views)
        activations = self._open("activations", self.prefix.output_shape[1:], self.dtype, done)
        labels = self._open("labels", self.images.labels.shape[1:], "float32", done) if mixes else None
        predict, total = inference.fast(self.prefix, rounded=self.rounded), (n - start) * self.views
        parts = in_views(self.images, start, self.views, self.augment, self.seed)
        parts = progress.track(parts, total=total, unit="view", step=GROUP, label=f"cache {self.label}")
        for view, rows, outputs, targets in _predicted(parts, predict):
            activations[view, rows] = self._checked(outputs, rows)
            if mixes:
                labels[view, rows] = targets
            is_whole = view == self.views - 1
            if is_whole and (rows.stop == n or time.monotonic() - last_mark > SECONDS_BETWEEN_MARKS):
                for file in (activations, labels) if mixes else (activations,):
                    file.flush()
                disk.write_json(self.home / "bank.json", {"done": rows.stop, "settings": settings})
                last_mark = time.monotonic()

    def _open(self, name: str, shape: Sequence[int], dtype: str, done: int) -> np.memmap:
        if done:
            return np.lib.format.open_memmap(self.home / f"{name}.npy", mode="r+")
        shape = (self.views, len(self.images.keys), *shape)
        file = np.lib.format.open_memmap(self.home / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):  # otherwise a full disk would end the process with SIGBUS
            with open(self.home / f"{name}.npy", "r+b") as whole:
                os.posix_fallocate(whole.fileno(), 0, os.fstat(whole.fileno()).st_size)
        return file

    def _checked(self, activations: np.ndarray, rows: slice) -> np.ndarray:
        """Return activations in the bank's type after a check that it can hold them."""
        peak, limits = np.abs(activations).max(), np.finfo(self.dtype)
        if not np.isfinite(peak):
            raise ValueError(f"The frozen layers give no finite number for one of {list(self.images.keys[rows])}.")
        if peak > limits.max or 0 < peak < limits.tiny:
            raise OverflowError(
                f"{self.dtype} cannot hold the activations of the {self.label}, which reach {peak:.3g}."
            )
        return activations.astype(self.dtype)


def _predicted(parts: Iterator[tuple], predict: Callable[[np.ndarray], np.ndarray]) -> Iterator[tuple]:
    """Yield (view, rows, outputs, labels) for each part of `views.in_views`, in the fastest batch size."""
    first = next(parts)
    size = inference.quickest_batch(predict, first[2])
    parts = itertools.chain([first], parts)
    while together := list(itertools.islice(parts, size // len(first[2]))):
        outputs = predict(np.concatenate([batch for _, _, batch, _ in together]))
        ends = np.cumsum([len(batch) for _, _, batch, _ in together])
        for (view, rows, _, labels), group_outputs in zip(together, np.split(outputs, ends[:-1]), strict=True):
            yield view, rows, group_outputs, labels


def _settings(
    prefix: keras.Model, images: Images, views: int, augment: Augmentation | None, seed: int, dtype: str
) -> dict[str, Any]:
    """Return, as JSON values, all settings that determine a bank."""
    mixes = mixes_images(augment, views)
    if mixes and np.ndim(images.labels) != 2:
        raise ValueError(f"MixUp and CutMix need labels (n, classes), one-hot; got shape {np.shape(images.labels)}.")
    return {
        "format": FORMAT,
        "prefix": graphs.signature(prefix),
        "images": graphs.digest(*(key.encode() for key in images.keys)),
        "labels": graphs.digest(np.asarray(images.labels, "float32")) if mixes else "",
        "views": views,
        "augment": [GROUP, seed, graphs.structure(augment)] if views > 1 else None,
        "dtype": dtype,
    }
