"""When should a classifier not answer? Thresholds of confidence that keep a promise, and sets of classes that do.

A promise is made on the validation part, with a guarantee for new images of the same kind. Test then checks it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from helpers.core import promise as rules
from helpers.core import words
from helpers.evaluation import metrics, tables

DOUBT = 0.05  # the chance, over validation parts, that a threshold does not keep the promise
STARTS = (0.2, 0.4, 0.6, 0.8)  # shares of the validation images at which the search for a threshold starts
STEPS = 50  # thresholds tried from 0 to all images


def make(promise: Mapping[str, Any], probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return how a promise is kept, chosen on the validation part.

    Precision and risk: a threshold of confidence for each class, below which there is no answer. From the most
    confident images on, more are answered as long as an exact binomial bound (Clopper and Pearson, 1934) shows that the
    answers keep the promise. The search starts at four places, which share the doubt of 5 % (fixed sequence testing,
    Angelopoulos et al., "Learn then Test", 2021). So for at most 5 of 100 validation parts the promise does not hold
    for new images; by class, this is true for each class.

    Coverage: a level of probability; all classes that reach it are the answer. It holds on average over validation
    parts (split conformal prediction; Sadinle et al., "Least Ambiguous Set-Valued Classifiers", 2019).

    Args:
        promise: see `core.promise.check`.
        probabilities: (images, classes), calibrated as they will be in use.
        labels: true classes, integers (images,).

    Returns:
        The promise and "thresholds" (a number for each class, None for one that can never be answered) or
        "level"; {} without a promise.
    """
    request = rules.check(promise)
    if not request:
        return {}
    rows, count = np.arange(len(labels)), probabilities.shape[1]
    if request["kind"] == "coverage":
        rank = int(np.ceil((len(labels) + 1) * request["wanted"]))
        of_truth = np.sort(probabilities[rows, labels])[::-1]
        return request | {"level": float(of_truth[rank - 1]) if rank <= len(labels) else 0.0}
    goal = request["wanted"] if request["kind"] == "precision" else 1 - request["wanted"]
    picked, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    if request["by"] == "all":
        return request | {"thresholds": [_threshold(sure, picked == labels, goal)] * count}
    own = [picked == index for index in range(count)]
    return request | {"thresholds": [_threshold(sure[mine], (picked == labels)[mine], goal) for mine in own]}


def answered(promise: Mapping[str, Any], probabilities: np.ndarray) -> np.ndarray:
    """Return which images get an answer, bool (images,); with a promise of coverage, those with one class in their set.

    Args:
        promise: from `make`; {} answers every image.
        probabilities: (images, classes).
    """
    if not promise:
        return np.ones(len(probabilities), bool)
    if promise["kind"] == "coverage":
        return sets(promise, probabilities).sum(axis=1) == 1
    least = np.array([np.inf if value is None else value for value in promise["thresholds"]])
    # Files and hosts may round the last digit; an image at the threshold is answered.
    return probabilities.max(axis=1) >= least[probabilities.argmax(axis=1)] - 1e-6


def sets(promise: Mapping[str, Any], probabilities: np.ndarray) -> np.ndarray:
    """Return which classes are in the set of each image, bool (images, classes); the most probable one always is."""
    in_set = probabilities >= promise["level"] - 1e-6
    in_set[np.arange(len(in_set)), probabilities.argmax(axis=1)] = True
    return in_set


