"""Doubts about labels: what a model that has not learned an image predicts for it, and what contradicts its label.

The features are those of the run's backbone as phase 1 leaves it, frozen, so no label of the run has changed them. A
logistic regression on them is cross-validated over train and val; another one, fitted to all of train and val, judges
the test part.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.core import disk, linear, progress
from helpers.data import grouping

STRENGTHS = (1e-3, 1e-2, 1e-1)  # of the logistic regression's weights (its C), on standardised features


def embed(head: Path, resized: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the images of 02_resize, each once, and their features from the frozen backbone of phase 1.

    Returns:
        A table of path (relative to the source's root), label, part and sha256, and float32 features (images, n).
    """
    from helpers.compute import frontier, hardware, inference
    from helpers.models import unfreezing
    from helpers.training import datasets

    model = hardware.load(head / "model.keras")
    unfreezing.unfreeze(model, "none")
    run = inference.fast(frontier.cut(model).prefix)
    listed = disk.read_table(resized / "images.csv")
    tables, features = [], []
    for part in [name for name in ("train", "val", "test") if (listed["part"] == name).any()]:
        folder = datasets.read(resized, part)
        tables.append(listed[listed["part"] == part])
        features.append(datasets.through(run, folder, part).astype(np.float32))
    table = pd.concat(tables, ignore_index=True)[["path", "label", "part", "sha256"]]
    once = ~table.duplicated("path").to_numpy()  # oversampling lists an image several times
    return table[once].reset_index(drop=True), np.concatenate(features)[once]


def out_of_sample(
    features: np.ndarray, labels: np.ndarray, parts: pd.Series, groups: pd.Series, classes: int, *, folds: int = 5
) -> np.ndarray:
    """Return the probabilities of a logistic regression for each image that it has not learned from.

    Train and val are cross-validated, a group always in one fold, so that no copy of an image confirms its label.
    A model of all of train and val judges the test part. No model learns from it.

    Args:
        features: float (images, n).
        labels: class indices (images,).
        parts: "train", "val" or "test" of each image.
        groups: images with the same value stay together.
        classes: number of classes.
        folds: of the cross-validation.

    Returns:
        float64 (images, classes); NaN for an image whose class has no other image to learn from.

    Raises:
        ValueError: there are fewer groups of images than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    parts, groups = np.asarray(parts), np.asarray(groups)
    rows, test = np.flatnonzero(parts != "test"), np.flatnonzero(parts == "test")
    most = pd.DataFrame({"label": labels[rows], "group": groups[rows]}).groupby("label")["group"].nunique().max()
    if not 2 <= folds <= most:
        raise ValueError(f"--folds {folds}: expected 2 to {most}, the groups of images that the largest class has.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rare classes are handled below; slow convergence is harmless
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
        rounds = [(rows[a], rows[b]) for a, b in splitter.split(rows, labels[rows], groups[rows])]
        strength = linear.best_strength(features, labels, rounds[:1], STRENGTHS)  # cleanlab needs true probabilities
        probabilities = np.full((len(labels), classes), np.nan)
        for learned, judged in progress.track([*rounds, (rows, test)], total=folds + 1, unit="fold", label="judging"):
            judged = judged[np.isin(labels[judged], labels[learned])]
            if len(judged) and len(np.unique(labels[learned])) > 1:
                model = linear.fit(linear.classifier(strength), features[learned], labels[learned])
                probabilities[judged] = 0
                probabilities[np.ix_(judged, model.classes_)] = model.predict_proba(features[judged])
    return probabilities


def suspects(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the positions of the images whose label is probably wrong, the most suspicious first.

    Confident learning (Northcutt et al., 2021) in cleanlab: how often each class is confused with each other one gives
    the number of wrong labels; the images that agree least with their label are named.

    Args:
        labels: class indices (images,).
        probabilities: as `out_of_sample` returns them.
    """
    cleanlab_filter, cleanlab_rank = cleanlab()
    judged = np.flatnonzero(~np.isnan(probabilities[:, 0]))
    present, targets = np.unique(labels[judged], return_inverse=True)
    if len(present) < 2:
        return np.empty(0, int)
    chances = np.clip(probabilities[np.ix_(judged, present)], 1e-9, None)
    chances /= chances.sum(axis=1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about classes of few images
        # One process: those that cleanlab would fork could hang on TensorFlow's threads.
        wrong = cleanlab_filter.find_label_issues(targets, chances, n_jobs=1)
    quality = cleanlab_rank.get_label_quality_scores(targets, chances)
    order = np.argsort(quality, kind="stable")
    return judged[order[wrong[order]]]


def look_alikes(listed: pd.DataFrame, distance: int) -> list[pd.DataFrame]:
    """Return the groups of images that look alike and have different labels; the user's own groups do not count.

    Args:
        listed: the inventory.
        distance: bits in which the perceptual hashes of look-alikes may differ; -1 compares none.
    """
    grouped = grouping.group(listed.assign(group=""), distance=distance)
    mixed = grouped[grouped.groupby("group")["label"].transform("nunique") > 1]
    return [table[["path", "label", "sha256"]] for _, table in mixed.groupby("group", sort=True)]


def identical(explore: Path) -> list[pd.DataFrame]:
    """Return the groups of identical files that 00_explore set aside because their labels differ."""
    quarantine = disk.read_table(explore / "quarantine.csv")
    table = quarantine[quarantine["reason"] == "two labels"]
    table = table[~table.duplicated("path", keep=False)]  # listed twice in a labels file: that file needs a fix
    table = table[table["path"].map(lambda path: (explore / "source" / path).is_file()).astype(bool)]
    hashes = [disk.sha256_of(explore / "source" / path) for path in table["path"]]
    table = table[["path", "label"]].assign(sha256=hashes)
    return [group for _, group in table.groupby("sha256", sort=True) if group["label"].nunique() > 1]


def cleanlab() -> tuple[Any, Any]:
    """Return the modules filter and rank of cleanlab; without it raise an ImportError that says what to install."""
    try:
        from cleanlab import filter, rank
    except ImportError:
        raise ImportError("The label review needs cleanlab: pip install -e '.[review]'") from None
    return filter, rank
