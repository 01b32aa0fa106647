"""Folders of images that one stage hands to the next: the links of a split, and the images of one size."""

import hashlib
import shutil
import unicodedata
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import pandas as pd
import splitfolders.split

from helpers.core import runs
from helpers.data import images
from helpers.data.images import ImageError
from helpers.data.splits import PARTS

SPLIT_COLUMNS = ["path", "label", "part", "sha256", "group", "file"]
IMAGE_COLUMNS = ["path", "label", "part", "source", "sha256"]
QUARANTINE_COLUMNS = ["path", "label", "reason", "detail"]


def write_split(out: Path, table: pd.DataFrame, root: Path) -> pd.DataFrame:
    """Lay a split out as folders of links, <part>/<class>/<file>, with split-folders, and write split.csv.

    Args:
        out: the stage's folder.
        table: the inventory with a column `part`; a row may occur several times (oversampling), and rows of the
            part "unused" get no link.
        root: the source's root, to which the links lead.

    Returns:
        What was written to split.csv: path, label, part, sha256, group, file (the link, relative to `out`).
    """
    staging = out / ".staging"
    for folder in (*PARTS, staging.name):
        shutil.rmtree(out / folder, ignore_errors=True)
    split = table.assign(file=link_files(table)).sort_values(["part", "file", "path"], kind="stable")
    used = split[split["part"].isin(PARTS)]
    for (part, folder), rows in used.groupby(["part", used["label"].map(class_folder)]):
        # split-folders names a link after the file it is given, so it is given links with the names wanted.
        named = [staging / part / folder / PurePosixPath(file).name for file in rows["file"]]
        named[0].parent.mkdir(parents=True)
        for link, path in zip(named, rows["path"], strict=True):
            link.symlink_to(root / path)
        splitfolders.split.copy_files([(named, part)], named[0].parent, out, None, "symlink")
    shutil.rmtree(staging, ignore_errors=True)
    split = split[SPLIT_COLUMNS + _box_column(split)].reset_index(drop=True)
    split.to_csv(out / "split.csv", index=False)
    return split


def read_split(folder: Path) -> pd.DataFrame:
    """Return a folder's split.csv with every text as it was written."""
    return pd.read_csv(folder / "split.csv", dtype=str, keep_default_na=False)


def read_earlier(previous: str) -> pd.DataFrame | None:
    """Return the earlier split that the parameter `previous` names, or None when it names none.

    Args:
        previous: a split.csv, under whatever name it was kept, or the folder that holds one; empty: none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no split.csv.
    """
    if not previous:
        return None
    path = runs.resolve(previous)
    file = path / "split.csv" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"previous: there is no file {runs.display_path(file)}. Name the split.csv of an earlier run, or leave"
            " `previous` empty to deal all images anew."
        )
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' own errors and those of decoding are of this kind
        raise ValueError(f"previous: {runs.display_path(file)} cannot be read as a table: {error}") from None
    if missing := [column for column in ("sha256", "part") if column not in table]:
        raise ValueError(
            f"previous: {runs.display_path(file)} has no column {', '.join(missing)}; expected a split.csv as 01_split"
            " writes it."
        )
    return table


def link_files(table: pd.DataFrame) -> list[str]:
    """Return for each row the name <part>/<class>/<file> of its link; an image keeps its name where it can.

    Images of a class whose names differ only in folder, suffix, case or Unicode form would meet on some file system
    or once they are resized; they also carry a piece of their path's hash, and copies of one image a number.
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
        name = _cut(stem, 240 - len(mark)) + mark + suffix if mark else name
        files.append(f"{row.part}/{class_folder(row.label)}/{name}" if row.part in PARTS else "")
    return files


def class_folder(label: str) -> str:
    """Return the folder of a class: its name, with what no folder name may hold written as in a web address."""
    name = "".join(quote(c, safe="") if c in '/\\%:*?"<>|' or ord(c) < 32 else c for c in label)
    if len(name.encode()) > 240:
        name = f"{_cut(name, 220)}%{hashlib.sha256(label.encode()).hexdigest()[:16]}"
    return "%2E" + name[1:] if name.startswith(".") else name


def write_images(
    out: Path,
    source: Path,
    *,
    image_size: int,
    fit: images.Fit,
    format: str = "png",
    quality: int = 95,
    workers: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Resize every image of a split; write images.csv, quarantine.csv and resize.json beside them.

    Args:
        out: the stage's folder. Images that are already there are kept: `runs.open_stage` leaves them only when a
            run with the same parameters and inputs was interrupted.
        source: the folder of 01_split.
        image_size, fit, quality: as in `images.load` and `images.write`.
        format: "png" or "jpg".
        workers: threads; 0 means one for each core.

    Returns:
        What was written to images.csv (path relative to `out`, label, part, source, sha256 of the raw file) and to
        quarantine.csv.
    """
    split = read_split(source)
    split = split[split["part"].isin(PARTS)].rename(columns={"path": "source"})
    table = split.assign(path=[str(PurePosixPath(file).with_suffix(f".{format}")) for file in split["file"]])
    for folder in sorted({PurePosixPath(path).parent for path in table["path"]}):
        (out / folder).mkdir(parents=True, exist_ok=True)
    convert = partial(_convert, source=source, out=out, image_size=image_size, fit=fit, quality=quality)
    boxes = table["box"] if "box" in table else [""] * len(table)
    files = list(zip(table["file"], table["path"], boxes, strict=True))
    seen = [source, out, *(source / file for file in table["file"].head(1))]  # the last is a link to the raw images
    each = images.for_each(convert, files, workers=workers, label="resize", reads=seen)
    problems = pd.DataFrame(each, index=table.index)
    table[["reason", "detail"]] = problems
    bad = table["reason"] != ""
    quarantine = table.assign(path=table["source"]).loc[bad, QUARANTINE_COLUMNS].reset_index(drop=True)
    table = table.loc[~bad, IMAGE_COLUMNS + _box_column(table)].reset_index(drop=True)
    table.to_csv(out / "images.csv", index=False)
    quarantine.to_csv(out / "quarantine.csv", index=False)
    about = {"image_size": image_size, "fit": fit, "format": format}
    crop = {"crop": runs.read_json(source / "crop.json")} if (source / "crop.json").is_file() else {}
    runs.write_json(out / "resize.json", about | crop)
    return table, quarantine


def _convert(
    files: tuple[str, str, str], *, source: Path, out: Path, image_size: int, fit: images.Fit, quality: int
) -> tuple[str, str]:
    """Resize a file (or its box) of `source` into one of `out`; return why it cannot be done, or two empty strings."""
    target, box = out / files[1], images.read_box(files[2])
    if target.is_file():  # by an interrupted run, and a file appears only whole
        return "", ""
    try:
        pixels = images.load(source / files[0], image_size, fit, box=box, max_pixels=None)
    except ImageError as error:
        return error.reason, error.detail
    images.write(target, pixels, quality)
    return "", ""


def hand_on(source: Path, out: Path, *names: str) -> None:
    """Copy the JSON files of an earlier stage that a later one needs; one that is not there is passed over."""
    for name in names:
        if (source / name).is_file():
            runs.write_json(out / name, runs.read_json(source / name))


def _box_column(table: pd.DataFrame) -> list[str]:
    """Return the name of the column that says which part of an image to keep, where 00b_crop has made one."""
    return ["box"] if "box" in table else []


def _cut(text: str, size: int) -> str:
    """Return `text` cut to `size` bytes of UTF-8, never within a character."""
    return text.encode()[:size].decode(errors="ignore")
