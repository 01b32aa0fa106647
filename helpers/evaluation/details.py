"""What lies behind the accuracy, as tables to show or draw: classes, confusions, confidence, mistakes.

A new figure of 05 gets its numbers here. No stage that trains imports this module, so none is made again for it.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from helpers.evaluation import tables

BINS = 15  # equal-width bins of confidence, as in Guo et al., "On Calibration of Modern Neural Networks", 2017


def per_class(predictions: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """Columns label, precision, recall, f1 (0-1), support, in the order of the class names.

    Precision is 0 for a class that was never predicted; recall and F1 are NaN for a class without test pictures.
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
    """The n mistakes of which the model was surest: columns path, label, predicted, confidence (0-1).

    They are the first place to look for wrong labels, for pictures that show two classes, and for what the model
    really looks at.
    """
    _, probabilities = tables.parse(predictions, class_names)
    table = predictions[list(tables.KEYS)].assign(confidence=probabilities.max(axis=1))
    table = table[table["label"] != table["predicted"]]
    return table.sort_values(["confidence", "path"], ascending=[False, True]).head(n).reset_index(drop=True)


def bins_of(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each confidence (0-1), an index below `bins`; a bin holds its upper bound."""
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
