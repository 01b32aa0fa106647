"""Does the model work equally well for all groups? Metrics by any column of the inventory."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.core import disk, words
from helpers.data import inventory
from helpers.evaluation import metrics, tables

MOST = 12  # values of a column; numbers with more are cut into quarters; of names, the most frequent stay
COLUMNS = ["column", "value", "images", "accuracy", "low", "high", "balanced_accuracy"]


def described(resized: Path, explored: Path, part: str) -> pd.DataFrame:
    """Return the inventory's row of each image of a part of a resized folder, in the order of images.csv.

    Args:
        resized: folder of 02_resize.
        explored: the folder of the inventory, of 00_explore or 00b_crop.
        part: "train", "val" or "test".
    """
    images = disk.read_table(resized / "images.csv")
    images = images[images["part"] == part]
    listed = inventory.read(explored)
    keys = ["path", "box"] if "box" in images and "box" in listed else ["path"]
    return images[keys].merge(listed.drop_duplicates(keys), on=keys, how="left", validate="many_to_one")


def check(columns: Sequence[str], listed: pd.DataFrame) -> list[str]:
    """Return the columns by which to divide the images.

    Raises:
        ValueError: the inventory has no such column.
    """
    for name in columns:
        if name not in listed:
            raise ValueError(
                f"subgroups: the inventory has no column {name!r}.{words.near(str(name), listed.columns)}"
                f" It has {', '.join(listed.columns)}."
            )
    return [*dict.fromkeys(columns)]


def measure(
    predictions: pd.DataFrame, class_names: Sequence[str], values: pd.DataFrame, *, seed: int = 0
) -> tuple[pd.DataFrame, list[str]]:
    """Return how good the predictions are in each subgroup, and a sentence for each column about its largest gap.

    Args:
        predictions: see `tables.predictions_table`.
        class_names: in the model's order.
        values: a row for each prediction, a column for each way to divide the images.
        seed: of the resamples.

    Returns:
        A table with the columns column, value, images, accuracy with low and high (95 % interval), balanced_accuracy;
        and sentences that name the best and the worst subgroup and the interval of the difference of their accuracies,
        a percentile bootstrap in which best and worst are those of the whole. Among many subgroups, some differ much by
        chance.

    Raises:
        ValueError: there are more or fewer rows than predictions.
    """
    if len(values) != len(predictions):
        raise ValueError(f"{len(values)} rows of values for {len(predictions)} predictions; expected one for each.")
    truth, _ = tables.parse(predictions, class_names)
    is_correct = truth == tables.picked(predictions, class_names)
    rows, sentences = [], []
    for name in values:
        parts = _parts(values[name])
        of_column = []
        for value in words.natural_order(parts.unique()):
            own = np.flatnonzero(parts == value)
            result = metrics.metrics(predictions.iloc[own], class_names, seed=seed, n_bootstrap=500)
            accuracy = [result["accuracy"][key] for key in ("value", "low", "high")]
            of_column.append([name, value, len(own), *accuracy, result["balanced_accuracy"]["value"]])
        rows += of_column
        if len(of_column) > 1:
            sentences.append(_gap(name, of_column, parts.to_numpy(), is_correct, seed))
    return pd.DataFrame(rows, columns=COLUMNS), sentences


def _gap(name: str, rows: list[list], parts: np.ndarray, is_correct: np.ndarray, seed: int) -> str:
    ordered = sorted(rows, key=lambda row: row[3])
    worst, best = ordered[0], ordered[-1]
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(is_correct[parts == row[1]], (2000, row[2])).mean(axis=1) for row in (best, worst)]
    low, high = np.quantile(drawn[0] - drawn[1], metrics.ENDS)
    verdict = "" if low > 0 else ", which may be chance"
    return (
        f"{name}: {best[1]} is classified best ({words.percent(best[3])}), {worst[1]} worst"
        f" ({words.percent(worst[3])}):"
        f" {100 * (best[3] - worst[3]):.1f} points apart ({100 * low:.1f} to {100 * high:.1f}){verdict}."
    )


def _parts(column: pd.Series) -> pd.Series:
    """Return the subgroup of each image, as text."""
    text = column.astype(str).where(column.notna() & (column.astype(str) != ""), "none").reset_index(drop=True)
    numbers = pd.to_numeric(column, errors="coerce").reset_index(drop=True)
    if text.nunique() <= MOST:
        return text
    if numbers.notna().all():
        return pd.qcut(numbers, 4, duplicates="drop").map(lambda part: f"{part.left:g} to {part.right:g}").astype(str)
    frequent = text.value_counts().index[: MOST - 1]
    return text.where(text.isin(frequent), "others")
