"""What more images would bring: accuracy against the number of training images, measured and extrapolated.

A probe is fitted to a share of the training images. The error on the validation images is extrapolated as a power law,
error = a + b * n^-c (Hestness et al., "Deep Learning Scaling is Predictable, Empirically", 2017). The intervals are
percentiles over resampled validation images and resampled draws of the training images. They do not
include the doubt whether the law holds beyond the measured sizes, so they are too narrow far from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.core import linear, progress
from helpers.evaluation import probe

EXPONENTS = np.geomspace(0.05, 2.0, 40)  # the choices for c; Hestness et al. report 0.07 to 0.5
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
CLASS_SHARES = (1 / 8, 1 / 4, 1 / 2)
DRAWS = 5  # random draws of the training images behind each point
MOST_CLASSES = 12  # classes that `gains` looks at
FEWEST = 8  # training images that a class needs for its own curve
RESAMPLES = 1000
TAIL = 0.025  # on either side of a 95 % interval


@dataclass(frozen=True)
class Features:
    """What the probe learns from and what it predicts.

    Attributes:
        train, val: float32 (images, n).
        train_labels, val_labels: class indices (images,).
        class_names: in the order of the indices.
        strength: of the probe, as `probe.best_strength` chooses it.
    """

    train: np.ndarray
    val: np.ndarray
    train_labels: np.ndarray
    val_labels: np.ndarray
    class_names: list[str]
    strength: float


@dataclass(frozen=True)
class Curve:
    """Which validation images the probe got wrong after learning from so many images.

    Attributes:
        counts: (sizes,) training images, rising; of the whole training part or of one class. The last is all of them.
        wrong: float (sizes, draws, validation images), 1 where the probe was wrong.
        labels: class indices of the validation images.
    """

    counts: np.ndarray
    wrong: np.ndarray
    labels: np.ndarray


def read(item: dict[str, Any], strength: float) -> Features:
    """Return the features of one backbone, an item of `probe.embed_all`."""
    train, val, class_names = probe.parts(Path(item["source"]))
    return Features(*probe.read(item), train["target"].to_numpy(), val["target"].to_numpy(), class_names, strength)


def measure(features: Features, seeds: Sequence[int] = range(DRAWS)) -> Curve:
    """Return the curve of all classes together, each with the same share of its images, so that their mix stays."""
    everything = np.arange(len(features.train_labels))
    per_class = [np.flatnonzero(features.train_labels == label) for label in np.unique(features.train_labels)]
    shares = [share for share in SHARES if share * len(everything) >= 2 * len(per_class)]
    sizes = [[min(len(rows), max(2, round(share * len(rows)))) for rows in per_class] for share in shares]
    tasks = [(size, seed) for size in sizes for seed in seeds]
    wrong = []
    for size, seed in progress.track(tasks, total=len(tasks), unit="fit", label="learning curve"):
        rng = np.random.default_rng([seed, sum(size)])
        drawn = [rng.choice(rows, count, replace=False) for rows, count in zip(per_class, size, strict=True)]
        wrong.append(_errors(features, np.concatenate(drawn)))
    full = np.repeat(_errors(features, everything)[None], len(seeds), axis=0)
    wrong = np.concatenate([np.reshape(wrong, (len(sizes), *full.shape)), full[None]])
    return Curve(np.array([*map(sum, sizes), len(everything)], float), wrong, features.val_labels)


def measure_class(features: Features, label: int, full: np.ndarray, seeds: Sequence[int]) -> Curve:
    """Return the curve of one class: fewer images of it, all of the others.

    Args:
        label: index of the class, which has at least `FEWEST` training images.
        full: (validation images,) errors after all training images, the last of `measure`.
    """
    rows, others = (np.flatnonzero(mask) for mask in (features.train_labels == label, features.train_labels != label))
    wrong = []
    for share in CLASS_SHARES:
        for seed in seeds:
            rng = np.random.default_rng([seed, round(1 / share), label])
            kept = rng.choice(rows, size=round(share * len(rows)), replace=False)
            wrong.append(_errors(features, np.concatenate([others, kept])))
    wrong = np.reshape(wrong, (len(CLASS_SHARES), len(seeds), len(full)))
    wrong = np.concatenate([wrong, np.repeat(full[None, None], len(seeds), axis=1)])
    counts = [round(share * len(rows)) for share in CLASS_SHARES]
    return Curve(np.array([*counts, len(rows)], float), wrong, features.val_labels)


def extrapolated(curve: Curve, counts: Sequence[float], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Fit the power law and return the accuracy at `counts` training images.

    Returns:
        The fitted accuracy (counts,), and that of each resample (RESAMPLES, counts). NaN if fewer than three sizes
        were measured, since every such law fits them.
    """
    if len(curve.counts) < 3:
        return np.full(len(counts), np.nan), np.full((RESAMPLES, len(counts)), np.nan)
    rng = np.random.default_rng(seed)
    errors = _resampled(curve, rng)
    mean = curve.wrong.mean(axis=(1, 2))[None]
    relative = np.asarray(counts, float) / curve.counts[-1]
    fitted = 1 - _power_law(curve.counts / curve.counts[-1], np.concatenate([mean, errors]), relative)
    return fitted[0], fitted[1:]


