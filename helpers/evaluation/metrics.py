"""What a model's predictions are worth: metrics with intervals, calibration, mistakes, and fair comparisons.

Everything starts from one table, the predictions: columns `path`, `label`, `predicted`, then one column of
probabilities for each class, in the order of the model's outputs. NumPy, SciPy and pandas only.

Intervals are 95 % percentile bootstrap intervals (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
ch. 13), resampled within each true class. Resampling should repeat the way the data was drawn (Davison and Hinkley,
"Bootstrap Methods and their Application", 1997, ch. 3): our splits are stratified, so the test part's class counts are
fixed by design, not by chance; and no resample can lose a rare class, so that every metric is defined in each of them.
They tell how far the choice of test pictures may have moved a number; they do not hold the luck of another training
seed, and are too narrow where test pictures are near copies of each other.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from helpers.core import words

LEVEL = 0.95
BINS = 15  # equal-width bins of confidence, as in Guo et al., "On Calibration of Modern Neural Networks", 2017
KEYS = ("path", "label", "predicted")
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


def predictions_table(
    paths: Sequence[str], labels: Sequence[str] | np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]
) -> pd.DataFrame:
    """The table that predictions.csv holds.

    Args:
        paths: one per picture, as in images.csv.
        labels: the true class of each picture: names, or integers that count into `class_names`.
        probabilities: (pictures, classes), each row adding up to 1, columns in the order of `class_names`.
        class_names: in the model's order.

    Raises:
        ValueError: nothing to evaluate, lengths that differ, a label that is no class, values that are no
            probabilities, or a class called "path", "label" or "predicted".
    """
    names, probabilities = [str(name) for name in class_names], np.asarray(probabilities, dtype=np.float64)
    if len(paths) == 0:
        raise ValueError("no picture to evaluate; expected at least one row of predictions")
    if probabilities.shape != (len(paths), len(names)) or len(labels) != len(paths):
        raise ValueError(
            f"{len(paths)} paths, {len(labels)} labels and {len(names)} class names do not fit probabilities of shape "
            f"{probabilities.shape}; expected ({len(paths)}, {len(names)})"
        )
    if taken := set(names) & set(KEYS):
        raise ValueError(f"a class cannot be called {sorted(taken)[0]!r}: predictions.csv has that column; rename it")
    predicted = [names[index] for index in probabilities.argmax(axis=1)]
    labels = _named(labels, names)
    table = pd.DataFrame({"path": [str(path) for path in paths], "label": labels, "predicted": predicted})
    table = pd.concat([table, pd.DataFrame(probabilities, columns=names)], axis=1)
    parse(table, names)
    return table


def read_predictions(path: str | Path) -> pd.DataFrame:
    """Read a predictions.csv; class names such as "007" or "NA" stay text."""
    header = pd.read_csv(path, nrows=0).columns
    if tuple(header[:3]) != KEYS:
        raise ValueError(f"{path} begins with the columns {', '.join(header[:3])}; expected {', '.join(KEYS)}")
    return pd.read_csv(path, dtype=dict.fromkeys(KEYS, str), keep_default_na=False, na_values={})


def metrics(predictions: pd.DataFrame, class_names: Sequence[str], seed: int = 0, n_bootstrap: int = 2000) -> dict:
    """Everything that metrics.json tells of one set of predictions.

    Balanced accuracy, macro F1 and AUC are means over the classes that the test part holds. Top-3 accuracy is given
    from four classes on. AUC is the area under the ROC curve: of the second class for two, otherwise the mean of each
    class against the rest. ECE is the expected calibration error in 15 equal bins (Guo et al., 2017).

    A metric without any mistake cannot vary between resamples: its interval would have no width, which is not what
    is known. Accuracy then has the exact binomial interval (Clopper and Pearson, 1934), the others none (None).

    Args:
        predictions: see `predictions_table`.
        class_names: in the model's order.
        seed: of the resampling.
        n_bootstrap: resamples.

    Returns:
        A dict of plain Python values. `accuracy` and so on are {"value", "low", "high"}, fractions of 1 (log loss in
        nats); per_class, confusion_matrix, confused_pairs and reliability are lists.
    """
    truth, probabilities = parse(predictions, class_names)
    picked = _picked(predictions, class_names)
    names = [str(name) for name in class_names]
    scores = _Scores(truth, picked, probabilities)
    every = np.ones((1, len(truth)))
    once = scores.of(every) | {"auc": scores.auc(every)}
    resampled = _bootstrap(scores, truth, seed=seed, n_bootstrap=n_bootstrap)
    matrix = confusion_matrix(predictions, names)
    result = {"n": len(truth), "n_classes": len(names), "n_correct": int((truth == picked).sum())}
    for name in NAMES:
        if name in once and np.isfinite(once[name][0]):
            result[name] = _interval(name, float(once[name][0]), resampled[name], result)
    result["interval"] = {"level": LEVEL, "method": METHOD, "resamples": n_bootstrap, "seed": seed}
    result["interval"]["auc_resamples"] = len(resampled["auc"])
    result["class_names"] = names
    result["per_class"] = _records(per_class(predictions, names))
    result["confusion_matrix"] = matrix.tolist()
    result["confused_pairs"] = _records(confused_pairs(matrix, names))
    result["reliability"] = _records(reliability(predictions, names))
    return result


def metrics_table(result: dict) -> pd.DataFrame:
    """The headline metrics of `metrics` for display: columns value, low, high; a row for each metric that it holds."""
    rows = {title: result[name] for name, title in NAMES.items() if name in result}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"]).astype(float).round(4)


def per_class(predictions: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """Columns label, precision, recall, f1 (0-1), support, in the order of the class names.

    Precision is 0 for a class that was never predicted; recall and F1 are NaN for a class without test pictures.
    """
    matrix = confusion_matrix(predictions, class_names)
    hits, support, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    recall = np.where(support > 0, hits / np.maximum(support, 1), np.nan)
    f1 = np.where(support > 0, 2 * hits / np.maximum(support + predicted, 1), np.nan)
    return pd.DataFrame({
        "label": [str(name) for name in class_names],
        "precision": hits / np.maximum(predicted, 1),
        "recall": recall,
        "f1": f1,
        "support": support,
    })  # fmt: skip


def confusion_matrix(predictions: pd.DataFrame, class_names: Sequence[str]) -> np.ndarray:
    """Counts, int64 (classes, classes): rows are true classes, columns predicted ones."""
    truth, _ = parse(predictions, class_names)
    picked, count = _picked(predictions, class_names), len(class_names)
    return np.bincount(truth * count + picked, minlength=count * count).reshape(count, count)


def confused_pairs(matrix: np.ndarray, class_names: Sequence[str], n: int = 10) -> pd.DataFrame:
    """The n most frequent confusions: columns label, predicted, count, share (of the true class)."""
    matrix = np.asarray(matrix)
    rows, columns = np.nonzero(matrix * ~np.eye(len(matrix), dtype=bool))
    counts, totals = matrix[rows, columns], matrix.sum(axis=1)
    order = np.lexsort((columns, rows, -counts / totals[rows], -counts))[:n]
    return pd.DataFrame({
        "label": [str(class_names[row]) for row in rows[order]],
        "predicted": [str(class_names[column]) for column in columns[order]],
        "count": counts[order],
        "share": counts[order] / totals[rows[order]],
    })  # fmt: skip


def reliability(predictions: pd.DataFrame, class_names: Sequence[str], bins: int = BINS) -> pd.DataFrame:
    """Confidence against accuracy by bins of equal width: columns confidence (mean), accuracy, count; no empty bins."""
    truth, probabilities = parse(predictions, class_names)
    confidence = probabilities.max(axis=1)
    table = pd.DataFrame({"confidence": confidence, "right": truth == _picked(predictions, class_names)})
    grouped = table.groupby(_bin(confidence, bins))
    return pd.DataFrame({
        "confidence": grouped["confidence"].mean(),
        "accuracy": grouped["right"].mean(),
        "count": grouped.size(),
    }).reset_index(drop=True)  # fmt: skip


def confidences(predictions: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """Return the highest probability of each image, and whether its class is the true one: confidence, prediction.

    Args:
        predictions: as `predictions_table` makes it.
        class_names: in the model's order.

    Returns:
        A row for each image: `confidence` (0-1) and `prediction`, "correct" or "wrong".
    """
    truth, probabilities = parse(predictions, class_names)
    is_correct = truth == _picked(predictions, class_names)
    return pd.DataFrame(
        {"confidence": probabilities.max(axis=1), "prediction": np.where(is_correct, "correct", "wrong")}
    )


def confident_mistakes(predictions: pd.DataFrame, class_names: Sequence[str], n: int = 24) -> pd.DataFrame:
    """The n mistakes of which the model was surest: columns path, label, predicted, confidence (0-1).

    They are the first place to look for wrong labels, for pictures that show two classes, and for what the model
    really looks at.
    """
    _, probabilities = parse(predictions, class_names)
    table = predictions[list(KEYS)].assign(confidence=probabilities.max(axis=1))
    table = table[table["label"] != table["predicted"]]
    return table.sort_values(["confidence", "path"], ascending=[False, True]).head(n).reset_index(drop=True)


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
        self.gaps = np.eye(BINS)[_bin(confidence, BINS)] * (confidence - self.right)[:, None]

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


def parse(predictions: pd.DataFrame, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Check the table; give the true class of each row as an index (pictures,) and the probabilities."""
    names = [str(name) for name in class_names]
    if len(predictions) == 0:
        raise ValueError("no picture to evaluate; expected at least one row of predictions")
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"expected at least two different class names; got {names}")
    if missing := [column for column in (*KEYS, *names) if column not in predictions]:
        raise ValueError(f"the predictions lack the columns {', '.join(missing)}; were they made by another model?")
    if unknown := sorted(set(predictions["label"].astype(str)) - set(names)):
        raise ValueError(f"{unknown[0]!r} is a label but not one of the class names ({', '.join(names[:10])})")
    probabilities = predictions[names].to_numpy(np.float64)
    bad = ~np.isfinite(probabilities).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{bad.sum()} rows have probabilities that are NaN or infinite, first {_row(predictions, bad)}"
        )
    bad = (probabilities < -1e-6).any(axis=1) | (np.abs(probabilities.sum(axis=1) - 1) > 1e-3)
    if bad.any():
        raise ValueError(
            f"{bad.sum()} rows are not probabilities (0 to 1, adding up to 1), first {_row(predictions, bad)}: "
            f"{probabilities[bad][0][:5].round(4).tolist()}; does the model end in softmax?"
        )
    return pd.Index(names).get_indexer(predictions["label"].astype(str)), probabilities


