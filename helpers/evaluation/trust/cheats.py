"""Is the model cheating? What a probe can predict from things that should not matter.

Two small classifiers learn the classes from facts about the files alone (size, JPEG compression, date, camera, folder,
colour) and from the border of the images alone. A network can learn from the same clues instead of the object.
"""

import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from PIL import ExifTags, Image

from helpers.core import disk, linear, parallel, words
from helpers.data import images as files
from helpers.data import inventory
from helpers.evaluation import metrics

MOST = 500  # images that are examined
FEWEST = 10  # of them that a class should have: of many classes, some are examined
TREES = 40  # of a forest; ten are enough where it reads one fact
FOLDS = 5
RING = 16  # the image is resized to this; its outermost ring of pixels is the border
FACTS = {
    "width": "width",
    "height": "height",
    "aspect": "ratio of width to height",
    "bytes": "file size",
    "bytes_per_pixel": "file size by pixel",
    "quality": "JPEG compression",
    "format": "file format",
    "mode": "colour mode",
    "taken": "date",
    "hour": "time of day",
    "camera": "camera",
    "folder": "folder",
    "brightness": "brightness",
    "red": "redness",
    "blue": "blueness",
    "contrast": "contrast",
}


@dataclass(frozen=True)
class Verdict:
    """How well a probe separates the classes.

    Attributes:
        what: the input of the probe, "facts" or "border".
        value, low, high: balanced accuracy on images that it has not learned from, with its 95 % interval.
        chance: the balanced accuracy of guessing.
        fields: the facts that alone beat chance, the strongest first, each with its balanced accuracy.
        classes: how many it was asked about.
        all_classes: how many there are, 0 if all were asked about.
    """

    what: str
    value: float
    low: float
    high: float
    chance: float
    fields: tuple[tuple[str, float], ...] = ()
    classes: int = 0
    all_classes: int = 0

    @property
    def is_suspicious(self) -> bool:
        return self.low > self.chance

    def __str__(self) -> str:
        what = {"facts": "only facts about the files", "border": "only the border of the images"}[self.what]
        numbers = (
            f"{words.percent(self.value)} balanced accuracy ({words.percent(self.low)} to {words.percent(self.high)})"
        )
        if self.classes < self.all_classes:
            what += f", of {self.classes} of the {self.all_classes} classes,"
        if not self.is_suspicious:
            return f"A probe that sees {what} does not beat chance: {numbers}; chance is {words.percent(self.chance)}."
        named = ", ".join(f"{FACTS[name]} ({words.percent(value)})" for name, value in self.fields[:4])
        gives = f" What reveals the class: {named}." if named else ""
        return (
            f"Caution: a probe that sees {what} reaches {numbers}, where chance is {words.percent(self.chance)}.{gives}"
        )


