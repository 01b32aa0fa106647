"""What `fit` gets: the frozen activations where the frontier allows it, else the images."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import keras
import tensorflow as tf

from helpers.compute import bank, fast_layers, frontier, hardware, ranks
from helpers.models import unfreezing
from helpers.training import datasets, transforms

SMALL_STEPS = 16  # of a head on pooled features: measured twice as fast as one by one


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
    train: datasets.Folder,
    val: datasets.Folder,
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
    val = datasets.shares(val) if mixes else val
    steps, several = hardware.steps(len(train), batch_size), hardware.replicas() > 1
    cut = frontier.cut(model) if views else None
    banks = None
    computes = cut is not None and cut.prefix is not None and cut.shape != model.input_shape[1:]  # more than it scales
    if computes:
        lower = _lower_cut(model, next_unfreeze) or cut
        kept = datasets.shares(datasets.in_random_order(train, seed)) if mixes else train
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
        data, clock = datasets.training(train, batch_size, seed=seed, augment=augment, balanced=balanced)
        why = "views is 0" if not views else "no room" if computes else f"nothing below {cut.stopped_by} is frozen"
        size, summary = hardware.even_batches(len(val), bank.GROUP), "The whole model is computed in every step"
        plain = datasets.labelled(val, size)
        part = datasets.labelled(datasets.at(val, mine), size) if ranks.replicas() > 1 else plain
        return Feed(faster(model), data, part, plain, clock, steps, 1, [], f"{summary}: {why}.")
    filled, plain = banks
    chances = datasets.probabilities(train.labels) if balanced else None
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
    unfreezing.unfreeze(model, unfreeze)
    cut = frontier.cut(model)
    unfreezing.unfreeze(model, "none")
    return cut if cut.prefix is not None and cut.shape != model.input_shape[1:] else None
