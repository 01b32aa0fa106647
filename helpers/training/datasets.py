"""Batches of images for Keras: read from a resized folder, augmented, mixed and sampled, the same for the same seed.

Every draw (order, augmentation, sampling) follows from the seed, the epoch and the step and from nothing else, so a
training that was interrupted and goes on at epoch k sees what an undisturbed one would have seen.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from helpers.compute import bank, fast_layers, frontier, hardware, ranks, views
from helpers.core import runs
from helpers.models import classifier
from helpers.training import transforms

SMALL_STEPS = 16  # of a head on pooled features: measured twice as fast as one by one


@dataclass(frozen=True)
class Folder(bank.Images):
    """The images of one part of a resized folder, in the order of images.csv.

    Attributes:
        pixels: every image once, in order, as uint8 batches of shape (<=32, H, W, 3), decoded as they are read.
        keys: what identifies each image's pixels: the raw file's sha256, its box if any, and how it was resized.
        labels: int32 array of shape (n,), indices into `class_names`; float32 shares (n, classes) as `shares` returns.
        paths: absolute file names.
        class_names: in the model's order.
        image_size: height and width in pixels.
    """

    paths: list[str]
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
    table = pd.read_csv(folder / "images.csv", dtype=str, keep_default_na=False)
    class_names = runs.read_json(folder / "class_names.json")
    rows = table[table["part"] == part]
    if rows.empty:
        parts = ", ".join(sorted(set(table["part"])))
        raise ValueError(
            f"{runs.display_path(folder)} has no {part} images, only {parts}. Check the ratios of 01_split."
        )
    index = {name: number for number, name in enumerate(class_names)}
    if unknown := sorted(set(rows["label"]) - set(index)):
        raise ValueError(
            f"images.csv has labels that class_names.json lacks: {', '.join(unknown)}. Run 02_resize again."
        )
    about = runs.read_json(folder / "resize.json")
    made = ":".join(str(about[key]) for key in ("image_size", "fit", "format"))
    cut = rows["sha256"] + (":" + rows["box"] if "box" in rows else "")
    paths = [str(folder / path) for path in rows["path"]]
    return Folder(
        pixels=_in_order(paths, about["image_size"]),
        keys=[f"{one}:{made}" for one in cut],
        labels=rows["label"].map(index).to_numpy(np.int32),
        paths=paths,
        class_names=class_names,
        image_size=about["image_size"],
    )


def decode(path: tf.Tensor, image_size: int) -> tf.Tensor:
    """Return the image file as a uint8 tensor of shape (image_size, image_size, 3)."""
    image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
    return tf.ensure_shape(image, (image_size, image_size, 3))


def _in_order(paths: list[str], image_size: int) -> tf.data.Dataset:
    files = tf.data.Dataset.from_tensor_slices(paths)
    return files.map(lambda path: decode(path, image_size), tf.data.AUTOTUNE, deterministic=True).batch(bank.GROUP)


def labelled(images: Folder, batch_size: int = bank.GROUP) -> tf.data.Dataset:
    """Return (uint8 image batch, label batch) in order, for validation and test: never shuffled, nothing dropped."""
    labels = tf.data.Dataset.from_tensor_slices(images.labels).batch(batch_size)
    data = tf.data.Dataset.zip(images.pixels.rebatch(batch_size), labels)
    return data.apply(tf.data.experimental.assert_cardinality(-(-len(images) // batch_size))).prefetch(2)


def shares(images: Folder) -> Folder:
    """Return the same images with their labels as float32 shares of each class, (n, classes), as mixing needs them."""
    return replace(images, labels=transforms.one_hot(images.labels, len(images.class_names)))


def training(
    images: Folder,
    batch_size: int,
    *,
    seed: int,
    augment: transforms.Augmentation | None = None,
    balanced: bool = False,
) -> tuple[tf.data.Dataset, keras.callbacks.Callback]:
    """Return the training data with fresh augmentation in every epoch, and the callback that tells it the epoch.

    An epoch holds every image once in a new order, or as many draws, every class equally often, when `balanced`.
    Images are mixed with images of the same batch; labels are float32 shares (batch, classes) then.

    Args:
        images: the training images. They are kept in memory when they fit in a quarter of what is free.
        batch_size: images a step. The last batch of an epoch is smaller; where several devices train at once, which
            share each batch evenly, it is left out, and holds other images in every epoch.
        seed: decides order and augmentation together with the epoch's number.
        augment: as `transforms.make` returns it.
        balanced: draw with replacement, each class equally likely.
    """
    clock = {"epoch": 0}
    chances = probabilities(images.labels) if balanced else None
    targets = shares(images).labels if augment is not None and augment.mixes else images.labels
    paths, labels, count = tf.constant(images.paths), tf.constant(targets), len(images)
    steps, part = hardware.steps(count, batch_size), batch_size // ranks.count()
    pixels = tf.concat(list(images.pixels), axis=0) if _fits_in_memory(images) else None
    change = augment.function() if augment is not None else None

    def epoch() -> tuple[np.ndarray, np.int32]:
        rng = np.random.default_rng([seed, clock["epoch"]])
        drawn = rng.choice(count, size=count, p=chances) if balanced else rng.permutation(count)
        return ranks.of_batches(drawn, batch_size).astype(np.int32), np.int32(clock["epoch"])

    def batches(drawn: tf.Tensor, number: tf.Tensor) -> tf.data.Dataset:
        starts = tf.data.Dataset.range(0, steps * part, part, output_type=tf.int32)
        keys = partial(views.key, seed, number)
        return starts.map(lambda at: (drawn[at : at + part], keys(at * ranks.count() + ranks.number() * part)))

    def load(rows: tf.Tensor, key: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if pixels is not None:
            batch = tf.gather(pixels, rows)
        else:
            batch = tf.map_fn(
                lambda f: decode(f, images.image_size), tf.gather(paths, rows), fn_output_signature=tf.uint8
            )
        batch = tf.cast(batch, tf.float32), tf.gather(labels, rows)
        return change(*batch, key) if change else batch

    begin = tf.data.Dataset.range(1).map(lambda _: tf.numpy_function(epoch, [], (tf.int32, tf.int32)))
    begin = begin.map(lambda drawn, number: (tf.ensure_shape(drawn, [None]), tf.ensure_shape(number, [])))
    data = begin.flat_map(batches).map(load, tf.data.AUTOTUNE, deterministic=True)
    data = data.apply(tf.data.experimental.assert_cardinality(steps)).prefetch(2)
    return data, keras.callbacks.LambdaCallback(on_epoch_begin=lambda number, logs=None: clock.update(epoch=number))


@dataclass
class Feed:
    """What `fit` needs: the part of the model that trains, and data made for it.

    Attributes:
        model: the suffix above the frozen frontier, or the whole model; its layers are the model's own.
        train: training data, one epoch long.
        val: validation data for `fit`, in order; of several ranks, each has its part.
        all_val: the same of every validation image, for `predict`.
        clock: the callback that tells `train` which epoch it is; `fit` must be given it.
        steps: batches an epoch.
        steps_per_execution: steps that `fit` runs in one go; more than one where a step is shorter than its start.
        banks: folders of the activations; empty when the whole model trains.
        summary: one sentence about all this.
    """

    model: keras.Model
    train: tf.data.Dataset
    val: tf.data.Dataset
    all_val: tf.data.Dataset
    clock: keras.callbacks.Callback
    steps: int
    steps_per_execution: int
    banks: list[Path]
    summary: str

    def remove_cache(self) -> None:
        """Delete the activations; ranks that share them must all be here."""
        ranks.meet()
        for folder in self.banks if ranks.number() == 0 else ():
            shutil.rmtree(folder, ignore_errors=True)
        ranks.meet()

    def close(self, keep: bool = False) -> None:
        """Delete the activations unless they are to be kept; ranks part here."""
        if not keep:
            self.remove_cache()
        ranks.part()


def feed(
    model: keras.Model,
    train: Folder,
    val: Folder,
    *,
    cache: Path,
    views: int,
    batch_size: int,
    seed: int,
    augment: transforms.Augmentation | None = None,
    balanced: bool = False,
    cache_gb: float = 20.0,
    next_unfreeze: str | int | float | dict = "none",
) -> Feed:
    """Cut `model` at its frozen frontier and compute once what lies beneath, or leave it whole where that cannot be.

    Args:
        model: a classifier whose trainable flags are set.
        train, val: the images.
        cache: folder for the activations.
        views: augmented versions of each training image to choose from; 0 computes nothing beforehand and augments
            anew in every epoch.
        batch_size, seed, augment, balanced: as in `fitting`.
        cache_gb: disk that the activations may take, in 1e9 bytes.
        next_unfreeze: what the next phase will thaw. Its activations are then computed first, kept for it, and taken to
            compute this phase's from.

    Where images are mixed, all labels are float32 shares (batch, classes). With views, the first of each image is plain
    and each other one is mixed with an image of the same group of `bank.GROUP`; the groups are made at random.

    Raises:
        ValueError: images are to be mixed in views and drawn in balance, which would balance one of each pair only; or
            the devices that train at once cannot share the batches.
    """
    mixes = augment is not None and augment.mixes
    if mixes and balanced and views:
        raise ValueError(
            "balanced_batches cannot balance images that were mixed when their views were made: the other one of each"
            " pair was taken whatever its class. Take views: 0, imbalance: class_weight, or mix: none."
        )
    hardware.share(model)
    val = shares(val) if mixes else val
    steps, several = hardware.steps(len(train), batch_size), hardware.replicas() > 1
    cut = frontier.cut(model) if views else None
    banks = None
    computes = cut is not None and cut.prefix is not None and cut.shape != model.input_shape[1:]  # more than it scales
    if computes:
        lower = _lower_cut(model, next_unfreeze) or cut
        kept = shares(_in_random_order(train, seed)) if mixes else train
        form = {"views": views, "augment": augment, "seed": seed, "cache_gb": cache_gb, "rounded": hardware.rounds()}
        with ranks.alone():  # one fills them, the others wait for its lock
            banks = bank.fill(lower.prefix, kept, val, cache, **form)
            if banks and lower is not cut:
                middle = frontier.cut(lower.suffix).prefix
                filled, plain = banks
                filled = bank.lift(filled, middle, cache, label="training images", rounded=hardware.rounds())
                banks = filled, bank.lift(plain, middle, cache, label="validation images")
    mine = ranks.of_all(len(val))
    if banks is None:
        data, clock = training(train, batch_size, seed=seed, augment=augment, balanced=balanced)
        why = "views is 0" if not views else "no room" if computes else f"nothing below {cut.stopped_by} is frozen"
        size, summary = hardware.even_batches(len(val), bank.GROUP), "The whole model is computed in every step"
        plain = labelled(val, size)
        part = labelled(_at(val, mine), size) if ranks.replicas() > 1 else plain
        return Feed(faster(model), data, part, plain, clock, steps, 1, [], f"{summary}: {why}.")
    filled, plain = banks
    chances = probabilities(train.labels) if balanced else None
    data, clock = filled.batches(batch_size, seed=seed, probabilities=chances)
    summary = (
        f"Everything up to {cut.layer} is computed once: {filled.views} views of {len(train):,} training images and"
        f" {len(val):,} validation images, {cut.shape} each. Training starts there."
    )
    together = min(SMALL_STEPS, steps) if len(cut.shape) == 1 and not several else 1
    suffix, size = faster(cut.suffix), hardware.even_batches(len(val), 256)
    whole = plain.in_order(size)
    part = plain.in_order(size, mine) if ranks.replicas() > 1 else whole
    if several:
        with hardware.scope():
            suffix = keras.Model(suffix.input, suffix.output, name=suffix.name)
    return Feed(suffix, data, part, whole, clock, steps, together, [filled.folder, plain.folder], summary)


def faster(model: keras.Model) -> keras.Model:
    """Return what trains as fast as this machine allows; its weights are the model's own."""
    alone = hardware.on_cpu() and hardware.replicas() == 1
    return fast_layers.faster(model, rounded=hardware.rounds()) if alone else model


