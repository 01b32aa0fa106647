"""The labels file: a CSV, TSV or Parquet table that names an image and its class in every row."""

import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from helpers.core import project
from helpers.data.labelling import tables

NO_LABEL = {"nan", "<na>", "#n/a", "n/a"}  # how tools write a missing label
ROLES = ("path", "label", "split", "group")
FACTS = (
    "value",
    "format",
    "width",
    "height",
    "mode",
    "orientation",
    "bytes",
    "sha256",
    "phash",
    "taken",
    "part",
    "file",
    "box",
)


def read(root: Path, parameters: Mapping[str, Any]) -> tuple[pd.DataFrame, list[dict[str, str]], list[str]]:
    """Read a labels file and find its images below `root`.

    Args:
        root: the folder that holds the images.
        parameters: the parameters of 00_explore.

    Returns:
        The usable rows as text (path relative to `root`, label, split and group where the file has them, and its
        other columns); the others as rows of quarantine.csv; and sentences about how the labels were read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, lacks a column, or the thresholds do not fit.
    """
    table = _named(tables.read(project.resolve(parameters["labels"])), parameters)
    locations = [_locate(root, path, parameters["suffix"]) for path in table["path"]]
    if any(reason == "missing" for _, reason, _ in locations):
        locations = _look_for_other_forms(root, locations)
    table["path"] = [path for path, _, _ in locations]
    table = table.assign(reason=[reason for _, reason, _ in locations], detail=[detail for _, _, detail in locations])
    notes: list[str] = []
    if parameters["thresholds"]:
        table = _cut(table, parameters["thresholds"], parameters["class_names"])
    else:
        notes = _understand(table)
    usable = table["reason"] == ""
    rejected = table.loc[~usable, ["path", "label", "reason", "detail"]].to_dict("records")
    return table[usable].drop(columns=["reason", "detail"]), rejected, notes


def _named(table: pd.DataFrame, parameters: Mapping[str, Any]) -> pd.DataFrame:
    """Return the table with its columns under the names of the inventory; other columns keep theirs."""
    table.columns = [str(column).strip() for column in table.columns]
    columns_by_role = dict(zip(ROLES, (parameters[f"{role}_column"] for role in ROLES), strict=True))
    missing = [
        name for role, name in columns_by_role.items() if name not in table and (role in ROLES[:2] or name != role)
    ]
    if missing:
        columns = ", ".join(table.columns)
        raise ValueError(f"labels: the file has no column {', '.join(map(repr, missing))}. It has: {columns}.")
    roles = {name: role for role, name in columns_by_role.items() if name in table}
    if len(roles) < len([name for name in columns_by_role.values() if name in table]):
        raise ValueError(f"labels: one column cannot have two roles: {columns_by_role}.")
    others = {column: f"given_{column}" for column in (*ROLES, *FACTS) if column in table and column not in roles}
    return table.rename(columns=others | roles).reset_index(drop=True)


def _locate(root: Path, name: str, suffix: str) -> tuple[str, str, str]:
    """Return the path of a row, relative to `root`, and a reason and a detail why it is unusable, both "" if usable."""
    text = name.strip()
    if not text:
        return name, "no path", "the path is empty"
    text = text if text.endswith(suffix) else text + suffix
    if "\\" in text and not os.path.lexists(os.path.join(root, text)):  # as Windows writes paths
        text = text.replace("\\", "/")
    path = os.path.normpath(os.path.join(root, text))
    if not path.startswith(os.path.normpath(root) + os.sep):
        return name, "outside the source", "the path leads out of the source folder"
    relative = PurePosixPath(Path(path).relative_to(os.path.normpath(root))).as_posix()
    if not os.path.lexists(path):
        return relative, "missing", "the labels file names it, but the file does not exist"
    return relative, "", ""


def _look_for_other_forms(root: Path, locations: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Find missing names that a file system holds in another Unicode form, as macOS does, or in another case."""
    folders = {root / PurePosixPath(path).parent for path, reason, _ in locations if reason == "missing"}
    files = [file for folder in folders if folder.is_dir() for file in folder.iterdir()]
    present: dict[str, set[str]] = defaultdict(set)
    for name in (str(file.relative_to(root)) for file in files):
        for form in {_form(name), _form(name).casefold()}:
            present[form].add(name)
    others = {}
    for path in (path for path, reason, _ in locations if reason == "missing"):
        like = present.get(_form(path)) or present.get(_form(path).casefold()) or set()
        if len(like) == 1:  # if two names differ only in case, neither is used
            others[path] = min(like)
    return [(others[row[0]], "", "") if others.get(row[0]) else row for row in locations]


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _understand(table: pd.DataFrame) -> list[str]:
    """Interpret labels in the table itself: "nan" is a missing label, and 0.0 is 0 where both occur.

    Returns:
        Sentences about the interpretation, or about labels to check.
    """
    notes, text = [], table["label"].str.strip()
    none = text.str.lower().isin(NO_LABEL) & (table["reason"] == "")
    table.loc[none, "detail"] = "the label is " + text[none] + ", which means no label"
    table.loc[none, "reason"] = "no label"
    names = text[~none & (text != "")].unique()
    whole = {name: name.partition(".")[0] for name in names if re.fullmatch(r"-?\d+\.0+", name)}
    if whole and all(re.fullmatch(r"-?\d+(\.\d+)?", name) for name in names) and {*whole.values()} & {*names}:
        table["label"] = text.replace(whole)
        notes.append(
            f"Numbers written in two ways are one class: {', '.join(f'{a} is {b}' for a, b in whole.items())}."
        )
    for mark in "|;,":
        pieces = {name: {piece.strip() for piece in name.split(mark)} for name in names if mark in name.strip(mark)}
        if pieces and all(inner & {*names} for inner in pieces.values()):
            example = min(pieces, key=len)
            notes.append(
                f"{example!r} looks like several labels of one image, which Thaw does not support: each"
                f" of the {len(pieces)} combinations is a class. Keep one label per image, or leave those images out."
            )
    return notes


def _cut(table: pd.DataFrame, thresholds: list[float], names: list[str]) -> pd.DataFrame:
    """Convert numeric labels to classes: a value above a threshold belongs to the class after it."""
    if any(low >= high for low, high in itertools.pairwise(thresholds)):
        raise ValueError(f"thresholds: {thresholds} must rise.")
    if not names:
        inner = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(thresholds)]
        names = [f"up to {thresholds[0]:g}", *inner, f"above {thresholds[-1]:g}"]
    if len(names) != len(thresholds) + 1:
        raise ValueError(f"class_names: {len(thresholds)} thresholds make {len(thresholds) + 1} classes, not {names}.")
    values = pd.to_numeric(table["label"], errors="coerce")
    table.loc[values.isna() & (table["reason"] == ""), ["reason", "detail"]] = ["no label", "the label is not a number"]
    classes = np.array(names, dtype=object)[np.searchsorted(thresholds, values.fillna(-np.inf))]
    return table.assign(value=table["label"], label=np.where(values.isna(), table["label"], classes))
