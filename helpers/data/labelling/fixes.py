"""Corrected labels, applied to a source: the labels from `thaw review` change, the images do not.

A fixes file is a CSV with the columns path (relative to the source's root), label (the correct one; empty removes the
image) and sha256 (of the reviewed image, so that a fix never changes another one).
"""

import unicodedata
from pathlib import Path

import pandas as pd

from helpers.core import disk, project

COLUMNS = ["path", "label", "sha256"]
CHANGES = ["path", "from", "to", "sha256"]
SHOWN = 5  # of the problems in an error


def read(file: Path) -> pd.DataFrame:
    """Return a fixes file as text, each image once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a table, or it has two fixes for one image.
    """
    if not file.is_file():
        raise FileNotFoundError(f"fixes: there is no file {project.display_path(file)}.")
    try:
        table = disk.read_table(file, encoding="utf-8-sig")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"fixes: {file.name} cannot be read as a table: {error}") from None
    if missing := [column for column in COLUMNS if column not in table]:
        raise ValueError(
            f"fixes: {file.name} has no column {', '.join(missing)}. It has: {', '.join(map(str, table.columns))}."
            f" Expected {', '.join(COLUMNS)}, as `thaw review` writes them."
        )
    table = table[COLUMNS].drop_duplicates()
    table["label"] = [unicodedata.normalize("NFC", label.strip()) for label in table["label"]]
    _refuse(file, table.loc[table.duplicated("path"), "path"], "are listed more than once, differently")
    return table.reset_index(drop=True)


def apply(table: pd.DataFrame, root: Path, file: Path) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Apply a fixes file to a source's table.

    Args:
        table: path and label of every image, and any other columns.
        root: the folder that the paths are relative to.
        file: the fixes file.

    Returns:
        The table with the labels corrected and the images removed; the changes (path, from, to, sha256; an empty
        `to` is a removed image); and how many fixes are for images that the source no longer has.

    Raises:
        FileNotFoundError, ValueError: as `read`; or an image differs from the reviewed one, a label is not one of
            the source's classes, or no image of the fixes file is in the source at all.
    """
    fixes, classes = read(file), set(table["label"])
    unknown = fixes.loc[~fixes["label"].isin(classes | {""}), "label"].drop_duplicates()
    _refuse(file, unknown, f"are not among the classes ({', '.join(sorted(classes)[:10])})", what="labels")
    fixes_here = fixes[fixes["path"].isin(table["path"])].set_index("path")
    if len(fixes) and fixes_here.empty:
        raise ValueError(
            f"fixes: the source has none of the {len(fixes)} images in {file.name}, such as {fixes['path'][0]!r}."
            " Use the fixes file of this source."
        )
    hashes = pd.Series([_hash(root / path) for path in fixes_here.index], fixes_here.index, dtype=str)
    other = (hashes != "") & (hashes != fixes_here["sha256"].str.strip().str.lower())
    _refuse(
        file,
        fixes_here.index[other],
        "are not the reviewed ones: their content has changed. Review them again",
    )
    fixes_here = fixes_here[hashes != ""]
    to = table["path"].map(fixes_here["label"])
    sha256 = table["path"].map(fixes_here["sha256"])
    changes = pd.DataFrame({"path": table["path"], "from": table["label"], "to": to, "sha256": sha256})
    changes = changes[to.notna() & (to != table["label"])].reset_index(drop=True)
    patched = table.assign(label=to.fillna(table["label"]))
    return patched[patched["label"] != ""].reset_index(drop=True), changes, len(fixes) - len(fixes_here)


def sentence(changes: pd.DataFrame) -> str:
    """Return the changes in words, such as "12 labels corrected, 3 images removed by fixes.csv."; "" if none."""
    removed = int((changes["to"] == "").sum())
    counts = {"label": (len(changes) - removed, "corrected"), "image": (removed, "removed")}
    parts = [f"{n:,} {what}{'s' if n > 1 else ''} {done}" for what, (n, done) in counts.items() if n]
    return f"{', '.join(parts)} by fixes.csv." if parts else ""


def _hash(path: Path) -> str:
    """Return the sha256 of a file, or "" when it cannot be read."""
    try:
        return disk.sha256_of(path)
    except OSError:
        return ""


def _refuse(file: Path, names, why: str, what: str = "images") -> None:
    names = list(names)
    if names:
        shown = ", ".join(map(repr, names[:SHOWN])) + (" ..." if len(names) > SHOWN else "")
        raise ValueError(f"fixes: {len(names)} {what} in {file.name} {why}: {shown}.")
