"""What the head reads: which levels of the backbone, and each of its features with mean 0 and standard deviation 1.

Features of several levels differ a thousandfold in size. A solver and an optimiser both need one scale.
"""

from collections.abc import Iterable, Sequence

import keras
import numpy as np
import pandas as pd

from helpers.compute import frontier, inference
from helpers.core import linear
from helpers.models import backbones, classifier
from helpers.models import levels as levels_of
from helpers.training import datasets, feeds

LEAST = 1e-6  # a feature that varies less counts as constant, and only its mean is subtracted
SAMPLE = 2000  # training images, and as many of validation, that decide about levels
STRENGTHS = (1e-3, 1e-2, 1e-1)  # of the linear probe (scikit-learn's C)


def choose_levels(
    levels: str | Sequence[str],
    backbone: str,
    train: datasets.Folder,
    val: datasets.Folder,
    *,
    weights: str,
    pool: levels_of.Pool,
    seed: int,
) -> str | list[str]:
    """Return the levels that the head reads; for "auto", validation decides between "top" and "all".

    A linear probe learns from the plain features of up to SAMPLE training images and is tested on as many of
    validation. So the choice reads 4,000 images at most, in a separate pass. It prints what it tried.

    Args:
        levels: 03's parameter.
        backbone, weights, pool: as in `classifier.build`.
        train, val: the images.
        seed: of the choice of the images.
    """
    if levels != "auto":
        return levels
    body = backbones.build(backbone, train.image_size, weights)
    top = (1 if pool in ("mean", "class") else 2) * body.output.shape[-1]
    run = inference.fast(levels_of.read(body, "all", pool))
    (train_features, labels), (val_features, truth) = (_of_some(run, images, seed) for images in (train, val))
    rows = []
    for name, columns in {"top": slice(-top, None), "all": slice(None)}.items():
        for strength in STRENGTHS:
            probe = linear.fit(linear.classifier(strength, 1e-2), train_features[:, columns], labels)
            chances = np.full((len(truth), len(train.class_names)), 1e-7)
            chances[:, probe.classes_] = np.maximum(probe.predict_proba(val_features[:, columns]), 1e-7)
            loss = -np.log(chances[np.arange(len(truth)), truth]).mean()
            rows.append([name, strength, loss, (chances.argmax(axis=1) == truth).mean()])
    table = pd.DataFrame(rows, columns=["levels", "strength", "val_loss", "val_accuracy"])
    best = table.loc[table["val_loss"].idxmin()]
    print(table.round(4).to_string(index=False))
    print(f"levels: {best['levels']}, whose probe has the lowest loss on {len(truth):,} validation images")
    return best["levels"]


def _of_some(run, images: datasets.Folder, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of up to SAMPLE images, float32 (n, features), and their labels."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(images))[:SAMPLE])
    some = datasets.at(images, rows)
    return datasets.through(run, some, "choose levels"), some.labels


def standardise(model: keras.Model, cut: frontier.Cut, banks: feeds.Banks | None, train: datasets.Folder) -> str:
    """Set the layer ``head_scale`` of `model` by the features of the training images, and freeze it.

    Args:
        model: a classifier from `classifier.build`.
        cut: of the model, whose backbone is frozen; the frontier is the features.
        banks: the features of all views, which are used if there are any.
        train: the training images, whose plain features are computed if there are no banks.

    Returns:
        What was done, in a sentence; "" for a head without that layer. If the head comes from another run, the layer is
        set already, and only frozen.
    """
    layer = scale_of(model)
    if layer is None:
        return ""
    layer.trainable = False
    if (keras.ops.convert_to_numpy(layer.moving_variance) != 1).any():
        return "The features are standardised as in the run that the head comes from."
    if banks is None:
        run = inference.fast(cut.prefix)
        mean, spread = statistics([datasets.through(run, train, "standardise")])
    else:
        mean, spread = statistics(banks.train.activations)
    layer.set_weights([mean.astype("float32"), np.square(spread).astype("float32")])
    return f"{len(mean):,} features are standardised by the training images."


def scale_of(model: keras.Model) -> keras.layers.BatchNormalization | None:
    """Return the layer that standardises, None if the head has none."""
    return next((layer for layer in model.layers if layer.name == classifier.SCALE), None)


def statistics(views: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (float64) of each feature over all views; a constant feature has 1.

    Args:
        views: arrays (images, features) of equal size.
    """
    means, squares = zip(*(_moments(view) for view in views), strict=True)
    mean = np.mean(means, axis=0)
    spread = np.sqrt(np.mean(squares, axis=0) + np.mean(np.square(means - mean), axis=0))
    return mean, np.where(spread > LEAST, spread, 1.0)


def _moments(view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of each feature of one view, in float64 and without a copy of the whole view."""
    mean = view.mean(axis=0, dtype=np.float64)
    parts = np.array_split(view, max(1, len(view) // 4096))
    return mean, sum(np.square(part - mean).sum(axis=0) for part in parts) / len(view)
