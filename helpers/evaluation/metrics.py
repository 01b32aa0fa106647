"""What a model's predictions are worth: metrics with intervals.

Intervals are 95 % percentile bootstrap intervals (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
ch. 13), resampled within each true class. Resampling should repeat the way the data was drawn (Davison and Hinkley,
"Bootstrap Methods and their Application", 1997, ch. 3): our splits are stratified, so the test part's class counts are
fixed by design, not by chance; and no resample can lose a rare class, so that every metric is defined in each of them.
They tell how far the choice of test images may have moved a number; they do not hold the luck of another training
seed, and are too narrow where test images are near copies of each other.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from helpers.core import words
from helpers.evaluation import details, tables

LEVEL = 0.95
NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "top3_accuracy": "top-3 accuracy",
    "auc": "AUC",
    "log_loss": "log loss",
    "ece": "calibration error",
}


METHOD = "percentile bootstrap, stratified by true class"


def metrics(predictions: pd.DataFrame, class_names: Sequence[str], seed: int = 0, n_bootstrap: int = 2000) -> dict:
    """Everything that metrics.json tells of one set of predictions.

    Balanced accuracy, macro F1 and AUC are means over the classes that the test part holds. Top-3 accuracy is given
    from four classes on. AUC is the area under the ROC curve: of the second class for two, otherwise the mean of each
    class against the rest. ECE is the expected calibration error in 15 equal bins (Guo et al., 2017).

    A metric without any mistake cannot vary between resamples: its interval would have no width, which is not what
    is known. Accuracy then has the exact binomial interval (Clopper and Pearson, 1934), the others none (None).

    Args:
        predictions: see `tables.predictions_table`.
        class_names: in the model's order.
        seed: of the resampling.
        n_bootstrap: resamples.

    Returns:
        A dict of plain Python values. `accuracy` and so on are {"value", "low", "high"}, fractions of 1 (log loss in
        nats); per_class, confusion_matrix, confused_pairs and reliability are lists.
    """
    truth, probabilities = tables.parse(predictions, class_names)
    picked = tables.picked(predictions, class_names)
    names = [str(name) for name in class_names]
    scores = _Scores(truth, picked, probabilities)
    every = np.ones((1, len(truth)))
    once = scores.of(every) | {"auc": scores.auc(every)}
    resampled = _bootstrap(scores, truth, seed=seed, n_bootstrap=n_bootstrap)
    matrix = tables.confusion_matrix(predictions, names)
    result = {"n": len(truth), "n_classes": len(names), "n_correct": int((truth == picked).sum())}
    for name in NAMES:
        if name in once and np.isfinite(once[name][0]):
            result[name] = _interval(name, float(once[name][0]), resampled[name], result)
    result["interval"] = {"level": LEVEL, "method": METHOD, "resamples": n_bootstrap, "seed": seed}
    result["interval"]["auc_resamples"] = len(resampled["auc"])
    result["class_names"] = names
    result["per_class"] = _records(details.per_class(predictions, names))
    result["confusion_matrix"] = matrix.tolist()
    result["confused_pairs"] = _records(details.confused_pairs(matrix, names))
    result["reliability"] = _records(details.reliability(predictions, names))
    return result


def metrics_table(result: dict) -> pd.DataFrame:
    """The headline metrics of `metrics` for display: columns value, low, high; a row for each metric that it holds."""
    rows = {title: result[name] for name, title in NAMES.items() if name in result}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"]).astype(float).round(4)


def headline(result: dict, published: dict[str, float] | None = None) -> str:
    """One line for the end of a run: accuracy with its interval, beside published figures if there are any.

    Args:
        result: from `metrics`; a key `part` says "val" when it was not the test part.
        published: name -> accuracy, in percent or as a fraction.
    """
    value, low, high = (words.percent(result["accuracy"][key]) for key in ("value", "low", "high"))
    parts = [
        f"accuracy {value} (95 % interval {low} to {high})",
        f"balanced accuracy {words.percent(result['balanced_accuracy']['value'])}",
        f"macro F1 {words.percent(result['macro_f1']['value'])}",
        f"{result['n']:,} {'validation' if result.get('part') == 'val' else 'test'} pictures",
    ]
    known = [f"{name} {words.percent(as_fraction(value), 2)}" for name, value in (published or {}).items()]
    return ", ".join(parts) + (f"; published: {', '.join(known)}" if known else "")


def as_fraction(value: float) -> float:
    """A published figure as a fraction: 88.42 and 0.8842 are the same."""
    return float(value) / 100 if float(value) > 1 else float(value)


class _Scores:
    """The metrics of any number of weighted copies of one test part at once, as matrix products."""

    def __init__(self, truth: np.ndarray, picked: np.ndarray, probabilities: np.ndarray):
        count = probabilities.shape[1]
        self.truth, self.probabilities = truth, probabilities
        self.present = np.unique(truth)
        self.right = (truth == picked).astype(float)
        self.support = np.bincount(truth, minlength=count)[self.present]
        self.hits = np.eye(count)[truth][:, self.present] * self.right[:, None]
        self.guesses = np.eye(count)[picked][:, self.present]
        of_truth = probabilities[np.arange(len(truth)), truth]
        self.surprise = -np.log(np.clip(of_truth, np.finfo(np.float32).eps, 1.0))
        # Counted by rank, not by argsort, so that ties do not depend on the order of the classes.
        self.in_top3 = ((probabilities > of_truth[:, None]).sum(axis=1) < 3).astype(float)
        confidence = probabilities.max(axis=1)
        self.gaps = np.eye(details.BINS)[details.bins_of(confidence, details.BINS)] * (confidence - self.right)[:, None]

    def of(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every metric but AUC, for weights (resamples, pictures) that keep the class counts.

        Returns:
            name -> float64 (resamples,).
        """
        total, hits = weights.sum(axis=1), weights @ self.hits
        scores = {
            "accuracy": weights @ self.right / total,
            "balanced_accuracy": (hits / self.support).mean(axis=1),
            "macro_f1": (2 * hits / (self.support + weights @ self.guesses)).mean(axis=1),
            "log_loss": weights @ self.surprise / total,
            "ece": np.abs(weights @ self.gaps).sum(axis=1) / total,
        }
        if self.probabilities.shape[1] >= 4:
            scores["top3_accuracy"] = weights @ self.in_top3 / total
        return scores

    def auc(self, weights: np.ndarray) -> np.ndarray:
        """AUC for weights as above: float64 (resamples,), NaN where the test part holds one class only."""
        if len(self.present) < 2:
            return np.full(len(weights), np.nan)
        classes = [1] if self.probabilities.shape[1] == 2 else self.present
        return np.mean([self._auc_of(weights, index) for index in classes], axis=0)

    def _auc_of(self, weights: np.ndarray, index: int) -> np.ndarray:
        """Weighted area under the ROC curve: the chance that a picture of the class scores above another, ties half."""
        order = np.argsort(self.probabilities[:, index], kind="stable")
        score, is_class = self.probabilities[order, index], self.truth[order] == index
        starts = np.flatnonzero(np.r_[True, np.diff(score) > 0])
        weights = weights[:, order]
        own = np.add.reduceat(weights * is_class, starts, axis=1)
        other = np.add.reduceat(weights * ~is_class, starts, axis=1)
        below = np.cumsum(other, axis=1) - 0.5 * other
        return (own * below).sum(axis=1) / (own.sum(axis=1) * other.sum(axis=1))