def outcome(promise: Mapping[str, Any], predictions: pd.DataFrame, class_names: Sequence[str]) -> dict[str, Any]:
    """Return how a promise holds on the measured images.

    Returns:
        {} without a promise; otherwise what `make` returned and "value" with "low" and "high" (exact binomial
        interval of the precision, or of the share of sets that hold the class; None without answers), "answered"
        (share), "mean_set" (of coverage), "never_answered" (names of classes) and a "sentence".
    """
    if not promise:
        return {}
    truth, probabilities = tables.parse(predictions, class_names)
    goal = words.percent(promise["wanted"])
    if promise["kind"] == "coverage":
        in_set = sets(promise, probabilities)
        kept = int(in_set[np.arange(len(truth)), truth].sum())
        value, n, size = _share(kept, len(truth)), len(truth), float(in_set.sum(axis=1).mean())
        sentence = f"Promised: the set holds the class in {goal}. It does in {_percent(value)} of {n:,} images,"
        return {**promise, **value, "answered": float((in_set.sum(axis=1) == 1).mean()), "mean_set": size,
                "sentence": f"{sentence} with {size:.2f} classes in a set on average."}  # fmt: skip
    is_answered = answered(promise, probabilities)
    correct = int((truth == tables.picked(predictions, class_names))[is_answered].sum())
    n, never = (
        int(is_answered.sum()),
        [str(name) for name, t in zip(class_names, promise["thresholds"], strict=True) if t is None],
    )
    value, share = _share(correct, n), n / len(truth)
    what = (
        f"{goal} of the answers are correct" if promise["kind"] == "precision" else f"{goal} of the answers are wrong"
    )
    if len(never) == len(class_names):
        sentence = f"Promised: {what}. The validation images are too few or too uncertain for it: no answer is given."
    else:
        sentence = (
            f"Promised: {what}. {words.percent(share)} of the images are answered, {_percent(value)} of them correctly."
        )
        if never:
            sentence += f" Never answered, since no promise is possible: {', '.join(never)}."
    return {**promise, **value, "answered": share, "never_answered": never, "sentence": sentence}


def risk_and_coverage(predictions: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """Return the share of wrong answers among the most confident images, for every share of images answered.

    Returns:
        Columns coverage (share answered), risk (share of the answers that is wrong) and threshold (of confidence).
    """
    truth, probabilities = tables.parse(predictions, class_names)
    order = np.argsort(-probabilities.max(axis=1), kind="stable")
    wrong = (truth != tables.picked(predictions, class_names))[order]
    number = np.arange(1, len(order) + 1)
    sure = probabilities.max(axis=1)[order]
    table = pd.DataFrame({"coverage": number / len(order), "risk": np.cumsum(wrong) / number, "threshold": sure})
    return table[np.append(sure[1:] < sure[:-1], True)].reset_index(
        drop=True
    )  # images with equal confidence are answered together


def _threshold(sure: np.ndarray, is_correct: np.ndarray, goal: float) -> float | None:
    """Return the lowest confidence from which the answers provably keep a precision, None if there is none."""
    order = np.argsort(-sure, kind="stable")
    sure, correct, n = sure[order], np.cumsum(is_correct[order]), len(sure)
    # The best possible bound does not depend on the labels, so places that cannot pass cost no doubt.
    places = [max(1, round(share * n)) for share in STARTS if n]
    starts = places
    while starts and goal ** starts[0] > DOUBT / len(starts):
        starts = starts[1:]
    best = 0
    for start in starts:
        for place in range(start, n + 1, max(1, n // STEPS)):
            here = int(np.searchsorted(-sure, -sure[place - 1], side="right"))  # with all of equal confidence
            bound = (
                binomtest(int(correct[here - 1]), here).proportion_ci(1 - 2 * DOUBT / len(starts), method="exact").low
            )
            if bound < goal:
                break
            best = max(best, here)
    return float(sure[best - 1]) if best else None


def _share(count: int, n: int) -> dict[str, float | None]:
    if not n:
        return {"value": None, "low": None, "high": None}
    exact = binomtest(count, n).proportion_ci(metrics.LEVEL, method="exact")
    return {"value": count / n, "low": float(exact.low), "high": float(exact.high)}


def _percent(value: Mapping[str, Any]) -> str:
    if value["value"] is None:
        return "none"
    return f"{words.percent(value['value'])} ({words.percent(value['low'])} to {words.percent(value['high'])})"
