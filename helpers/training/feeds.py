"""What `fit` gets: activations of the frozen frontier, computed once, or the images themselves.

cut = frontier.cut(model)  # after the trainable flags are set
banks = feeds.fill_banks(cut, train, val, folder="cache", views=8, augment=augment, seed=7)
feed = feeds.from_banks(cut, banks, batch_size=32, seed=7)  # feeds.whole_model(...) where banks is None
feed.model.compile(...)
feed.model.fit(feed.train, validation_data=feed.val, callbacks=[feed.clock], shuffle=False)
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import keras
import pandas as pd
import tensorflow as tf

from helpers.compute import bank, fast_layers, frontier, hardware, ranks
from helpers.core import words
from helpers.models import unfreezing
from helpers.training import datasets, transforms

SMALL_STEPS = 16  # of a head on pooled features: measured twice as fast as one step a call
VAL_BATCH = 256  # activations are small


@dataclass
class Feed:
    """What `fit` needs: the part of the model that trains, and data made for it.

    Attributes:
        model: the suffix above the frozen frontier, or the whole model; its layers are the model's own.
        train: training data, one epoch long.
        val: validation data for `fit`, in order; of several ranks, each has its part.
        all_val: the same of every validation image, for `predict`.
        clock: the callback that sets the epoch of `train`; `fit` must get it.
        steps: batches an epoch.
        steps_per_execution: steps that `fit` runs in one call; more than one if a step takes less time than its start.
        folders: of the activations; empty when the whole model trains.
    """

    model: keras.Model
    train: tf.data.Dataset
    val: tf.data.Dataset
    all_val: tf.data.Dataset
    clock: keras.callbacks.Callback
    steps: int
    steps_per_execution: int = 1
    folders: list[Path] = field(default_factory=list)

    def remove_cache(self) -> None:
        """Delete the activations; ranks that share them must all be here."""
        ranks.meet()
        for folder in self.folders if ranks.number() == 0 else ():
            shutil.rmtree(folder, ignore_errors=True)
        ranks.meet()

    def close(self, keep: bool = False) -> None:
        """Delete the activations unless `keep`; ranks part here."""
        if not keep:
            self.remove_cache()
        ranks.part()


@dataclass(frozen=True)
class Banks:
    """The activations at the frontier: of the training images in several views, and of the plain validation images."""

    train: bank.Bank
    val: bank.Bank

    @property
    def images_per_second(self) -> float:
        """Images/s of the frozen part, each view counted; 0 if the cache held all of them."""
        return self.train.views * len(self.train) / self.train.seconds if self.train.seconds else 0.0

    def __str__(self) -> str:
        megabytes = (self.train.activations.nbytes + self.val.activations.nbytes) / 1e6
        contents = (
            f"{self.train.views} views of {len(self.train):,} training images and {len(self.val):,} validation images:"
            f" {megabytes:,.1f} MB"
        )
        if not self.images_per_second:
            return f"{contents}, found in the cache."
        return (
            f"{contents}.\nThe training images took {words.duration(self.train.seconds)}:"
            f" {self.images_per_second:,.0f} images/s."
        )


def fill_banks(
    cut: frontier.Cut,
    train: datasets.Folder,
    val: datasets.Folder,
    *,
    folder: Path,
    views: int,
    seed: int,
    augment: transforms.Augmentation | None = None,
    epochs: int = 1,
    cache_gb: float = 20.0,
    next_unfreeze: str | int | float | dict = "none",
) -> Banks | None:
    """Compute once what lies below the frontier, for each image and view; print why if that is impossible.

    Where images are mixed, all labels are float32 shares (n, classes). The first view of each image is plain and each
    other one is mixed with an image of the same group of `bank.GROUP`; the groups are made at random.

    Args:
        cut: from `frontier.cut`.
        train, val: the images.
        folder: the cache, a folder of banks.
        views: augmented versions of each training image to choose from; 0 computes nothing in advance.
        seed: of the augmentation.
        augment: as `transforms.make` returns it.
        epochs: of the training that follows; with 0, nothing is computed.
        cache_gb: disk that the activations may take, in 1e9 bytes.
        next_unfreeze: what the next phase will thaw. Its activations are then computed first, kept for it, and used to
            compute this phase's.
    """
    if not views or not epochs or not cut.is_worth_it:
        reason = "views is 0" if not views else "nothing is trained" if not epochs else _nothing_below(cut)
        print(f"Nothing is computed beforehand: {reason}.")
        return None
    mixes = augment is not None and augment.mixes
    lower = _lower_cut(cut, next_unfreeze)
    images = datasets.shares(datasets.in_random_order(train, seed)) if mixes else train
    plain = datasets.shares(val) if mixes else val
    form = {"views": views, "augment": augment, "seed": seed, "cache_gb": cache_gb, "rounded": hardware.rounds()}
    with ranks.alone():  # one fills them, the others wait for its lock
        filled = bank.fill(lower.prefix, images, plain, folder, **form)
        if filled and lower is not cut:
            filled = _lift(*filled, frontier.cut(lower.suffix).prefix, folder)
    return Banks(*filled) if filled else None


def _nothing_below(cut: frontier.Cut) -> str:
    return f"nothing below {cut.stopped_by} is frozen"


def _lower_cut(cut: frontier.Cut, unfreeze: str | int | float | dict) -> frontier.Cut:
    """Return the cut that the next phase will make if that leaves something frozen, otherwise `cut`."""
    if unfreeze == "none":
        return cut
    unfreezing.unfreeze(cut.model, unfreeze)
    lower = frontier.cut(cut.model)
    unfreezing.unfreeze(cut.model, "none")
    return lower if lower.is_worth_it else cut


def _lift(train: bank.Bank, val: bank.Bank, middle: keras.Model, folder: Path) -> tuple[bank.Bank, bank.Bank]:
    lifted = bank.lift(train, middle, folder, label="training images", rounded=hardware.rounds())
    return lifted, bank.lift(val, middle, folder, label="validation images")


def from_banks(cut: frontier.Cut, banks: Banks, *, batch_size: int, seed: int, balanced: bool = False) -> Feed:
    """Feed the suffix above the frontier with activations.

    Args:
        cut: from `frontier.cut`.
        banks: from `fill_banks`.
        batch_size: images a step.
        seed: of the order and of the view that each epoch takes of an image.
        balanced: draw with replacement, each class equally likely.

    Raises:
        ValueError: images were mixed in their views and are drawn in balance, which would balance one of each pair
            only; or the devices that train together cannot share the batches.
    """
    if balanced and banks.train.labels.ndim > 1:
        raise ValueError(
            "balanced_batches cannot balance images that were mixed when their views were made: the other one of each"
            " pair can have any class. Take views: 0, imbalance: class_weight, or mix: none."
        )
    hardware.share(cut.model)
    steps, several = hardware.steps(len(banks.train), batch_size), hardware.replicas() > 1
    chances = datasets.probabilities(banks.train.labels) if balanced else None
    data, clock = banks.train.batches(batch_size, seed=seed, probabilities=chances)
    together = min(SMALL_STEPS, steps) if len(cut.shape) == 1 and not cut.levels and not several else 1
    suffix, size = faster(cut.suffix), hardware.even_batches(len(banks.val), VAL_BATCH)
    whole = banks.val.in_order(size)
    part = banks.val.in_order(size, ranks.of_all(len(banks.val))) if ranks.replicas() > 1 else whole
    if several:
        with hardware.scope():
            suffix = keras.Model(suffix.input, suffix.output, name=suffix.name)
    return Feed(suffix, data, part, whole, clock, steps, together, [banks.train.folder, banks.val.folder])


def whole_model(
    model: keras.Model,
    train: datasets.Folder,
    val: datasets.Folder,
    *,
    batch_size: int,
    seed: int,
    augment: transforms.Augmentation | None = None,
    balanced: bool = False,
) -> Feed:
    """Feed the whole model with images that are augmented again in every epoch.

    Args:
        model: a classifier whose trainable flags are set.
        train, val: the images.
        batch_size, seed, augment, balanced: as in `datasets.training`.

    Raises:
        ValueError: the devices that train together cannot share the batches.
    """
    hardware.share(model)
    steps = hardware.steps(len(train), batch_size)
    val = datasets.shares(val) if augment is not None and augment.mixes else val
    data, clock = datasets.training(train, batch_size, seed=seed, augment=augment, balanced=balanced)
    size = hardware.even_batches(len(val), bank.GROUP)
    whole = datasets.labelled(val, size)
    several = ranks.replicas() > 1
    part = datasets.labelled(datasets.at(val, ranks.of_all(len(val))), size) if several else whole
    return Feed(faster(model), data, part, whole, clock, steps)


def faster(model: keras.Model) -> keras.Model:
    """Return what trains as fast as this machine allows; its weights are the model's own."""
    alone = hardware.on_cpu() and hardware.replicas() == 1
    return fast_layers.faster(model, rounded=hardware.rounds()) if alone else model


def gain(banks: Banks | None, history: pd.DataFrame) -> str:
    """Return how much time the cache saved, measured while it was filled and while the suffix trained.

    Args:
        banks: from `fill_banks`.
        history: one row an epoch with the column seconds, as in history.csv; a head that was solved has no rates.
    """
    if banks is None or history.empty:
        return "No cache was used."
    if "learning_rate" in history and history["learning_rate"].isna().all():
        return "The cache served the solver: no epochs were trained."
    images, seconds = len(banks.train), history["seconds"].median()
    trained = f"Above the frontier: {images / seconds:,.0f} images/s, {words.duration(seconds)} an epoch."
    if not banks.images_per_second:
        return f"{trained} Below it, everything was found in the cache."
    epochs, again = len(history), images / banks.images_per_second
    saved = epochs * again - banks.train.seconds
    return (
        f"{trained} Below it: {banks.images_per_second:,.0f} images/s.\nWithout the cache, each epoch would take"
        f" {words.duration(again)} longer. Over {epochs} epochs the cache "
        + (f"saves {words.duration(saved)}." if saved > 0 else f"costs {words.duration(-saved)}.")
    )