def _named(labels: Sequence[str] | np.ndarray, names: list[str]) -> list[str]:
    """Labels as class names; integers count into them, text stays as it is (also the text "3")."""
    array = np.asarray(labels)
    if array.dtype.kind not in "iu":
        return [str(label) for label in labels]
    if array.min() < 0 or array.max() >= len(names):
        raise ValueError(
            f"labels go from {array.min()} to {array.max()}; expected 0 to {len(names) - 1}, as many classes"
        )
    return [names[index] for index in array]


def _picked(predictions: pd.DataFrame, class_names: Sequence[str]) -> np.ndarray:
    picked = pd.Index([str(name) for name in class_names]).get_indexer(predictions["predicted"].astype(str))
    if (picked < 0).any():
        raise ValueError(f"{predictions['predicted'][picked < 0].iloc[0]!r} was predicted but is not a class name")
    return picked


def _row(predictions: pd.DataFrame, bad: np.ndarray) -> str:
    return repr(predictions["path"][bad].iloc[0])


def _bin(confidence: np.ndarray, bins: int) -> np.ndarray:
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def _records(frame: pd.DataFrame) -> list[dict]:
    """Rows as plain Python values that JSON can hold: NaN becomes None."""
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [
        {key: value.item() if isinstance(value, np.generic) else value for key, value in row.items()} for row in rows
    ]
