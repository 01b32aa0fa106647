"""How far an image lies from the training images. A bundle carries this file unchanged; `novelty` makes its input.

The distance is that to the k-th nearest training image, between unit vectors of the last layer's input (Sun et
al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

FILE = "novelty.npz"
NEIGHBOUR = 5


@dataclass(frozen=True)
class Novelty:
    """Distances from the training images.

    Attributes:
        vectors: float64 (images, n), unit vectors of training images.
        threshold: distance beyond which an image counts as none of the classes.
        false_alarms: the requested share of validation images beyond it.
    """

    vectors: np.ndarray
    threshold: float
    false_alarms: float

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Return the distance of each image, 0 to 2, float64 (images,).

        Args:
            features: (images, n), the input of the classifier's last layer.
        """
        # In float64: for two nearly equal vectors, float32 would keep few digits of the difference.
        likeness = unit(features) @ self.vectors.T
        place = min(NEIGHBOUR, likeness.shape[1])
        nearest = np.partition(likeness, likeness.shape[1] - place, axis=1)[:, likeness.shape[1] - place]
        return np.sqrt(np.maximum(2 - 2 * nearest, 0))

    def beyond(self, features: np.ndarray) -> np.ndarray:
        """Return by how much each image is farther than the threshold, float64 (images,): above 0 it is novel."""
        return self.distance(features) - self.threshold

    def flags(self, features: np.ndarray) -> np.ndarray:
        """Return which images count as none of the classes, bool (images,)."""
        return self.beyond(features) > 0

    def __str__(self) -> str:
        if not self.false_alarms:
            return "The run does not look for images of none of the classes (false_alarms)."
        return (
            f"{len(self.vectors):,} training images are remembered. An image counts as none of the classes beyond a"
            f" distance of {self.threshold:.3f}, as {100 * self.false_alarms:.1f} % of the validation images do."
        )

    def write(self, folder: Path) -> list[str]:
        """Write novelty.npz into a folder, unless false_alarms is 0, and return the names of the files."""
        if not self.false_alarms:
            return []
        vectors = self.vectors.astype(np.float16)
        np.savez(folder / FILE, known=vectors, threshold=self.threshold, false_alarms=self.false_alarms)
        return [FILE]


def read(folder: Path) -> Novelty | None:
    """Return what `Novelty.write` wrote into a folder; None if there is nothing."""
    if not (folder / FILE).is_file():
        return None
    with np.load(folder / FILE) as arrays:
        return Novelty(unit(arrays["known"]), float(arrays["threshold"]), float(arrays["false_alarms"]))


def unit(features: np.ndarray) -> np.ndarray:
    """Return rows of length 1, float64."""
    features = np.asarray(features, np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
