"""Is this even one of my classes? How far an image lies from all training images, as the network sees them.

The distance is that to the k-th nearest training image, between unit vectors of what the last layer is given (Sun et
al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helpers.core import words

FILE = "novelty.npz"
KNOWN = 300  # training images that are remembered
NEIGHBOUR = 5
LAST = "probabilities"  # the layer whose input is compared


@dataclass(frozen=True)
class Novelty:
    """Distances from what was learned.

    Attributes:
        known: float32 (images, n), unit vectors of training images.
        threshold: distance beyond which an image counts as none of the classes.
        false_alarms: the share of validation images beyond it, as asked for.
    """

    known: np.ndarray
    threshold: float
    false_alarms: float

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Return the distance of each image, 0 to 2, float32 (images,).

        Args:
            features: (images, n), as `features_of` gives them.
        """
        likeness = _unit(features) @ self.known.T
        place = min(NEIGHBOUR, likeness.shape[1])
        nearest = np.partition(likeness, likeness.shape[1] - place, axis=1)[:, likeness.shape[1] - place]
        return np.sqrt(np.maximum(2 - 2 * nearest, 0))

    def flags(self, features: np.ndarray) -> np.ndarray:
        """Return which images count as none of the classes, bool (images,)."""
        return self.distance(features) > self.threshold

    def __str__(self) -> str:
        if not self.false_alarms:
            return "Images of none of the classes are not looked for (false_alarms)."
        return (
            f"{len(self.known):,} training images are remembered. An image counts as none of the classes beyond a"
            f" distance of {self.threshold:.3f}, as {words.percent(self.false_alarms)} of the validation images do."
        )

    def write(self, folder: Path) -> list[str]:
        """Write novelty.npz into a folder, unless nothing is looked for, and return the names of what was written."""
        if not self.false_alarms:
            return []
        known = self.known.astype(np.float16)
        np.savez(folder / FILE, known=known, threshold=self.threshold, false_alarms=self.false_alarms)
        return [FILE]


def read(folder: Path) -> Novelty | None:
    """Return what `Novelty.write` left in a folder; None where it left nothing."""
    if not (folder / FILE).is_file():
        return None
    with np.load(folder / FILE) as found:
        return Novelty(found["known"].astype(np.float32), float(found["threshold"]), float(found["false_alarms"]))


def features_of(model) -> Any:
    """Return a function of images that gives what the last layer of a classifier is given, float32 (images, n).

    Args:
        model: keras.Model as `classifier.build` makes it, or one that averages over its mirror images.
    """
    import keras

    from helpers.compute import inference

    base = base_of(model)
    return inference.fast(keras.Model(base.input, base.get_layer(LAST).input))


def base_of(model) -> Any:
    """Return the classifier within a model that mirrors images or calibrates probabilities.

    Raises:
        ValueError: there is no layer called probabilities.
    """
    if any(layer.name == LAST for layer in model.layers):
        return model
    for layer in model.layers:
        if getattr(layer, "layers", None):
            return base_of(layer)
    raise ValueError(f"The model {model.name!r} has no layer {LAST!r}, which every classifier of Thaw has.")


def fit(model, train, val, *, false_alarms: float, seed: int = 0) -> Novelty:
    """Return distances from up to 300 training images, with the threshold that validation sets.

    Args:
        model: as for `features_of`.
        train, val: datasets.Folder.
        false_alarms: share of the validation images that may lie beyond the threshold; 0 looks at no image.
        seed: of the choice of training images.
    """
    from helpers.training import datasets

    if not false_alarms:
        return Novelty(np.zeros((0, 1), np.float32), np.inf, 0.0)
    run = features_of(model)
    some = np.sort(np.random.default_rng(seed).permutation(len(train))[:KNOWN])
    known = _unit(datasets.through(run, datasets.at(train, some), "features"))
    draft = Novelty(known, np.inf, false_alarms)
    distances = draft.distance(datasets.through(run, val, "features"))
    return Novelty(known, float(np.quantile(distances, 1 - false_alarms, method="higher")), false_alarms)


def _unit(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
