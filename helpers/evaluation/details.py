"""What is behind the accuracy, as tables to show or draw: classes, confusions, confidence, mistakes.

A new figure of 05 gets its numbers here. No training stage imports this module, so a change here trains nothing again.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from helpers.evaluation import tables

BINS = 15  # equal-width bins of confidence, as in Guo et al., "On Calibration of Modern Neural Networks", 2017


def per_class(predictions: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """Return the columns label, precision, recall, f1 (0-1), support, in the order of the class names.

    Precision is 0 for a class that was never predicted; recall and F1 are NaN for a class without test images.
    """
    matrix = tables.confusion_matrix(predictions, class_names)
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


def confused_pairs(matrix: np.ndarray, class_names: Sequence[str], n: int = 10) -> pd.DataFrame:
    """Return the n most frequent confusions: columns label, predicted, count, share (of the true class)."""
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
    """Return accuracy by bins of confidence of equal width, none empty: columns confidence (mean), accuracy, count."""
    truth, probabilities = tables.parse(predictions, class_names)
    confidence = probabilities.max(axis=1)
    table = pd.DataFrame({"confidence": confidence, "right": truth == tables.picked(predictions, class_names)})
    grouped = table.groupby(bins_of(confidence, bins))
    return pd.DataFrame({
        "confidence": grouped["confidence"].mean(),
        "accuracy": grouped["right"].mean(),
        "count": grouped.size(),
    }).reset_index(drop=True)  # fmt: skip


def confidences(predictions: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """Return the highest probability of each image, and whether its class is the true one: confidence, prediction.

    Args:
        predictions: as `tables.predictions_table` makes it.
        class_names: in the model's order.

    Returns:
        A row for each image: `confidence` (0-1) and `prediction`, "correct" or "wrong".
    """
    truth, probabilities = tables.parse(predictions, class_names)
    is_correct = truth == tables.picked(predictions, class_names)
    return pd.DataFrame(
        {"confidence": probabilities.max(axis=1), "prediction": np.where(is_correct, "correct", "wrong")}
    )


def confident_mistakes(predictions: pd.DataFrame, class_names: Sequence[str], n: int = 24) -> pd.DataFrame:
    """Return the n most confident mistakes: columns path, label, predicted, file if it is there, confidence (0-1).

    They are the first place to look for wrong labels, for images that show two classes, and for what the model
    really looks at.
    """
    _, probabilities = tables.parse(predictions, class_names)
    table = tables.keys(predictions).assign(confidence=probabilities.max(axis=1))
    table = table[table["label"] != table["predicted"]]
    return table.sort_values(["confidence", "path"], ascending=[False, True]).head(n).reset_index(drop=True)


def bins_of(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each confidence (0-1), an index below `bins`; a bin holds its upper bound."""
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def rank_curves(predictions: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """Return the ROC curve and the precision-recall curve of each class against the rest.

    Returns:
        Columns label, kind ("roc" or "precision"), x, y, area (all 0-1): x and y are false and true positive rate, or
        recall and precision; area is AUC or average precision. Of two classes, only the second; classes without test
        images are left out.
    """
    from sklearn import metrics as sklearn_metrics

    truth, probabilities = tables.parse(predictions, class_names)
    parts = []
    for index in [1] if len(class_names) == 2 else np.unique(truth):
        is_class, score = truth == index, probabilities[:, index]
        if is_class.all() or not is_class.any():
            continue
        false, true, _ = sklearn_metrics.roc_curve(is_class, score)
        precision, recall, _ = sklearn_metrics.precision_recall_curve(is_class, score)
        areas = {"roc": sklearn_metrics.roc_auc_score, "precision": sklearn_metrics.average_precision_score}
        for kind, x, y in (("roc", false, true), ("precision", recall, precision)):
            area = float(areas[kind](is_class, score))
            parts.append(pd.DataFrame({"label": str(class_names[index]), "kind": kind, "x": x, "y": y, "area": area}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["label", "kind", "x", "y", "area"])


def alike_first(matrix: np.ndarray) -> np.ndarray:
    """Return an order of the classes in which confused classes are neighbours, int64 (classes,).

    Optimal leaf ordering (Bar-Joseph et al., 2001) of average linkage; fewer than eight classes stay in their order.

    Args:
        matrix: counts, (classes, classes), rows are true classes.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    matrix = np.asarray(matrix, float)
    if len(matrix) < 8:
        return np.arange(len(matrix))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    distance = 1 - np.clip((shares + shares.T) / 2, 0, 1)
    np.fill_diagonal(distance, 0)
    flat = squareform(distance, checks=False)
    return leaves_list(optimal_leaf_ordering(linkage(flat, "average"), flat))


def telling(predictions: pd.DataFrame, class_names: Sequence[str], n: int = 24) -> pd.DataFrame:
    """Return up to n images to look at: confident mistakes, least confident, best and worst of each class, each once.

    Returns:
        Columns path, label, predicted, file if it is there, confidence (0-1) and why.
    """
    truth, probabilities = tables.parse(predictions, class_names)
    table = tables.keys(predictions).assign(confidence=probabilities.max(axis=1))
    table["of_truth"] = probabilities[np.arange(len(truth)), truth]
    share = max(1, n // 4)
    by_class = table.sort_values("of_truth", kind="stable").groupby("label", sort=False)
    each = max(1, share // max(1, len(by_class)))
    wrong = table[table["label"] != table["predicted"]].sort_values("confidence", ascending=False, kind="stable")
    parts = {
        "sure, and wrong": wrong.head(share),
        "least sure": table.sort_values("confidence", kind="stable").head(share),
        "worst of its class": by_class.head(each).head(share),
        "best of its class": by_class.tail(each).head(share),
    }
    joined = pd.concat([part.assign(why=why) for why, part in parts.items()])
    return (
        joined.drop_duplicates(tables.FILE if tables.FILE in joined else "path")
        .drop(columns="of_truth")
        .reset_index(drop=True)
    )