def sample(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return up to 500 images of up to 50 classes, drawn at random; each class has images of two groups or more.

    Args:
        rows: an image each: columns label and group, and others.
        seed: of the choice.
    """
    names = _in_two_groups(rows)
    if len(names) > MOST // FEWEST:
        names = np.random.default_rng(seed).choice(names, MOST // FEWEST, replace=False)
    rows = rows[rows["label"].isin(names)]
    rows = rows.sample(min(MOST, len(rows)), random_state=seed).sort_index()
    return rows[rows["label"].isin(_in_two_groups(rows))].reset_index(drop=True)


def _in_two_groups(rows: pd.DataFrame) -> np.ndarray:
    """Return the classes whose images are in two groups or more, sorted."""
    groups = rows.groupby("label")["group"].nunique()
    return groups.index[groups > 1].to_numpy()


def examine(resized: Path, explored: Path, seed: int = 0) -> list[Verdict]:
    """Return the verdicts on both probes, on images of train and val that `sample` draws; test is not used.

    The list is empty where fewer than two classes have images in two groups.

    Args:
        resized: folder of 02_resize.
        explored: the folder of the inventory, of 00_explore or 00b_crop; its `source` leads to the original files.
        seed: of the choice of images, of folds and trees.
    """
    listed = disk.read_table(resized / "images.csv")
    listed = listed[(listed["part"] != "test") & ~listed.duplicated("path")]
    group_of = inventory.read(explored).drop_duplicates("path").set_index("path")["group"]
    whole = listed.assign(group=group_of.reindex(listed["path"]).to_numpy())
    rows = sample(whole, seed)
    if rows["label"].nunique() < 2:
        return []
    resized_files = [resized / file for file in rows["file"]]
    raw = facts([explored / "source" / path for path in rows["path"]], resized_files)
    raw["folder"] = folders_of(rows["path"], rows["label"])
    inputs = {"facts": raw, "border": border(resized_files)}
    several = whole["label"].nunique()
    return [
        replace(judge(what, numbers, rows["label"], rows["group"], seed=seed), all_classes=several)
        for what, numbers in inputs.items()
    ]


def facts(raw: Sequence[str | Path], seen: Sequence[str | Path]) -> pd.DataFrame:
    """Return facts about image files except what they show: columns of FACTS, NaN or "" if unknown.

    Args:
        raw: the original files.
        seen: the same images as the model reads them, for colours and contrast, which are fractions of white.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 00_explore has reported what is odd in a file
        of_files = list(parallel.in_threads(_facts, [Path(path) for path in raw]))
    colours = parallel.in_threads(_colours, seen)
    columns = [name for name in FACTS if name != "folder"]
    return pd.DataFrame([one + other for one, other in zip(of_files, colours, strict=True)], columns=columns)


def folders_of(paths: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return the folder of each image without the parts that name a class; all "" if folders are renamed classes.

    Args:
        paths: below the source.
        labels: class of each image.
    """
    classes = {part for label in set(labels) for part in label.split("/")}
    kept = [[part for part in PurePosixPath(path).parent.parts if _plain(part) not in classes] for path in paths]
    folders = ["/".join(parts) for parts in kept]
    pairs = set(zip(folders, labels, strict=True))
    return [""] * len(folders) if len(pairs) == len(set(folders)) == len(set(labels)) else folders


def border(paths: Sequence[str | Path]) -> np.ndarray:
    """Return the outermost ring of each image, resized to 16 x 16 pixels, float32 (images, 180), 0 to 1."""
    return np.stack(list(parallel.in_threads(_ring, paths)))


def judge(
    what: str, features: pd.DataFrame | np.ndarray, labels: Sequence[str], groups: Sequence[str], *, seed: int = 0
) -> Verdict:
    """Return how well a probe separates the classes; it learns from some groups of images and is tested on others.

    A forest of trees, which finds ranges and combinations, reads facts; a logistic regression reads the border.

    Args:
        what: "facts", with a table of FACTS, or "border", with numbers (images, n).
        labels: class of each image.
        groups: images of one group are never on both sides.
        seed: of folds, trees and resamples.

    Raises:
        ValueError: fewer than two classes, or too few groups to hold some out.
    """
    labels, groups = np.asarray(labels).astype(str), np.asarray(groups).astype(str)
    names, target = np.unique(labels, return_inverse=True)
    folds = min(FOLDS, int(pd.DataFrame({"l": target, "g": groups}).groupby("l")["g"].nunique().min()))
    if len(names) < 2 or folds < 2:
        raise ValueError(
            f"A probe needs two classes of two groups each; got {len(names)} classes, {folds} groups in one."
        )
    numbers = _numbers(features) if what == "facts" else pd.DataFrame(np.asarray(features))
    whole = _held_out(what, numbers, target, groups, folds, seed)
    fields = []
    if what == "facts" and whole[1] > 1 / len(names):
        for name in numbers:
            value, low, _ = _held_out(what, numbers[[name]], target, groups, folds, seed)
            fields += [(name, value)] if low > 1 / len(names) else []
    strongest = tuple(sorted(fields, key=lambda field: -field[1]))
    return Verdict(what, *whole, 1 / len(names), strongest, len(names))


def _held_out(what, numbers: pd.DataFrame, target, groups, folds: int, seed: int) -> tuple[float, float, float]:
    """Return balanced accuracy on held-out images, with its interval."""
    from sklearn import config_context
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedGroupKFold

    values, picked = numbers.to_numpy(np.float32), np.zeros(len(target), int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer groups than folds
        rounds = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(values, target, groups))
    for learned, tested in rounds:
        counts = np.bincount(target[learned])
        weights = len(learned) / (np.count_nonzero(counts) * counts[target[learned]])
        if what == "facts":
            trees = TREES if values.shape[1] > 1 else 10
            model = RandomForestClassifier(trees, min_samples_leaf=3, random_state=seed)
            with config_context(skip_parameter_validation=True, assume_finite=True):  # else checked again for each tree
                model.fit(values[learned], target[learned], weights)
        else:
            model = linear.fit(linear.classifier(1e-3, 1e-2), values[learned], target[learned], weights)
        picked[tested] = model.predict(values[tested])
    is_correct, classes = picked == target, np.unique(target)
    value = np.mean([is_correct[target == one].mean() for one in classes])
    chunks = metrics.resamples(target, seed, 500, groups)
    recalls = [[(w * is_correct)[:, target == one].sum(axis=1) / np.maximum(w[:, target == one].sum(axis=1), 1)
                for one in classes] for w in chunks]  # fmt: skip
    low, high = np.quantile(np.concatenate([np.mean(part, axis=0) for part in recalls]), metrics.ENDS)
    return float(value), float(low), float(high)


def _numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Return the facts that differ between images, as numbers; unknown values are -1."""
    kept = {}
    for name in table:
        column = table[name]
        as_numbers = column if pd.api.types.is_numeric_dtype(column) else pd.Series(pd.factorize(column, sort=True)[0])
        if as_numbers.nunique(dropna=False) > 1:
            kept[name] = as_numbers.astype(float).fillna(-1.0)
    return pd.DataFrame(kept if kept else {"nothing": np.zeros(len(table))})


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())  # like labels


def _facts(path: Path) -> list:
    data = files.read_bytes(path)
    image = files.open_image(data, max_pixels=None)
    (width, height), about = image.size, image.getexif()
    taken = about.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal) or about.get(ExifTags.Base.DateTime)
    camera = f"{about.get(ExifTags.Base.Make, '')} {about.get(ExifTags.Base.Model, '')}".strip()
    moment = pd.to_datetime(str(taken), format="%Y:%m:%d %H:%M:%S", errors="coerce")
    day, hour = (moment.toordinal(), moment.hour + moment.minute / 60) if pd.notna(moment) else (np.nan, np.nan)
    sizes = [width, height, width / height, len(data), len(data) / (width * height)]
    return [*sizes, _quality(image), image.format or "", image.mode, day, hour, camera]


def _colours(path: str | Path) -> list[float]:
    small = _small(path, 2 * RING)
    brightness = small.mean()
    red, _, blue = (small.mean(axis=(0, 1)) - brightness).round(4)  # exactly 0 for grey
    return [*map(float, (brightness, red, blue, small.mean(axis=2).std()))]


def _quality(image: Image.Image) -> float:
    """Return the mean of a JPEG's quantisation tables, which grows as its quality falls; NaN for other files."""
    tables = getattr(image, "quantization", None)
    return float(np.mean([np.mean(values) for values in tables.values()])) if tables else np.nan


def _small(path: str | Path, side: int) -> np.ndarray:
    opened = files.open_image(files.read_bytes(path), max_pixels=None)
    array = files.decode(opened, at_least=(side, side))
    image = Image.fromarray(np.asarray(array, np.uint8))
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32) / 255


def _ring(path: str | Path) -> np.ndarray:
    small = _small(path, RING)
    return np.concatenate([small[0], small[-1], small[1:-1, 0], small[1:-1, -1]]).ravel()
