"""Tables of labels with any separator and any column names."""

import csv
import io
import itertools
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.core import project, words
from helpers.data.formats import listing
from helpers.data.images import SUFFIXES
from helpers.data.labelling import folders

TABLES = (".csv", ".tsv", ".txt", ".tab", ".parquet", ".pq")
SEPARATORS = ",;\t|"
NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
LABELS = ("label", "labels", "class", "class_name", "classname", "category", "target", "species", "breed", "diagnosis")
LABELS += ("label_name", "class_label", "y", "dx")
GROUPS = ("group", "group_id", "patient", "patient_id", "patientid", "subject", "subject_id", "lesion_id")
SPLITS = ("split", "part", "subset", "set", "partition", "fold", "usage")
SAMPLE = 200  # rows that are read to find the columns


def read(file: Path) -> pd.DataFrame:
    """Return a CSV, TSV or Parquet file as text, with its columns under their own names; empty cells are empty text.

    The separator is detected. Spaces after it and around the names, empty lines, and empty values after the last column
    are ignored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as a table; the message shows the line and the columns that were read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"labels: there is no file {file}.")
    if file.suffix.lower() in (".xls", ".xlsx", ".ods"):
        raise ValueError(f"labels: {file.name} is a spreadsheet. Save it as CSV (UTF-8) and name that file.")
    try:
        if file.suffix.lower() in (".parquet", ".pq"):
            return pd.read_parquet(file).map(lambda value: "" if pd.isna(value) else str(value))
        text = _text(file.read_bytes())
    except ImportError:
        raise ValueError(f"labels: {file.name} needs a reader of Parquet: pip install -e '.[parquet]'") from None
    except UnicodeError:
        raise ValueError(f"labels: {file.name} is not UTF-8 text. Save it as UTF-8 and try again.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"labels: {file.name} cannot be read as a table: {error}") from None
    return _table(text, separator(text), file.name)


def _text(data: bytes) -> str:
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    return data.decode(encoding)


def separator(text: str) -> str:
    """Return the separator: with it, the first line has several columns, and most lines have as many."""
    widths = {}
    for character in SEPARATORS:
        try:
            lines = [line for _, line in zip(range(50), _lines(text, character), strict=False) if any(line)]
        except csv.Error:
            lines = []
        if lines and len(lines[0]) > 1:
            widths[character] = (sum(len(line) == len(lines[0]) for line in lines) / len(lines), len(lines[0]))
    return max(widths, key=lambda character: widths[character], default=",")


def _lines(text: str, character: str):
    return csv.reader(io.StringIO(text, newline=""), delimiter=character, skipinitialspace=True, strict=True)


def _table(text: str, character: str, name: str) -> pd.DataFrame:
    lines = _lines(text, character)
    head, rows = None, []
    try:
        for line in lines:
            if not any(cell.strip() for cell in line):
                continue
            if head is None:
                head = [cell.strip() for cell in line]
                continue
            while len(line) > len(head) and not line[-1].strip():
                line.pop()
            if len(line) > len(head):
                shown = character.join(line)
                raise ValueError(
                    f"labels: line {lines.line_num} of {name} has {len(line)} values, but the first line names"
                    f" {len(head)} columns, divided by {NAMES[character]}: {', '.join(head)}. The line: {shown[:200]}."
                    ' Put quotation marks " around a value that holds the separator.'
                )
            rows.append(line + [""] * (len(head) - len(line)))
    except csv.Error as error:
        around = text.splitlines()[max(0, lines.line_num - 1) :][:1]
        raise ValueError(
            f"labels: line {lines.line_num} of {name} cannot be read ({error}), divided by {NAMES[character]}: "
            f"{''.join(around)[:200]}. A quotation mark within a value is written twice, and a value that begins"
            " with one ends with one."
        ) from None
    if head is None:
        raise ValueError(
            f"labels: {name} is empty. Expected a line of column names, such as path,label, and a line an image."
        )
    if twice := {column for column in head if head.count(column) > 1}:
        raise ValueError(f"labels: {name} has two columns named {', '.join(map(repr, sorted(twice)))}. Rename one.")
    return pd.DataFrame(rows, columns=head, dtype=str)


@dataclass(frozen=True)
class Columns:
    """The columns of a table of labels.

    Attributes:
        source: the folder that its paths are relative to.
        parameters: those of 00_explore that differ from their defaults.
        notes: sentences about how the table was read.
    """

    source: Path
    parameters: dict[str, str]
    notes: list[str]


def find_columns(file: Path, label: str = "", group: str = "") -> Columns:
    """Detect which columns of a table hold the paths and the labels, and which folder the paths are relative to.

    Args:
        file: the table.
        label: the column that holds the class; "": detected.
        group: the column whose equal values stay together; "": detected by its name.

    Raises:
        FileNotFoundError, ValueError: as `read`; or the columns cannot be detected, or no image is found.
    """
    table = read(file)
    if unknown := [column for column in (label, group) if column and column not in table]:
        raise ValueError(f"{file.name} has no column {unknown[0]!r}.{words.did_you_mean(unknown[0], [*table])}")
    sample = table.iloc[np.unique(np.linspace(0, len(table) - 1, SAMPLE).astype(int))] if len(table) else table
    path, source, suffix, share = _find_images(file, sample)
    rest = [column for column in table if column != path]
    split = _named(rest, SPLITS, lambda column: {*table[column].str.strip().str.lower()} <= {*folders.PARTS})
    group = group or _named(rest, GROUPS, lambda column: column != label and table[column].nunique() > 1)
    label = label or _find_label(file, table, [column for column in rest if column not in (split, group)])
    columns_by_role = {"path": path, "label": label, "split": split, "group": group}
    parameters = {"labels": project.display_path(file)}
    parameters |= {f"{role}_column": column for role, column in columns_by_role.items() if column and column != role}
    parameters |= {"suffix": suffix} if suffix else {}
    roles = ", ".join(f"{role} {column!r}" for role, column in columns_by_role.items() if column)
    notes = [f"Columns of {file.name}: {roles}{f'; {suffix} is added to the names' if suffix else ''}."]
    if share < 1:
        notes.append(f"Of {len(sample)} rows checked, {1 - share:.0%} name a file that does not exist: 00 lists them.")
    return Columns(source, parameters, notes)


def _find_images(file: Path, sample: pd.DataFrame) -> tuple[str, Path, str, float]:
    """Return the column of paths, their folder, the suffix that they lack, and the share of rows with a file."""
    inner = sorted(
        Path(e.path) for e in os.scandir(file.parent) if listing.is_folder(e) and not listing.is_clutter(e.name)
    )
    inner += [child for path in inner for child in sorted(path.iterdir()) if child.is_dir()][:100]
    names_in = cache(lambda folder: {name.casefold() for name in os.listdir(folder)} if folder.is_dir() else set())

    def is_there(root: Path, name: str) -> bool:  # in any case
        path = root / name.strip().replace("\\", "/")
        return bool(name.strip()) and path.name.casefold() in names_in(path.parent)

    best: tuple[float, str, Path, str] = (0.0, "", file.parent, "")
    for column in sample:
        names = [*sample[column]]
        absolute = [Path(os.path.commonpath(names))] if all(name.startswith("/") for name in names) else []
        suffixes = ["", *(sorted(SUFFIXES) if names and "." not in names[0] else [])]
        for root, suffix in itertools.product([*absolute, file.parent, *inner], suffixes):
            share = sum(is_there(root, name + suffix) for name in names) / len(names) if names else 0
            if share > best[0]:
                best = (share, column, root, suffix)
            if share == 1:
                break
    share, column, root, suffix = best
    if not share:
        first = "; ".join(f"{name}: {sample[name].iloc[0]!r}" for name in sample) if len(sample) else "no row"
        raise ValueError(
            f"labels: no column of {file.name} names a file in {project.display_path(file.parent)} or its folders. Its"
            f" first row: {first}. Put the table beside the images, or write the recipe by hand: explore.source is the"
            " folder that the paths are relative to."
        )
    if is_there(root, column + suffix):
        raise ValueError(
            f"labels: the first line of {file.name} is a row ({', '.join(sample)}). Put a line of names above it, such"
            " as path,label."
        )
    return column, root, suffix, share


def _find_label(file: Path, table: pd.DataFrame, columns: list[str]) -> str:
    if label := _named(columns, LABELS, lambda column: table[column].nunique() > 1):
        return label
    likely = [column for column in columns if 1 < table[column].nunique() <= max(2, len(table) / 2)]
    if len(likely) == 1:
        return likely[0]
    few = {column: sorted(table[column].unique())[:3] for column in likely or columns}
    shown = "; ".join(f"{column}: {', '.join(values)}" for column, values in few.items())
    what = "Several columns could hold the labels" if likely else "No column could hold the labels"
    raise ValueError(
        f"labels: {what} of {file.name} ({shown or 'there is no other column'}). Choose one: thaw new NAME"
        f" {file.name} --label COLUMN, or explore.label_column in a recipe."
    )


def _named(columns: list[str], names: tuple[str, ...], is_fit) -> str:
    """Return the first of `names` that is a column, in any case and with spaces for _, and fits; "" for none."""
    by_name = {column.lower().replace(" ", "_").replace("-", "_"): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name and is_fit(by_name[name])), "")
