"""The linear probe: scikit-learn's logistic regression on standardised features, wherever Thaw judges features."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def classifier(strength: float, tolerance: float = 1e-4) -> Any:
    """Return the probe, not yet fitted.

    Args:
        strength: scikit-learn's C: the larger, the freer the weights.
        tolerance: of the solver.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=tolerance, max_iter=300))


def fit(model: Any, features: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Any:
    """Fit a probe and return it.

    Where the solver reaches its last step, no warning appears: more steps hardly change a class.

    Args:
        model: as `classifier` returns it.
        features: float (images, n).
        labels: one per image.
        weights: the weight of each image, (images,); None for equal weights.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(features, labels, logisticregression__sample_weight=weights)


def best_strength(
    features: np.ndarray,
    labels: np.ndarray,
    rounds: Iterable[tuple[np.ndarray, np.ndarray]],
    strengths: Sequence[float],
    tolerance: float = 1e-4,
) -> float:
    """Return the strength whose probabilities fit held-out images best, by log loss; the first when no image can test.

    Args:
        features: float (images, n).
        labels: class indices (images,).
        rounds: for each, the positions of the images to train on and of those to test on.
        strengths: the candidates.
        tolerance: of the solver.
    """
    from sklearn.metrics import log_loss

    losses = np.zeros(len(strengths))
    for train_rows, test_rows in rounds:
        test_rows = test_rows[np.isin(labels[test_rows], labels[train_rows])]
        if not len(test_rows) or len(np.unique(labels[train_rows])) < 2:
            continue
        for index, strength in enumerate(strengths):
            model = fit(classifier(strength, tolerance), features[train_rows], labels[train_rows])
            probabilities = model.predict_proba(features[test_rows])
            losses[index] += len(test_rows) * log_loss(labels[test_rows], probabilities, labels=model.classes_)
    return strengths[int(np.argmin(losses))]