def _lower_cut(model: keras.Model, unfreeze: str | int | float | dict) -> frontier.Cut | None:
    """Return the cut that the next phase will make, where it leaves something frozen; the model stays as it is."""
    if unfreeze == "none":
        return None
    classifier.unfreeze(model, unfreeze)
    cut = frontier.cut(model)
    classifier.unfreeze(model, "none")
    return cut if cut.prefix is not None and cut.shape != model.input_shape[1:] else None


def sample(images: Folder, count: int, seed: int = 0) -> pd.DataFrame:
    """Return `count` images chosen at random, every class as often as can be: the columns path and label."""
    rows = pd.DataFrame({"path": images.paths, "label": [images.class_names[label] for label in images.labels]})
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
            yield name, np.stack([decode(images.paths[row], images.image_size).numpy() for row in rows])


def probabilities(labels: np.ndarray) -> np.ndarray:
    """Return the chance of each image, shape (n,), with which every class is drawn equally often; it adds up to 1."""
    counts = np.bincount(labels)
    return 1.0 / (counts[labels] * np.count_nonzero(counts))


def _in_random_order(images: Folder, seed: int) -> Folder:
    return _at(images, np.random.default_rng(seed).permutation(len(images)))


def _at(images: Folder, rows: np.ndarray) -> Folder:
    paths, keys = ([values[row] for row in rows] for values in (images.paths, images.keys))
    pixels = _in_order(paths, images.image_size)
    return replace(images, pixels=pixels, keys=keys, labels=images.labels[rows], paths=paths)


def _fits_in_memory(images: Folder) -> bool:
    return len(images) * images.image_size**2 * 3 < bank.SHARE_OF_RAM * bank.free_memory()
