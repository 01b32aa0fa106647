"""The table of predictions: a row for each image, with its true class, the predicted one and all probabilities.

Its columns are `path` (of the raw image), `label`, `predicted`, `file` (the resized image, if it is known), then one
column of probabilities for each class, in the order of the model's outputs. NumPy and pandas only.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

KEYS = ("path", "label", "predicted")
FILE = "file"


def predictions_table(
    paths: Sequence[str],
    labels: Sequence[str] | np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    files: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return the table that predictions.csv holds.

    Args:
        paths: of the raw images, as in images.csv.
        labels: the true class of each image: names, or indices into `class_names`.
        probabilities: (images, classes), each row adding up to 1, columns in the order of `class_names`.
        class_names: in the model's order.
        files: of the resized images, as in images.csv.

    Raises:
        ValueError: nothing to evaluate, lengths that differ, a label that is no class, values that are no
            probabilities, or a class called "path", "label", "predicted" or "file".
    """
    names, probabilities = [str(name) for name in class_names], np.asarray(probabilities, dtype=np.float64)
    if len(paths) == 0:
        raise ValueError("no image to evaluate; expected at least one row of predictions")
    if probabilities.shape != (len(paths), len(names)) or len(labels) != len(paths):
        raise ValueError(
            f"{len(paths)} paths, {len(labels)} labels and {len(names)} class names do not fit probabilities of shape "
            f"{probabilities.shape}; expected ({len(paths)}, {len(names)})"
        )
    if taken := set(names) & {*KEYS, FILE}:
        raise ValueError(f"a class cannot be called {sorted(taken)[0]!r}: predictions.csv has that column; rename it")
    predicted = [names[index] for index in probabilities.argmax(axis=1)]
    labels = _named(labels, names)
    table = pd.DataFrame({"path": [str(path) for path in paths], "label": labels, "predicted": predicted})
    table = table if files is None else table.assign(file=list(files))
    table = pd.concat([table, pd.DataFrame(probabilities, columns=names)], axis=1)
    parse(table, names)
    return table


def read_predictions(path: str | Path) -> pd.DataFrame:
    """Read a predictions.csv; class names such as "007" or "NA" stay text."""
    header = pd.read_csv(path, nrows=0).columns
    if tuple(header[:3]) != KEYS:
        raise ValueError(f"{path} begins with the columns {', '.join(header[:3])}; expected {', '.join(KEYS)}")
    return pd.read_csv(path, dtype=dict.fromkeys([*KEYS, FILE], str), keep_default_na=False, na_values={})


def keys(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that identify the image of a row, with its true and its predicted class."""
    return predictions[[column for column in (*KEYS, FILE) if column in predictions]]


def confusion_matrix(predictions: pd.DataFrame, class_names: Sequence[str]) -> np.ndarray:
    """Return counts, int64 (classes, classes): rows are true classes, columns predicted ones."""
    truth, _ = parse(predictions, class_names)
    predicted, count = picked(predictions, class_names), len(class_names)
    return np.bincount(truth * count + predicted, minlength=count * count).reshape(count, count)


def parse(predictions: pd.DataFrame, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Check the table; return the true class of each row as an index (images,) and the probabilities."""
    names = [str(name) for name in class_names]
    if len(predictions) == 0:
        raise ValueError("no image to evaluate; expected at least one row of predictions")
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


def picked(predictions: pd.DataFrame, class_names: Sequence[str]) -> np.ndarray:
    """Return the predicted class of each row as an index, int64 (images,).

    Raises:
        ValueError: a prediction is none of the class names.
    """
    indices = pd.Index([str(name) for name in class_names]).get_indexer(predictions["predicted"].astype(str))
    if (indices < 0).any():
        raise ValueError(f"{predictions['predicted'][indices < 0].iloc[0]!r} was predicted but is not a class name")
    return indices


def _named(labels: Sequence[str] | np.ndarray, names: list[str]) -> list[str]:
    """Return labels as class names; integers are indices, text stays as it is (also the text "3")."""
    array = np.asarray(labels)
    if array.dtype.kind not in "iu":
        return [str(label) for label in labels]
    if array.min() < 0 or array.max() >= len(names):
        raise ValueError(
            f"labels go from {array.min()} to {array.max()}; expected 0 to {len(names) - 1}, as many classes"
        )
    return [names[index] for index in array]


def _row(predictions: pd.DataFrame, bad: np.ndarray) -> str:
    return repr(predictions["path"][bad].iloc[0])
