"""Standardised features: mean 0 and standard deviation 1 over the training images, as a layer of the head.

Features of several levels differ a thousandfold in size. A solver and an optimiser both need them alike.
"""

from collections.abc import Iterable

import keras
import numpy as np

from helpers.compute import frontier, inference
from helpers.models import classifier
from helpers.training import datasets, feeds

LEAST = 1e-6  # a feature that varies less is taken as constant, and only its mean is taken off


def fit(model: keras.Model, cut: frontier.Cut, banks: feeds.Banks | None, train: datasets.Folder) -> str:
    """Set the layer ``head_scale`` of `model` by the features of the training images, and freeze it.

    Args:
        model: a classifier from `classifier.build`.
        cut: of the model, whose backbone is frozen; the frontier is the features.
        banks: the features of all views, which are used where they are there.
        train: the training images, whose plain features are computed where there are no banks.

    Returns:
        What was done, in a sentence; "" for a head without that layer. Where another run's head was taken, the layer is
        set already, and only frozen.
    """
    layer = layer_of(model)
    if layer is None:
        return ""
    layer.trainable = False
    if (keras.ops.convert_to_numpy(layer.moving_variance) != 1).any():
        return "The features are standardised as in the run that the head comes from."
    if banks is None:
        run = inference.fast(cut.prefix)
        mean, spread = statistics([np.concatenate([run(batch) for batch in train.pixels])])
    else:
        mean, spread = statistics(banks.train.activations)
    layer.set_weights([mean.astype("float32"), np.square(spread).astype("float32")])
    return f"{len(mean):,} features are standardised by the training images."


def layer_of(model: keras.Model) -> keras.layers.BatchNormalization | None:
    """Return the layer that standardises, None where the head has none."""
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
