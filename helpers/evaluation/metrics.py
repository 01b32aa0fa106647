"""What a model's predictions are worth: metrics with intervals.

Intervals are 95 % percentile bootstrap intervals (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
ch. 13), resampled within each true class. Resampling should repeat how the data was drawn (Davison and Hinkley,
"Bootstrap Methods and their Application", 1997, ch. 3): our splits are stratified, so the test part's class counts are
fixed by design, not by chance; and no resample can lose a rare class, so that every metric is defined in each of them.
Images of one group (a patient, a panel) are drawn together, since they say less than as many independent images. The
intervals show how far the choice of test images may have moved a number; they do not include the chance of another
training seed.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from helpers.core import words
from helpers.evaluation import details, tables

LEVEL = 0.95
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
CARDS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "top3_accuracy": "top-3 accuracy",
    "auc": "AUC",
    "log_loss": "log loss",
    "ece": "calibration error",
}  # at the top of a report
NAMES = CARDS | {
    "top5_accuracy": "top-5 accuracy",
    "macro_fbeta": "macro F-beta",
    "average_precision": "average precision",
    "brier": "Brier score",
    "kappa": "Cohen's kappa",
    "matthews": "Matthews correlation",
}
TOP = {"top3_accuracy": 3, "top5_accuracy": 5}


METHOD = "percentile bootstrap, stratified by true class"


def metrics(
    predictions: pd.DataFrame,
    class_names: Sequence[str],
    seed: int = 0,
    n_bootstrap: int = 2000,
    *,
    groups: Sequence[str] | None = None,
    beta: float = 1.0,
) -> dict:
    """Return everything that metrics.json holds about one set of predictions.

    Balanced accuracy, macro F1 and AUC are means over the classes that the test part holds. Top-3 and top-5 accuracy
    are there if there are more classes than that. AUC is the area under the ROC curve, average precision that under
    the precision-recall curve: of the second class for two, otherwise the mean of each class against the rest.
    The Brier score is half the usual sum for two classes, as in scikit-learn. ECE is the expected calibration error
    in 15 equal bins (Guo et al., 2017).

    A metric without any mistake cannot vary between resamples: an interval without width would
    claim too much. Accuracy then has the exact binomial interval (Clopper and Pearson, 1934), the others none (None).

    Args:
        predictions: see `tables.predictions_table`.
        class_names: in the model's order.
        seed: of the resampling.
        n_bootstrap: resamples.
        groups: of each image; images of one group are drawn together.
        beta: recall counts `beta` times as much as precision in macro F-beta, which is left out if it is 1.

    Raises:
        ValueError: there are no `predictions`, or there are more or fewer groups than images.

    Returns:
        A dict of plain Python values. `accuracy` and so on are {"value", "low", "high"}, fractions of 1 (log loss in
        nats); per_class, confusion_matrix, confused_pairs and reliability are lists.
    """
    truth, probabilities = tables.parse(predictions, class_names)
    picked = tables.picked(predictions, class_names)
    names = [str(name) for name in class_names]
    scores = Scores(truth, picked, probabilities, beta)
    every = np.ones((1, len(truth)))
    once = scores.of(every) | scores.areas(every)
    resampled = _bootstrap(scores, truth, seed=seed, n_bootstrap=n_bootstrap, groups=groups)
    matrix = tables.confusion_matrix(predictions, names)
    result = {"n": len(truth), "n_classes": len(names), "n_correct": int((truth == picked).sum())}
    for name in NAMES:
        if name in once and np.isfinite(once[name][0]):
            result[name] = _interval(name, float(once[name][0]), resampled[name], result)
    method = METHOD if groups is None or len(set(groups)) == len(truth) else f"{METHOD}, by group"
    result["interval"] = {"level": LEVEL, "method": method, "resamples": n_bootstrap, "seed": seed}
    result |= {"beta": beta} if beta != 1 else {}
    result["interval"]["auc_resamples"] = len(resampled["auc"])
    result["class_names"] = names
    result["per_class"] = _records(details.per_class(predictions, names))
    result["confusion_matrix"] = matrix.tolist()
    result["confused_pairs"] = _records(details.confused_pairs(matrix, names))
    result["reliability"] = _records(details.reliability(predictions, names))
    return result


def metrics_table(result: dict) -> pd.DataFrame:
    """Return the headline metrics of `metrics` for display: columns value, low, high; a row for each metric in it."""
    rows = {title: result[name] for name, title in NAMES.items() if name in result}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"]).astype(float).round(4)


def errors_text(errors: dict[str, dict]) -> str:
    """Return calibration errors with their intervals in one line.

    Args:
        errors: name -> {"value", "low", "high"}, as `calibration.error` returns it.
    """
    parts = [
        f"{name} {words.percent(one['value'])} ({words.percent(one['low'])} to {words.percent(one['high'])})"
        for name, one in errors.items()
    ]
    return f"Expected calibration error: {', '.join(parts)}"


def headline(result: dict, published: dict[str, float] | None = None) -> str:
    """Return one line for the end of a run: accuracy with its interval, and published results if there are any.

    Args:
        result: from `metrics`; a key `part` is "val" if it was not the test part.
        published: name -> accuracy, in percent or as a fraction.
    """
    value, low, high = (words.percent(result["accuracy"][key]) for key in ("value", "low", "high"))
    parts = [
        f"accuracy {value} (95 % interval {low} to {high})",
        f"balanced accuracy {words.percent(result['balanced_accuracy']['value'])}",
        f"macro F1 {words.percent(result['macro_f1']['value'])}",
        f"{result['n']:,} {'validation' if result.get('part') == 'val' else 'test'} images",
    ]
    figures = [f"{name} {words.percent(as_fraction(value), 2)}" for name, value in (published or {}).items()]
    return ", ".join(parts) + (f"; published: {', '.join(figures)}" if figures else "")


def as_fraction(value: float) -> float:
    """Return a published figure as a fraction: 88.42 and 0.8842 are the same."""
    return float(value) / 100 if float(value) > 1 else float(value)


class Scores:
    """The metrics of any number of weighted copies of one test part, all together, as matrix products."""

    def __init__(self, truth: np.ndarray, picked: np.ndarray, probabilities: np.ndarray, beta: float = 1.0):
        count, rows = probabilities.shape[1], np.arange(len(truth))
        self.truth, self.probabilities, self.beta = truth, probabilities, beta
        self.present = np.unique(truth)
        self.right = (truth == picked).astype(float)
        self.truths, self.guesses = np.eye(count)[truth], np.eye(count)[picked]
        self.hits = self.truths * self.right[:, None]
        of_truth = probabilities[rows, truth]
        self.surprise = -np.log(np.clip(of_truth, np.finfo(np.float32).eps, 1.0))
        self.squares = np.square(probabilities - self.truths).sum(axis=1) / (2 if count == 2 else 1)
        # Counted by rank, not by argsort, so that ties do not depend on the order of the classes.
        above = (probabilities > of_truth[:, None]).sum(axis=1)
        self.in_top = {name: (above < k).astype(float) for name, k in TOP.items() if count > k}
        confidence = probabilities.max(axis=1)
        self.gaps = np.eye(details.BINS)[details.bins_of(confidence, details.BINS)] * (confidence - self.right)[:, None]

    def of(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return every metric except the areas, for weights (resamples, images).

        Returns:
            name -> float64 (resamples,).
        """
        total, hits = weights.sum(axis=1), weights @ self.hits
        support, guesses = weights @ self.truths, weights @ self.guesses
        recalls = np.divide(hits, support, out=np.full(hits.shape, np.nan), where=support > 0)
        by_chance = (support * guesses).sum(axis=1) / total**2
        agreed = weights @ self.right / total
        spread = (1 - np.square(guesses / total[:, None]).sum(axis=1)) * (
            1 - np.square(support / total[:, None]).sum(axis=1)
        )
        scores = {
            "accuracy": agreed,
            "balanced_accuracy": np.nanmean(recalls[:, self.present], axis=1),
            "macro_f1": self._f(hits, support, guesses, 1.0),
            "log_loss": weights @ self.surprise / total,
            "ece": np.abs(weights @ self.gaps).sum(axis=1) / total,
            "brier": weights @ self.squares / total,
            "kappa": _ratio(agreed - by_chance, 1 - by_chance, np.nan),
            "matthews": _ratio(agreed - by_chance, np.sqrt(spread), 0.0),
        }
        if self.beta != 1:
            scores["macro_fbeta"] = self._f(hits, support, guesses, self.beta)
        return scores | {name: weights @ inside / total for name, inside in self.in_top.items()}

    def areas(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return AUC and average precision for weights as above: float64 (resamples,), NaN if there is one class."""
        if len(self.present) < 2:
            return {name: np.full(len(weights), np.nan) for name in AREAS}
        classes = [1] if self.probabilities.shape[1] == 2 else self.present
        return dict(zip(AREAS, np.nanmean([self._areas_of(weights, index) for index in classes], axis=0), strict=True))

    def _f(self, hits: np.ndarray, support: np.ndarray, guesses: np.ndarray, beta: float) -> np.ndarray:
        """Return the mean F-beta over the classes that the test part holds."""
        scores = _ratio((1 + beta**2) * hits, beta**2 * support + guesses, 0.0)
        return np.where(support > 0, scores, np.nan)[:, self.present].mean(axis=1, where=support[:, self.present] > 0)

    def _areas_of(self, weights: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return weighted AUC and average precision of a class against the rest.

        AUC is the chance that an image of the class scores above another, ties half; average precision is the sum over
        thresholds of precision times the gain of recall.
        """
        order = np.argsort(self.probabilities[:, index], kind="stable")
        score, is_class = self.probabilities[order, index], self.truth[order] == index
        starts = np.flatnonzero(np.r_[True, np.diff(score) > 0])
        weights = weights[:, order]
        own = np.add.reduceat(weights * is_class, starts, axis=1)
        other = np.add.reduceat(weights * ~is_class, starts, axis=1)
        below = np.cumsum(other, axis=1) - 0.5 * other
        n_own, n_other = own.sum(axis=1), other.sum(axis=1)
        hits, false = (np.cumsum(part[:, ::-1], axis=1)[:, ::-1] for part in (own, other))
        precision = _ratio(hits, hits + false, 0.0)
        auc = _ratio((own * below).sum(axis=1), n_own * n_other, np.nan)
        return auc, _ratio((own * precision).sum(axis=1), n_own, np.nan)


AREAS = ("auc", "average_precision")


def resamples(truth: np.ndarray, seed: int, n_bootstrap: int, groups: Sequence[str] | None = None):
    """Yield weights of stratified bootstrap resamples: chunks of float64 (resamples, images), about 32 MB each.

    Args:
        truth: class of each image, integers.
        seed: of the draws.
        n_bootstrap: resamples.
        groups: of each image; those of one group are drawn together, as members of the class of the first of them.

    Raises:
        ValueError: there is no resample, or groups are missing.
    """
    if n_bootstrap < 1:
        raise ValueError(f"n_bootstrap is {n_bootstrap}; expected at least 1")
    if groups is not None and len(groups) != len(truth):
        raise ValueError(f"{len(groups)} groups for {len(truth)} images; expected one for each")
    rng = np.random.default_rng(seed)
    group, first = np.arange(len(truth)), np.arange(len(truth))
    if groups is not None and len(set(groups)) < len(truth):
        group, names = pd.factorize(np.asarray(groups))
        first = np.full(len(names), len(truth))
        np.minimum.at(first, group, np.arange(len(truth)))
    strata = [np.flatnonzero(truth[first] == index) for index in np.unique(truth[first])]
    chunk = max(1, 4_000_000 // len(truth))
    for start in range(0, n_bootstrap, chunk):
        weights = np.zeros((min(chunk, n_bootstrap - start), len(first)))
        for members in strata:
            weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), len(weights))
        yield weights[:, group]


