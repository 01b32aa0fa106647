"""Batches of images for Keras: read from a resized folder, augmented, mixed and sampled, the same for the same seed.

Every draw (order, augmentation, sampling) follows from the seed, the epoch and the step and from nothing else. So a
training that resumes at epoch k sees the same batches as one without an interruption.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from helpers.compute import bank, hardware, ranks, views
from helpers.core import disk, progress, project
from helpers.training import transforms


@dataclass(frozen=True)
class Folder(bank.Images):
    """The images of one part of a resized folder, in the order of images.csv.

    Attributes:
        pixels: every image once, in order, as uint8 batches of shape (<=32, H, W, 3), decoded as they are read.
        keys: what identifies each image's pixels: the raw file's sha256, its box if any, and how it was resized.
        labels: int32 array of shape (n,), indices into `class_names`; float32 shares (n, classes) as `shares` returns.
        paths: of the raw images, below their source.
        files: absolute names of the resized images' files.
        class_names: in the model's order.
        image_size: height and width in pixels.
    """

    paths: list[str]
    files: list[str]
    class_names: list[str]
    image_size: int

    def __len__(self) -> int:
        return len(self.paths)


def read(folder: str | Path, part: str) -> Folder:
    """Read one part ("train", "val" or "test") of a folder written by 02_resize.

    Raises:
        ValueError: the part is empty, or an image has a label that is not among the class names.
    """
    folder = Path(folder)
    table = disk.read_table(folder / "images.csv")
    class_names = disk.read_json(folder / "class_names.json")
    rows = table[table["part"] == part]
    if rows.empty:
        parts = ", ".join(sorted(set(table["part"])))
        raise ValueError(
            f"{project.display_path(folder)} has no {part} images, only {parts}. Check the ratios of 01_split."
        )
    index = {name: number for number, name in enumerate(class_names)}
    if unknown := sorted(set(rows["label"]) - set(index)):
        raise ValueError(
            f"images.csv has labels that class_names.json lacks: {', '.join(unknown)}. Run 02_resize again."
        )
    about = disk.read_json(folder / "resize.json")
    resizing = ":".join(str(about[key]) for key in ("image_size", "fit", "format", "levels") if key in about)
    pixels = rows["sha256"] + (":" + rows["box"] if "box" in rows else "")
    files = [str(folder / file) for file in rows["file"]]
    return Folder(
        pixels=_in_order(files, about["image_size"]),
        keys=[f"{image}:{resizing}" for image in pixels],
        labels=rows["label"].map(index).to_numpy(np.int32),
        paths=list(rows["path"]),
        files=files,
        class_names=class_names,
        image_size=about["image_size"],
    )


def through(run: Callable[[np.ndarray], np.ndarray], images: Folder, label: str) -> np.ndarray:
    """Return the output of a model for every image, in order, (n, ...) in the model's dtype.

    Args:
        run: images (batch, H, W, 3) -> (batch, ...), as `inference.fast` returns it.
        images: the images.
        label: of the progress.
    """
    tracked = progress.track(images.pixels.prefetch(2), total=len(images), step=bank.GROUP, label=label)
    return np.concatenate([run(batch) for batch in tracked])


def decode(file: tf.Tensor, image_size: int) -> tf.Tensor:
    """Return the image file as a uint8 tensor of shape (image_size, image_size, 3)."""
    image = tf.io.decode_image(tf.io.read_file(file), channels=3, expand_animations=False)
    return tf.ensure_shape(image, (image_size, image_size, 3))


@tf.autograph.experimental.do_not_convert
def _in_order(files: list[str], image_size: int) -> tf.data.Dataset:
    names = tf.data.Dataset.from_tensor_slices(files)
    return names.map(lambda file: decode(file, image_size), tf.data.AUTOTUNE, deterministic=True).batch(bank.GROUP)


def labelled(images: Folder, batch_size: int = bank.GROUP) -> tf.data.Dataset:
    """Return (uint8 image batch, label batch) in order, for validation and test: never shuffled, nothing dropped."""
    labels = tf.data.Dataset.from_tensor_slices(images.labels).batch(batch_size)
    data = tf.data.Dataset.zip(images.pixels.rebatch(batch_size), labels)
    return data.apply(tf.data.experimental.assert_cardinality(-(-len(images) // batch_size))).prefetch(2)


def shares(images: Folder) -> Folder:
    """Return the same images with their labels as float32 shares of each class, (n, classes), as mixing needs them."""
    return replace(images, labels=transforms.one_hot(images.labels, len(images.class_names)))


@tf.autograph.experimental.do_not_convert  # converting takes a second, and no Python branch depends on a tensor
def training(
    images: Folder,
    batch_size: int,
    *,
    seed: int,
    augment: transforms.Augmentation | None = None,
    balanced: bool = False,
) -> tuple[tf.data.Dataset, keras.callbacks.Callback]:
    """Return the training data with fresh augmentation in every epoch, and the callback that sets its epoch.

    An epoch holds every image once in a new order, or as many draws, every class equally often, when `balanced`.
    Images are mixed with images of the same batch; labels are float32 shares (batch, classes) then.

    Args:
        images: the training images. They stay in memory if they fit in a quarter of the free memory.
        batch_size: images a step. The last batch of an epoch is smaller; where several devices train together and
            share each batch evenly, it is left out, and holds other images in every epoch.
        seed: decides order and augmentation together with the epoch's number.
        augment: as `transforms.make` returns it.
        balanced: draw with replacement, each class equally likely.
    """
    clock = {"epoch": 0}
    chances = probabilities(images.labels) if balanced else None
    targets = shares(images).labels if augment is not None and augment.mixes else images.labels
    files, labels, count = tf.constant(images.files), tf.constant(targets), len(images)
    steps, part = hardware.steps(count, batch_size), batch_size // ranks.count()
    pixels = tf.concat(list(images.pixels), axis=0) if _fits_in_memory(images) else None
    change = augment.function() if augment is not None else None

    def epoch() -> tuple[np.ndarray, np.int32]:
        rng = np.random.default_rng([seed, clock["epoch"]])
        rows = rng.choice(count, size=count, p=chances) if balanced else rng.permutation(count)
        return ranks.of_batches(rows, batch_size).astype(np.int32), np.int32(clock["epoch"])

    def batches(rows: tf.Tensor, number: tf.Tensor) -> tf.data.Dataset:
        starts = tf.data.Dataset.range(0, steps * part, part, output_type=tf.int32)
        keys = partial(views.key, seed, number)
        return starts.map(lambda at: (rows[at : at + part], keys(at * ranks.count() + ranks.number() * part)))

    def load(rows: tf.Tensor, key: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if pixels is not None:
            batch = tf.gather(pixels, rows)
        else:
            batch = tf.map_fn(
                lambda f: decode(f, images.image_size), tf.gather(files, rows), fn_output_signature=tf.uint8
            )
        batch = tf.cast(batch, tf.float32), tf.gather(labels, rows)
        return change(*batch, key) if change else batch

    begin = tf.data.Dataset.range(1).map(lambda _: tf.numpy_function(epoch, [], (tf.int32, tf.int32)))
    begin = begin.map(lambda rows, number: (tf.ensure_shape(rows, [None]), tf.ensure_shape(number, [])))
    data = begin.flat_map(batches).map(load, tf.data.AUTOTUNE, deterministic=True)
    data = data.apply(tf.data.experimental.assert_cardinality(steps)).prefetch(2)
    return data, keras.callbacks.LambdaCallback(on_epoch_begin=lambda number, logs=None: clock.update(epoch=number))


def sample(images: Folder, count: int, seed: int = 0) -> pd.DataFrame:
    """Return `count` images chosen at random, every class as often as possible: the columns file and label."""
    rows = pd.DataFrame({"file": images.files, "label": [images.class_names[label] for label in images.labels]})
    rows = rows.sample(frac=1, random_state=seed)
    turn = rows.groupby("label").cumcount()
    return rows.assign(turn=turn).sort_values("turn", kind="stable").head(count).drop(columns="turn")


def examples(
    images: Folder, *, classes: int | None = None, each: int = 1, seed: int = 0
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (class name, uint8 images (k, H, W, 3)) with up to `each` images of each of the first `classes` classes."""
    order = np.random.default_rng(seed).permutation(len(images))
    for number, name in enumerate(images.class_names[:classes]):
        rows = [row for row in order if images.labels[row] == number][:each]
        if rows:
            yield name, np.stack([decode(images.files[row], images.image_size).numpy() for row in rows])


def probabilities(labels: np.ndarray) -> np.ndarray:
    """Return the chance of each image, shape (n,), with which every class is drawn equally often; it adds up to 1."""
    counts = np.bincount(labels)
    return 1.0 / (counts[labels] * np.count_nonzero(counts))


def in_random_order(images: Folder, seed: int) -> Folder:
    return at(images, np.random.default_rng(seed).permutation(len(images)))


def at(images: Folder, rows: np.ndarray) -> Folder:
    paths, files, keys = ([values[row] for row in rows] for values in (images.paths, images.files, images.keys))
    pixels = _in_order(files, images.image_size)
    return replace(images, pixels=pixels, keys=keys, labels=images.labels[rows], paths=paths, files=files)


def _fits_in_memory(images: Folder) -> bool:
    return len(images) * images.image_size**2 * 3 < bank.SHARE_OF_RAM * bank.free_memory()
