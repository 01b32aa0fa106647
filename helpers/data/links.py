"""The split on disk: folders of links, one per part and class."""

import hashlib
import shutil
import unicodedata
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import pandas as pd
import splitfolders.split

from helpers.core import disk, project
from helpers.data import resizing
from helpers.data.splits import PARTS

SPLIT_COLUMNS = ["path", "label", "part", "sha256", "group", "file"]


def write_split(out: Path, table: pd.DataFrame, root: Path) -> pd.DataFrame:
    """Write a split as folders of links, <part>/<class>/<file>, with split-folders, and write split.csv.

    Args:
        out: the stage's folder.
        table: the inventory with a column `part`; a row may occur several times (oversampling), and rows of the
            part "unused" get no link.
        root: the source's root, which the links point to.

    Returns:
        What was written to split.csv: path, label, part, sha256, group, file (the link, relative to `out`).
    """
    staging = out / ".staging"
    for folder in (*PARTS, staging.name):
        shutil.rmtree(out / folder, ignore_errors=True)
    split = table.assign(file=link_files(table)).sort_values(["part", "file", "path"], kind="stable")
    used = split[split["part"].isin(PARTS)]
    for (part, folder), rows in used.groupby(["part", used["label"].map(class_folder)]):
        # split-folders names a link after its source file, so the source files are links with the right names.
        links = [staging / part / folder / PurePosixPath(file).name for file in rows["file"]]
        links[0].parent.mkdir(parents=True)
        for link, path in zip(links, rows["path"], strict=True):
            link.symlink_to(root / path)
        splitfolders.split.copy_files([(links, part)], links[0].parent, out, None, "symlink")
    shutil.rmtree(staging, ignore_errors=True)
    split = split[SPLIT_COLUMNS + resizing.box_column(split)].reset_index(drop=True)
    split.to_csv(out / "split.csv", index=False)
    return split


def read_split(folder: Path) -> pd.DataFrame:
    """Return a folder's split.csv with every text as the file holds it."""
    return disk.read_table(folder / "split.csv")


def read_earlier(previous: str) -> pd.DataFrame | None:
    """Return the earlier split that the parameter `previous` names, or None when it names none.

    Args:
        previous: a split.csv, under any name, or the folder that holds one; empty: none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a split.csv.
    """
    if not previous:
        return None
    path = project.resolve(previous)
    file = path / "split.csv" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"previous: there is no file {project.display_path(file)}. Name the split.csv of an earlier run, or leave"
            " `previous` empty to split all images again."
        )
    try:
        table = disk.read_table(file)
    except ValueError as error:  # pandas' own errors and those of decoding are of this kind
        raise ValueError(f"previous: {project.display_path(file)} cannot be read as a table: {error}") from None
    if missing := [column for column in ("sha256", "part") if column not in table]:
        raise ValueError(
            f"previous: {project.display_path(file)} has no column {', '.join(missing)}; expected a split.csv of"
            " 01_split."
        )
    return table


def link_files(table: pd.DataFrame) -> list[str]:
    """Return for each row the name <part>/<class>/<file> of its link; an image keeps its name where it can.

    Images of a class whose names differ only in folder, suffix, case or Unicode form would collide on some file system
    or after resizing. Their links also get a piece of their path's hash, and copies of one image get a number.
    """
    names = [PurePosixPath(path).name for path in table["path"]]
    stems = pd.Series([unicodedata.normalize("NFC", PurePosixPath(name).stem).casefold() for name in names])
    frame = pd.DataFrame({"label": table["label"].to_numpy(), "path": table["path"].to_numpy(), "stem": stems})
    shared = frame.groupby(["label", "stem"])["path"].transform("nunique") > 1
    copies = frame.groupby("path").cumcount()
    files = []
    for row, name, twin, copy in zip(table.itertuples(), names, shared, copies, strict=True):
        mark = f"~{hashlib.sha256(row.path.encode()).hexdigest()[:8]}" if twin else ""
        mark += f"~{copy}" if copy else ""
        stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
        name = resizing.cut(stem, 240 - len(mark)) + mark + suffix if mark else name
        files.append(f"{row.part}/{class_folder(row.label)}/{name}" if row.part in PARTS else "")
    return files


def class_folder(label: str) -> str:
    """Return the folder of a class: its name, with characters that folders cannot have encoded as in a URL."""
    name = "".join(quote(c, safe="") if c in '/\\%:*?"<>|' or ord(c) < 32 else c for c in label)
    if len(name.encode()) > 240:
        name = f"{resizing.cut(name, 220)}%{hashlib.sha256(label.encode()).hexdigest()[:16]}"
    return "%2E" + name[1:] if name.startswith(".") else name