def table(curve: Curve, further: Sequence[float] = (2, 4), seed: int = 0) -> pd.DataFrame:
    """Return the learning curve, measured and extrapolated.

    Args:
        curve: from `measure`.
        further: multiples of the present number of images to extrapolate to.

    Returns:
        One row a size, with images (of training, in all), per_class (their mean), measured (accuracy, NaN where nothing
        was), accuracy (of the power law), low and high (its 95 % interval).
    """
    counts = [*curve.counts, *(times * curve.counts[-1] for times in further)]
    value, draws = extrapolated(curve, counts, seed)
    low, high = np.quantile(draws, [TAIL, 1 - TAIL], axis=0)
    measured = [*(1 - curve.wrong.mean(axis=(1, 2))), *[np.nan] * len(further)]
    images, classes = np.round(counts).astype(int), len(np.unique(curve.labels))
    numbers = {"images": images, "per_class": images / classes, "measured": measured}
    return pd.DataFrame(numbers | {"accuracy": value, "low": low, "high": high})


def gains(
    features: Features,
    full: np.ndarray,
    *,
    more: int,
    seeds: Sequence[int] = range(DRAWS),
    most: int = MOST_CLASSES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return what `more` images of one class would bring, class by class, those with the lowest recall first.

    Args:
        full: (validation images,) errors after all training images, the last of `measure`.
        more: images of the class to add.
        seeds: of the draws.
        most: classes to look at. Those with too few images for their own curve are left out.

    Returns:
        One row a class: label, images (of training), recall (measured now), gain (of the accuracy over all classes,
        from the power law), low and high (its 95 % interval): fractions.
    """
    counts = np.bincount(features.train_labels, minlength=len(features.class_names))
    candidates = [label for label in np.unique(features.val_labels) if counts[label] >= FEWEST]
    recall = {label: 1 - full[features.val_labels == label].mean() for label in candidates}
    chosen = sorted(candidates, key=recall.get)[:most]
    rows = []
    for label in progress.track(chosen, total=len(chosen), unit="class", label="what more images would bring"):
        curve = measure_class(features, label, full, seeds)
        value, draws = extrapolated(curve, [counts[label], counts[label] + more], seed)
        low, high = np.quantile(draws[:, 1] - draws[:, 0], [TAIL, 1 - TAIL])
        name = features.class_names[label]
        rows.append([name, int(counts[label]), recall[label], value[1] - value[0], low, high])
    return pd.DataFrame(rows, columns=["label", "images", "recall", "gain", "low", "high"])


def _errors(features: Features, rows: np.ndarray) -> np.ndarray:
    """Return (validation images,) 1 where a probe that learned `rows` of the training images is wrong.

    Each class has the same weight as in all training images. Fewer or more images of a class change how
    well it is learned, but not how common it seems.
    """
    labels = features.train_labels[rows]
    had, has = (np.bincount(part, minlength=len(features.class_names)) for part in (features.train_labels, labels))
    weights = (had / had.sum())[labels] / (has / has.sum())[labels]
    model = linear.classifier(features.strength, probe.TOLERANCE)
    linear.fit(model, features.train[rows], labels, weights)
    return (model.predict(features.val) != features.val_labels).astype(float)


def _resampled(curve: Curve, rng: np.random.Generator) -> np.ndarray:
    """Return the errors (RESAMPLES, sizes) of resampled validation images, class by class, and of resampled draws."""
    sizes, draws, count = curve.wrong.shape
    images = np.zeros((RESAMPLES, count))
    for label in np.unique(curve.labels):
        members = np.flatnonzero(curve.labels == label)
        images[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), RESAMPLES)
    chosen = rng.multinomial(draws, np.full(draws, 1 / draws), (RESAMPLES, sizes)) / draws
    return np.einsum("ksn,rn,rks->rk", curve.wrong, images / count, chosen, optimize=True)


def _power_law(counts: np.ndarray, errors: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Fit a + b * n^-c with 0 <= a to each row of `errors` by least squares and return it at `sizes`, within 0 to 1.

    For each c of EXPONENTS a and b follow in closed form; the c with the smallest residual is taken.

    Args:
        counts: (sizes,).
        errors: (rows, sizes).
        sizes: (counts,).

    Returns:
        (rows, counts).
    """
    x = counts[None, :] ** -EXPONENTS[:, None]  # (exponents, sizes)
    centred, mean = x - x.mean(axis=1, keepdims=True), errors.mean(axis=1, keepdims=True)
    b = (errors @ centred.T) / np.square(centred).sum(axis=1)
    a = mean - b * x.mean(axis=1)
    b_alone = (errors @ x.T) / np.square(x).sum(axis=1)
    b, a = np.where(a < 0, b_alone, b), np.maximum(a, 0)  # (rows, exponents)
    left_over = np.square(errors[:, None] - a[:, :, None] - b[:, :, None] * x).sum(axis=2)
    best = left_over.argmin(axis=1)
    rows = np.arange(len(errors))
    values = a[rows, best, None] + b[rows, best, None] * sizes[None, :] ** -EXPONENTS[best, None]
    return np.clip(values, 0, 1)
