"""How sure is "90 %"? Probabilities corrected on the validation part, and how far they are off.

The calibration becomes the last layers of the run's model, so that every use of the model has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from helpers.evaluation import metrics, tables

Method = Literal["none", "temperature", "vector"]
BINS = 15
SMALLEST = 1e-7  # of a probability, before its logarithm
PULL = 1e-2  # towards no change, for each number of a vector: a class with few images changes little


@dataclass(frozen=True)
class Calibration:
    """Changes to the logarithms of probabilities, before they become probabilities again.

    Attributes:
        scale: their factor, one number, or one for each class.
        shift: the number added then, one number, or one for each class.
        images: how many validation images decided it; 0 for the method "none".
    """

    method: Method
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    images: int

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the calibrated probabilities, (images, classes) in the dtype of the input."""
        if self.method == "none":
            return probabilities
        return softmax(_logits(probabilities) * self.scale + self.shift, axis=1).astype(probabilities.dtype)

    def __str__(self) -> str:
        if self.method == "none":
            return "The probabilities stay as the model gives them."
        of = f"by {self.images:,} validation images"
        if self.method == "vector":
            return f"Each class has its own scale, {min(self.scale):.2f} to {max(self.scale):.2f}, and shift, {of}."
        temperature = 1 / self.scale[0]
        what = "less sure" if temperature > 1 else "more sure"
        return f"Temperature {temperature:.3f}, {of}: the model becomes {what}."


def fit(method: Method, probabilities: np.ndarray, labels: np.ndarray) -> Calibration:
    """Return the calibration with the lowest log loss on validation images.

    Temperature scaling divides all logarithms by one number and changes no prediction; vector scaling gives each class
    its own scale and shift (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).

    Args:
        method: "none", "temperature" or "vector".
        probabilities: of the model on the validation part, (images, classes).
        labels: their classes, integers (images,).

    Raises:
        ValueError: an unknown method, or not one label for each image.
    """
    if method not in get_args(Method):
        raise ValueError(f"calibrate is {method!r}; choose one of {', '.join(get_args(Method))}.")
    if len(probabilities) != len(labels) or not len(labels):
        raise ValueError(f"{len(labels)} labels for {len(probabilities)} rows of probabilities; expected one for each.")
    if method == "none":
        return Calibration("none", (1.0,), (0.0,), 0)
    logits, rows, count = _logits(probabilities), np.arange(len(labels)), probabilities.shape[1]
    parts = 1 if method == "temperature" else count

    def loss(values: np.ndarray) -> float:
        scale, shift = np.exp(values[:parts]), values[parts:] if method == "vector" else 0.0
        pull = PULL * np.square(values).sum() if method == "vector" else 0.0
        return -log_softmax(logits * scale + shift, axis=1)[rows, labels].mean() + pull / len(labels)

    start = np.zeros(parts if method == "temperature" else 2 * parts)
    bounds = [(-4.0, 4.0)] * parts + [(-10.0, 10.0)] * (len(start) - parts)
    solution = minimize(loss, start, method="L-BFGS-B", bounds=bounds).x
    shift = solution[parts:] if method == "vector" else np.zeros(1)
    return Calibration(method, tuple(map(float, np.exp(solution[:parts]))), tuple(map(float, shift)), len(labels))


def within(model, calibration: Calibration):
    """Return a keras.Model that gives the calibrated probabilities of `model`; `model` itself for the method "none".

    Args:
        model: keras.Model, images (batch, H, W, 3) -> probabilities (batch, classes).
        calibration: from `fit`.
    """
    if calibration.method == "none":
        return model
    import keras

    exact = {"dtype": "float32"}
    logits = keras.ops.log(keras.ops.maximum(keras.ops.cast(model.output, "float32"), SMALLEST))
    scale, shift = (list(part) if len(part) > 1 else part[0] for part in (calibration.scale, calibration.shift))
    scaled = keras.layers.Rescaling(scale, shift, name="calibration", **exact)(logits)
    return keras.Model(model.input, keras.layers.Softmax(name="calibrated", **exact)(scaled), name="calibrated_model")


def error(predictions: pd.DataFrame, class_names: Sequence[str], *, seed: int = 0, n_bootstrap: int = 1000) -> dict:
    """Return the expected calibration error with its interval: {"value", "low", "high"}, fractions of 1.

    The bins hold equally many images (Nguyen and O'Connor, 2015), so that no bin is nearly empty. The interval is a
    percentile bootstrap; resampling adds noise to each bin, so that its lower end is never above the value.

    Args:
        predictions: see `tables.predictions_table`.
        class_names: in the model's order.
        seed: of the resamples.
        n_bootstrap: resamples.
    """
    truth, probabilities = tables.parse(predictions, class_names)
    sure, is_correct = probabilities.max(axis=1), truth == tables.picked(predictions, class_names)
    value = _error(sure, is_correct)
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(len(sure), size=len(sure)) for _ in range(n_bootstrap))
    low, high = np.quantile([_error(sure[rows], is_correct[rows]) for rows in drawn], metrics.ENDS)
    return {"value": value, "low": min(float(low), value), "high": float(high)}


def bins(predictions: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """Return confidence against accuracy in bins of equally many images: columns confidence, accuracy, count."""
    truth, probabilities = tables.parse(predictions, class_names)
    sure, is_correct = probabilities.max(axis=1), truth == tables.picked(predictions, class_names)
    parts = _bins(sure)
    return pd.DataFrame({
        "confidence": [sure[part].mean() for part in parts],
        "accuracy": [is_correct[part].mean() for part in parts],
        "count": [len(part) for part in parts],
    })  # fmt: skip


def by_class(predictions: pd.DataFrame, class_names: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """Return for each predicted class by how much the model is too sure of it, those farthest off first.

    Returns:
        Columns label, images (predicted as this class), too_sure (mean confidence minus precision, fractions of 1),
        low and high (95 % bootstrap interval) and verdict: "too sure" or "not sure enough" if the interval does not
        hold 0, otherwise "".
    """
    truth, probabilities = tables.parse(predictions, class_names)
    picked = tables.picked(predictions, class_names)
    gaps = probabilities.max(axis=1) - (truth == picked)
    rng, rows = np.random.default_rng(seed), []
    for index, name in enumerate(class_names):
        own = gaps[picked == index]
        if not len(own):
            continue
        low, high = np.quantile(rng.choice(own, (1000, len(own))).mean(axis=1), metrics.ENDS)
        verdict = "too sure" if low > 0 else "not sure enough" if high < 0 else ""
        rows.append([str(name), len(own), own.mean(), low, high, verdict])
    table = pd.DataFrame(rows, columns=["label", "images", "too_sure", "low", "high", "verdict"])
    return table.sort_values("too_sure", key=np.abs, ascending=False, kind="stable").reset_index(drop=True)


def _logits(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.asarray(probabilities, np.float64), SMALLEST))


def _bins(sure: np.ndarray) -> list[np.ndarray]:
    return np.array_split(np.argsort(sure, kind="stable"), min(BINS, len(sure)))


def _error(sure: np.ndarray, is_correct: np.ndarray) -> float:
    gaps = sure - is_correct
    return float(sum(abs(gaps[part].sum()) for part in _bins(sure)) / len(sure))
