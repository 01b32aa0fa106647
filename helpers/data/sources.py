"""Where labelled images come from: a folder per class, a ready-made split, a table of labels, a built-in data set.

Every source becomes the same thing: a root folder and a table of path and label. Nothing is decoded here and nothing
in the source is ever changed. Every unusable image is listed with its reason.
"""

import importlib.util
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.core import project, words
from helpers.data.labelling import fixes, folders, labels

RESERVED = {"path", "file", "label", "predicted", "confidence"}  # columns of the tables of predictions


@dataclass
class Source:
    """Labelled images before any of them is opened.

    Attributes:
        root: the folder that every path is relative to.
        table: one row per image: path (posix), label, split and group ("" when unknown), and the labels file's
            other columns, all text.
        rejected: rows of quarantine.csv: path, label, reason, detail.
        ignored: what was skipped -> how often.
        notes: sentences about how the source was read, where that is not obvious.
        fixes: labels that a fixes file changed: path, from, to ("": the image was removed), sha256.
    """

    root: Path
    table: pd.DataFrame
    rejected: list[dict[str, str]] = field(default_factory=list)
    ignored: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    fixes: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=fixes.CHANGES))


def read(parameters: Mapping[str, Any]) -> Source:
    """Find the images and their labels.

    Args:
        parameters: the parameters of 00_explore.

    Raises:
        FileNotFoundError: the folder, the labels file or a built-in data set is missing.
        ValueError: no image is found, or the labels file lacks a column, only one class remains, or a fix does not
            fit the source.
    """
    name = parameters["source"]
    if name in BUILT_IN:
        if parameters["labels"]:
            raise ValueError(f"source: {name} brings its own labels; leave `labels` empty or name a folder as source.")
        source = BUILT_IN[name]()
    else:
        root = _existing_folder(name)
        by_table = parameters["labels"]
        source = _read_table(root, parameters) if by_table else _read_folders(root, parameters["class_folders"])
    _finish(source)
    if parameters["fixes"]:
        _fix(source, project.resolve(parameters["fixes"]))
    return source


def check_separate(root: Path, out: str | os.PathLike) -> None:
    """Raise ValueError when the source is inside the output folder, or the output folder inside the source."""
    root, out = root.resolve(), project.resolve(out).resolve()
    if root.is_relative_to(out) or out.is_relative_to(root):
        raise ValueError(f"The source {root} and the output {out} lie inside each other. Choose another `out`.")


def _existing_folder(name: str) -> Path:
    root = project.resolve(name)
    if not name or not root.is_dir():
        raise FileNotFoundError(
            f"source: {name!r} is neither a folder ({root}) nor one of the built-in data sets {', '.join(BUILT_IN)}."
        )
    return root


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"The data set comes with the Python package {package}: pip install -e '.[data]'")
    return Path(next(iter(spec.submodule_search_locations)))


def _elpv() -> Source:
    """Solar cells (Deitsch et al. 2019): defective when the defect probability by experts is above one half."""
    root = _package_folder("elpv_dataset") / "data"
    table = pd.read_csv(root / "labels.csv", sep=r"\s+", names=["path", "probability", "type"], dtype=str)
    defective = table["probability"].astype(float) > 0.5
    table.insert(1, "label", np.where(defective, "defective", "functional"))
    return Source(root, table)


def _textile() -> Source:
    """Simulated textile images (Megahed et al.): nominal, or with a local or global defect."""
    return _read_folders(_package_folder("conformal_clip_data") / "data" / "textile_images" / "simulated")


BUILT_IN = {"elpv": _elpv, "textile": _textile}


def _read_table(root: Path, parameters: Mapping[str, Any]) -> Source:
    table, rejected, notes = labels.read(root, parameters)
    return Source(root, table, rejected, notes=notes)


def _read_folders(root: Path, class_folders: folders.Levels = "auto") -> Source:
    contents = folders.read(root, class_folders)
    return Source(root, contents.table, contents.rejected, contents.ignored, notes=contents.notes)


def _finish(source: Source) -> None:
    """Bring the table into its final form; raise an error if no classifier can be trained on it."""
    table = source.table.reindex(columns=list(dict.fromkeys(["path", "label", "split", "group", *source.table])))
    table[["split", "group"]] = table[["split", "group"]].fillna("")
    table["label"] = [unicodedata.normalize("NFC", label.strip()) for label in table["label"]]
    table["split"] = _known_parts(table["split"])
    table = _reject(source, table, table["label"] == "", "no label", "the label is empty")
    repeated = table.duplicated()
    if repeated.any():
        source.ignored["repeated rows of the labels file"] += int(repeated.sum())
    table = table[~repeated]
    several = table.duplicated("path", keep=False)
    table = _reject(source, table, several, "two labels", "the labels file lists it more than once, differently")
    source.table = table.sort_values("path", kind="stable").reset_index(drop=True)
    if source.table.empty:
        raise ValueError(f"{source.root} holds no labelled image. {_contents(source)}")
    check_classes(source.table["label"])


def _fix(source: Source, file: Path) -> None:
    """Correct the labels with a fixes file."""
    source.table, source.fixes, gone = fixes.apply(source.table, source.root, file)
    if gone:
        source.ignored["fixes of images that are no longer there"] += gone
    check_classes(source.table["label"])


def check_classes(labels: pd.Series) -> None:
    """Raise ValueError unless there are two classes or more, with different names that can be columns."""
    names = words.natural_order(labels)
    if taken := RESERVED & set(names):
        raise ValueError(
            f"A class cannot be called {', '.join(sorted(taken))}: predictions.csv has a column of that name, and one"
            " column for each class. Rename the class, for example with a capital letter."
        )
    if len(names) < 2:
        raise ValueError(f"Only one class is left, {names}: a classifier needs at least two.")
    alike = Counter(name.casefold() for name in names)
    twins = [name for name in names if alike[name.casefold()] > 1]
    if twins:
        raise ValueError(f"These classes differ only in case: {', '.join(twins)}. Rename them to one name or to two.")


def _known_parts(values: pd.Series) -> list[str]:
    values = values.str.strip()
    unknown = sorted({value for value in values if value and value.lower() not in folders.PARTS})
    if unknown:
        raise ValueError(
            f"The split column has {', '.join(unknown[:5])}; it may have {', '.join(folders.PARTS)} or be empty."
        )
    return [folders.PARTS[value.lower()] if value else "" for value in values]


def _contents(source: Source) -> str:
    lines = [f"{count:,} {what}" for what, count in source.ignored.most_common(3)]
    lines += [f"{row['path']}: {row['detail']}" for row in source.rejected[:3]]
    return f"Found instead: {'; '.join(lines)}." if lines else "It is empty. Expected: a folder per class, with images."


def _reject(source: Source, table: pd.DataFrame, bad: pd.Series, reason: str, detail: str) -> pd.DataFrame:
    """Add the `bad` rows to `source.rejected` and return the others."""
    rows = table.loc[bad, ["path", "label"]].assign(reason=reason, detail=detail)
    source.rejected.extend(rows.to_dict("records"))
    return table[~bad]