def resamples(truth: np.ndarray, seed: int, n_bootstrap: int):
    """Weights of stratified bootstrap resamples: chunks of float64 (resamples, pictures), about 32 MB each."""
    if n_bootstrap < 1:
        raise ValueError(f"n_bootstrap is {n_bootstrap}; expected at least 1")
    rng = np.random.default_rng(seed)
    strata = [np.flatnonzero(truth == index) for index in np.unique(truth)]
    chunk = max(1, 4_000_000 // len(truth))
    for start in range(0, n_bootstrap, chunk):
        weights = np.zeros((min(chunk, n_bootstrap - start), len(truth)))
        for members in strata:
            weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), len(weights))
        yield weights


def _bootstrap(scores: _Scores, truth: np.ndarray, seed: int, n_bootstrap: int) -> dict[str, np.ndarray]:
    """Name -> values (resamples,). AUC, which sorts by every class, stops early where that would take minutes."""
    chunks, auc = [], []
    enough = min(n_bootstrap, max(200, int(1e8 / scores.probabilities.size)))
    for weights in resamples(truth, seed, n_bootstrap):
        chunks.append(scores.of(weights))
        wanted = enough - sum(map(len, auc))
        if wanted > 0:
            auc.append(scores.auc(weights[:wanted]))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]} | {
        "auc": np.concatenate(auc)
    }


def _interval(name: str, value: float, draws: np.ndarray, counts: dict) -> dict:
    low, high = (float(limit) for limit in np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    if high - low < 1e-12:
        low = high = None
        if name == "accuracy":
            exact = binomtest(counts["n_correct"], counts["n"]).proportion_ci(LEVEL, method="exact")
            low, high = float(exact.low), float(exact.high)
    elif name == "ece":
        # Resampling adds noise to each bin and ECE takes its absolute value, so resamples lie too high.
        low = min(low, value)
    return {"value": value, "low": low, "high": high}


def _records(frame: pd.DataFrame) -> list[dict]:
    """Rows as plain Python values that JSON can hold: NaN becomes None."""
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [
        {key: value.item() if isinstance(value, np.generic) else value for key, value in row.items()} for row in rows
    ]
