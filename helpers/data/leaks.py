"""Leaks of the test part into training: the check that a finished split must pass, and the effect of a leak."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from helpers.core import linear, parallel
from helpers.data import grouping, images, splits

PROBE_SIZE = 64  # pixels
PROBE_SEEDS = 5


def check_split(folder: Path, split: pd.DataFrame, table: pd.DataFrame, *, distance: int) -> None:
    """Raise an error if a finished split leaks or does not agree with its folders.

    The check is independent of the split's code: it reads links from disk and compares look-alikes again.

    Args:
        folder: the stage's folder.
        split: its split.csv, read again.
        table: the inventory, for the perceptual hashes.
        distance: bits in which look-alikes may differ; -1 does not compare them.

    Raises:
        ValueError: two parts share a file, a group or look-alikes, or the links differ from split.csv.
    """
    used = split[split["part"].isin(splits.PARTS)]
    _check_links(folder, used)
    for column, what in (("path", "image"), ("sha256", "file"), ("group", "group")):
        spread = used.groupby(column)["part"].nunique()
        leaked = used[used[column].isin(spread.index[spread > 1])].sort_values([column, "part"])
        _refuse(leaked, f"the same {what} is in more than one part")
    if distance >= 0:
        unique = used.drop_duplicates("path").merge(table[["path", "phash"]], on="path").reset_index(drop=True)
        pairs = grouping.near_duplicates(unique["phash"], distance)
        parts = unique["part"].to_numpy()
        _refuse(unique.iloc[pairs[parts[pairs[:, 0]] != parts[pairs[:, 1]]].ravel()], "look-alikes are in two parts")


def settle(table: pd.DataFrame) -> pd.DataFrame:
    """Remove images from train, then val, that share a group with a later part; their part becomes "unused".

    Args:
        table: with the columns part and group.
    """
    rank = table["part"].map({part: rank for rank, part in enumerate(splits.PARTS)})
    leaks = rank < rank.groupby(table["group"]).transform("max")
    return table.assign(part=table["part"].mask(leaks, splits.UNUSED))


def honest_gap(table: pd.DataFrame, root: Path, ratio: Sequence[float], *, seed: int = 0) -> pd.DataFrame:
    """Score a linear probe on splits that keep groups together and on naive ones that do not.

    The probe is a logistic regression on gradients and colours of small images (no network, so this takes seconds);
    its level means little; the difference shows how much too optimistic a naive split is.

    Args:
        table: the inventory with groups.
        root: the source's root.
        ratio: shares of train, val and test; the probe learns on train and is scored on test.
        seed: the first of `PROBE_SEEDS` splits of each kind.

    Returns:
        One row for each split: split ("honest" or "naive"), seed, balanced_accuracy.
    """
    from sklearn.metrics import balanced_accuracy_score

    paths = [root / path for path in table["path"]]
    features = np.stack(list(parallel.for_each(_describe, paths, label="probe")))
    alone = table.assign(group=table["path"])
    rows = []
    for number in range(seed, seed + PROBE_SEEDS):
        for name, grouped in (("honest", table), ("naive", alone)):
            parts = splits.by_ratio(grouped, ratio, seed=number).to_numpy()
            is_train = parts == "train"
            probe = linear.fit(linear.classifier(0.01), features[is_train], table["label"][is_train])
            predictions = probe.predict(features[parts == "test"])
            score = balanced_accuracy_score(table["label"][parts == "test"], predictions)
            rows.append({"split": name, "seed": number, "balanced_accuracy": score})
    return pd.DataFrame(rows)


def _describe(path: Path) -> np.ndarray:
    """Return histograms of gradient directions in an 8 x 8 grid of cells, and the colours of those cells."""
    pixels = images.load(path, PROBE_SIZE, "squash", max_pixels=None).astype(np.float32) / 255
    grey = pixels.mean(axis=2)
    strength, angle = cv2.cartToPolar(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    bins = (angle / (2 * np.pi) * 8).astype(int) % 8
    cells = [cv2.resize(np.where(bins == k, strength, 0), (8, 8), interpolation=cv2.INTER_AREA) for k in range(8)]
    colours = cv2.resize(pixels, (8, 8), interpolation=cv2.INTER_AREA)
    return np.concatenate([np.sqrt(np.stack(cells)).ravel(), colours.ravel()])


def _check_links(folder: Path, used: pd.DataFrame) -> None:
    links = {f"{part}/{link.parent.name}/{link.name}" for part in splits.PARTS for link in (folder / part).glob("*/*")}
    different_links = sorted(set(used["file"]) ^ links)
    if different_links:
        raise ValueError(
            f"{len(different_links)} links do not agree with split.csv, such as {different_links[0]!r}."
            " Run 01_split again."
        )


def _refuse(leaked: pd.DataFrame, why: str) -> None:
    if len(leaked):
        shown = "; ".join(f"{row.part}: {row.path}" for row in leaked.head(6).itertuples())
        raise ValueError(
            f"The split leaks: {why}, {len(leaked)} images in all ({shown}). Remove them from the source, or set"
            " on_leak: drop to remove them from train."
        )