def _bootstrap(
    scores: Scores, truth: np.ndarray, seed: int, n_bootstrap: int, groups: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """Return name -> values (resamples,). The areas, which sort by every class, stop early if they take minutes."""
    chunks, areas = [], []
    enough = min(n_bootstrap, max(200, int(1e8 / scores.probabilities.size)))
    for weights in resamples(truth, seed, n_bootstrap, groups):
        chunks.append(scores.of(weights))
        remaining = enough - sum(len(part["auc"]) for part in areas)
        if remaining > 0:
            areas.append(scores.areas(weights[:remaining]))
    joined = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return joined | {name: np.concatenate([part[name] for part in areas]) for name in AREAS}


def _ratio(above: np.ndarray, below: np.ndarray, otherwise: float) -> np.ndarray:
    """Return above / below, and `otherwise` where `below` is not above 0."""
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, otherwise), where=below > 0)


def _interval(name: str, value: float, draws: np.ndarray, counts: dict) -> dict:
    low, high = (float(limit) for limit in np.quantile(draws[np.isfinite(draws)], ENDS))
    if high - low < 1e-12:
        low = high = None
        if name == "accuracy":
            exact = binomtest(counts["n_correct"], counts["n"]).proportion_ci(LEVEL, method="exact")
            low, high = float(exact.low), float(exact.high)
    elif name == "ece":
        # Resampling adds noise to each bin and ECE takes its absolute value, so resamples are too high.
        low = min(low, value)
    return {"value": value, "low": low, "high": high}


def _records(frame: pd.DataFrame) -> list[dict]:
    """Return rows as plain Python values that JSON can hold: NaN becomes None."""
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [
        {key: value.item() if isinstance(value, np.generic) else value for key, value in row.items()} for row in rows
    ]
