"""A probe: how well a linear classifier separates the classes by the features of a frozen backbone.

The features are those that phase 1 trains on, computed once and kept where the training stages look for them. Each
backbone runs in a separate process (`core.child`), so that the measured memory is its own. A backbone that is not
available, or does not fit into memory, is a row with a reason. Only train and val are read.
"""

import re
import resource
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.core import child, disk, linear, progress, words
from helpers.evaluation import comparison, metrics, tables
from helpers.models import backbones

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the weights (scikit-learn's C), on standardised features
FOLDS = 3
TOLERANCE = 1e-2  # of the solver: ten times the usual, four times as fast and, measured on ELPV, no worse
SECONDS = 3.0  # how long the forward pass is measured
BATCH = 32
SIGNIFICANT = 0.05  # of the test that two backbones differ
COLUMNS = "backbone image_size accuracy low high balanced_accuracy p_value images_per_second memory_mb parameters"
COLUMNS = [*COLUMNS.split(), "model_mb", "cache_mb", "strength", "problem"]


def embed(
    backbone: str,
    source: Path,
    *,
    cache: Path,
    weights: str = "imagenet",
    next_unfreeze: str | int | float | dict = "none",
    cache_gb: float = 20.0,
) -> dict[str, Any]:
    """Compute the features of a frozen backbone for the plain images of train and val, in a separate process.

    Args:
        backbone: name, as `thaw backbones` lists them.
        source: folder of 02_resize.
        cache: folder of banks, as the training stages use it; what is there already is not computed again.
        weights: "imagenet" or "none".
        next_unfreeze: as in 03_train_head, whose activations are then kept too; if the backbone has no such layer,
            only the features are.
        cache_gb: disk that the activations may take, in 1e9 bytes.

    Returns:
        backbone, image_size and, if it worked, train and val (files of float16 or float32 features), images_per_second
        (of the forward pass), memory_mb (the most that the process used), parameters, model_mb (of its weights),
        cache_mb (of what is kept); if it did not, `problem`, the reason in words.
    """
    about = {"backbone": backbone, "image_size": disk.read_json(source / "resize.json")["image_size"]}
    if about["image_size"] < (least := backbones.spec(backbone).min_size):
        return about | {"problem": f"it needs images of at least {least} pixels (resize.image_size)"}
    settings = {"source": str(source), "cache": str(cache), "weights": weights, "next_unfreeze": next_unfreeze}
    try:
        return about | child.ask("helpers.evaluation.probe", about | settings | {"cache_gb": cache_gb}).value
    except child.ChildError as error:
        hint = ", most often because memory ran out" if error.signal else ""
        return about | {"problem": f"{error}{hint}"}


def embed_all(names: Sequence[str], sources: Sequence[Path], **settings: Any) -> list[dict[str, Any]]:
    """Return what `embed` returns for each backbone, and as `source` the folder that it read.

    Args:
        names: of backbones, each once.
        sources: folders of 02_resize. A backbone takes the one of the size that its ImageNet weights were trained at,
            the first one if there is none.
        settings: the other arguments of `embed`.

    Raises:
        ValueError: a name is unknown or named twice.
    """
    by_size = {disk.read_json(source / "resize.json")["image_size"]: source for source in reversed(sources)}
    own = {name: by_size.get(backbones.spec(name).size, sources[0]) for name in names}
    if not own or len(own) < len(names):
        raise ValueError(f"Name at least one backbone, and each once; got {', '.join(names) or 'none'}.")
    tracked = progress.track(own.items(), total=len(own), unit="backbone", label="features")
    return [embed(name, source, **settings) | {"source": str(source)} for name, source in tracked]


def problems(items: Sequence[dict[str, Any]]) -> str:
    """Return which of the backbones are not available, and why."""
    return "\n".join(f"{item['backbone']}: {item['problem']}" for item in items if "problem" in item)


def rank(
    items: Sequence[dict[str, Any]], *, seed: int = 0, resamples: int = 2000
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Judge each backbone by a probe on the validation images.

    Args:
        items: from `embed_all`.
        seed: of folds and resamples.
        resamples: behind each interval.

    Returns:
        A table, the best first and what is not available last, and the predictions by backbone. Its columns are
        backbone, image_size (pixels), accuracy with low and high (95 % interval), balanced_accuracy, p_value (exact
        McNemar test against the best), images_per_second, memory_mb, parameters, model_mb, cache_mb, strength (of the
        probe) and problem.

    Raises:
        ValueError: no backbone is available.
    """
    good = [item for item in items if "problem" not in item]
    if not good:
        raise ValueError(f"None of the backbones is available.\n{problems(items)}")
    rows, predictions = [], {}
    for item in progress.track(good, total=len(good), unit="backbone", label="probe"):
        strength, table = judge(item, seed)
        names = [name for name in table.columns if name not in (*tables.KEYS, tables.FILE)]
        result = metrics.metrics(table, names, seed=seed, n_bootstrap=resamples)
        accuracy = result["accuracy"] | {"balanced_accuracy": result["balanced_accuracy"]["value"]}
        rows.append(item | accuracy | {"accuracy": accuracy["value"], "strength": strength})
        predictions[item["backbone"]] = table
    order = sorted(rows, key=lambda row: (-row["accuracy"], -row["images_per_second"]))
    best = predictions[order[0]["backbone"]]
    for row in order[1:]:
        row["p_value"] = comparison.compare(best, predictions[row["backbone"]], names, n_bootstrap=1)["p_value"]
    table = pd.DataFrame([*order, *(item for item in items if "problem" in item)]).reindex(columns=COLUMNS)
    return table, predictions


def headline(table: pd.DataFrame) -> str:
    """Return the best of a table of `rank` as one line."""
    best, available = table.iloc[0], int(table["accuracy"].notna().sum())
    value, low, high = (words.percent(best[name]) for name in ("accuracy", "low", "high"))
    return (
        f"{best['backbone']} is best of {available}: {value} of validation (95 % interval {low} to {high}),"
        f" {best['images_per_second']:,.0f} images/s"
    )


def recommendation(table: pd.DataFrame) -> str:
    """Return which backbone of a table of `rank` to take: the fastest that validation cannot separate from the best."""
    available = table[table["accuracy"].notna()]
    equal = available[~(available["p_value"] < SIGNIFICANT)]
    name, best = equal.loc[equal["images_per_second"].idxmax(), "backbone"], table["backbone"].iloc[0]
    if len(equal) == 1:
        why = "it is better than every other by more than chance" if len(available) > 1 else "there is no other"
    elif name == best:
        why = f"it is the best, and the fastest of the {len(equal)} that validation cannot separate"
    else:
        why = f"it is the fastest of the {len(equal)} that validation cannot separate from {best}"
    return f"Recommended: {name}; {why}."


def write_predictions(folder: Path, predictions: dict[str, pd.DataFrame]) -> list[str]:
    """Write a CSV for each backbone and return the names of the files."""
    files = {f"predictions-{re.sub(r'[^-.0-9A-Za-z_]+', '-', name)}.csv": table for name, table in predictions.items()}
    for name, table in files.items():
        table.to_csv(folder / name, index=False)
    return list(files)


def parts(source: Path) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Return the rows of images.csv of train and of val, with class indices in `target`, and the class names."""
    table = disk.read_table(source / "images.csv")
    class_names = disk.read_json(source / "class_names.json")
    table["target"] = pd.Index(class_names).get_indexer(table["label"])
    train, val = (table[table["part"] == part].reset_index(drop=True) for part in ("train", "val"))
    return train, val, class_names


def best_strength(features: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int = 0) -> float:
    """Return the strength with the best log loss in cross-validation of the training images.

    Args:
        features: float (images, n).
        labels: class indices (images,).
        groups: images with the same value, such as copies, stay in one fold.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(FOLDS, len(np.unique(groups)))
    if folds < 2:
        return STRENGTHS[len(STRENGTHS) // 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer images than folds
        rounds = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(features, labels, groups))
    return linear.best_strength(features, labels, rounds, STRENGTHS, TOLERANCE)


def read(item: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of train and val from `embed`, float32 (images, n)."""
    train, val = (np.load(item[part]) for part in ("train", "val"))
    return tuple(part.reshape(-1, part.shape[-1]).astype("float32") for part in (train, val))


def judge(item: dict[str, Any], seed: int = 0) -> tuple[float, pd.DataFrame]:
    """Fit a probe to the training images of one backbone and predict the validation images.

    Args:
        item: from `embed_all`.
        seed: of the folds.

    Returns:
        The strength that cross-validation chose, and predictions as `tables.predictions_table` makes them.
    """
    train, val, class_names = parts(Path(item["source"]))
    features, val_features = read(item)
    labels = train["target"].to_numpy()
    strength = best_strength(features, labels, train["sha256"].to_numpy(), seed)
    model = linear.fit(linear.classifier(strength, TOLERANCE), features, labels)
    probabilities = np.zeros((len(val_features), len(class_names)))
    probabilities[:, model.classes_] = model.predict_proba(val_features)  # a class without training images keeps 0
    return strength, tables.predictions_table(val["path"], list(val["label"]), probabilities, class_names, val["file"])


def _embed(**task: Any) -> dict[str, Any]:
    """Do the work of `embed` in this process."""
    from helpers.compute import frontier
    from helpers.models import classifier, unfreezing
    from helpers.training import datasets, feeds

    train, val = (datasets.read(task["source"], part) for part in ("train", "val"))
    model = classifier.build(
        task["backbone"], len(train.class_names), image_size=train.image_size, weights=task["weights"]
    )
    unfreezing.unfreeze(model, "none")
    cut = frontier.cut(model)
    how = {"folder": Path(task["cache"]), "views": 1, "seed": 0, "cache_gb": task["cache_gb"]}
    before = _disk(how["folder"])
    try:
        banks = feeds.fill_banks(cut, train, val, **how, next_unfreeze=task["next_unfreeze"])
    except ValueError:  # this backbone has no such layer
        banks = None
    banks = banks or feeds.fill_banks(cut, train, val, **how)
    if banks is None:
        raise ValueError(f"{task['cache_gb']:g} GB of cache_gb do not hold its features.")
    prefix = cut.prefix
    files = [str(part.folder / "activations.npy") for part in (banks.train, banks.val)]
    return {
        "train": files[0],
        "val": files[1],
        "images_per_second": _speed(prefix, train),
        "memory_mb": _peak_memory() / 1e6,
        "parameters": prefix.count_params(),
        "model_mb": sum(np.dtype(str(w.dtype)).itemsize * int(np.prod(w.shape)) for w in prefix.weights) / 1e6,
        "cache_mb": (_disk(how["folder"]) - before) / 1e6,
    }


def _speed(prefix: Any, images: Any) -> float:
    """Return the images/s of the forward pass, decoded images in, features out."""
    from helpers.compute import inference

    run, batch = inference.fast(prefix), next(iter(images.pixels.rebatch(BATCH))).numpy().astype("float32")
    run(batch)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() < begin + SECONDS:
        count += len(run(batch))
    return count / (time.perf_counter() - begin)


def _peak_memory() -> int:
    """Return the most memory in bytes that this process has used."""
    try:  # ru_maxrss may belong to the process that started this one
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.npy")) if folder.is_dir() else 0


if __name__ == "__main__":
    child.answer(_embed)
