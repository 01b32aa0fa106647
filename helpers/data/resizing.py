"""Folders of images that one stage hands to the next: the links of a split, and the images of one size."""

from functools import partial
from pathlib import Path, PurePosixPath

import pandas as pd

from helpers.core import disk, parallel
from helpers.data import images, links
from helpers.data.formats import deep
from helpers.data.images import ImageError
from helpers.data.splits import PARTS

IMAGE_COLUMNS = ["path", "label", "part", "source", "sha256"]
QUARANTINE_COLUMNS = ["path", "label", "reason", "detail"]


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
        out: the stage's folder. Images that are already there are kept: `stages.open` leaves them only when a
            run with the same parameters and inputs was interrupted.
        source: the folder of 01_split.
        image_size, fit, quality: as in `images.load` and `images.write`.
        format: "png" or "jpg".
        workers: threads; 0 means one for each core.

    Returns:
        What was written to images.csv (path relative to `out`, label, part, source, sha256 of the raw file) and to
        quarantine.csv.
    """
    split = links.read_split(source)
    split = split[split["part"].isin(PARTS)].rename(columns={"path": "source"})
    table = split.assign(path=[str(PurePosixPath(file).with_suffix(f".{format}")) for file in split["file"]])
    for folder in sorted({PurePosixPath(path).parent for path in table["path"]}):
        (out / folder).mkdir(parents=True, exist_ok=True)
    levels = disk.read_json(source / deep.FILE) if (source / deep.FILE).is_file() else None
    range_of_deep = deep.Levels(levels["black"], levels["white"]) if levels else None
    how = {"image_size": image_size, "fit": fit, "quality": quality, "levels": range_of_deep}
    convert = partial(_convert, source=source, out=out, **how)
    boxes = table["box"] if "box" in table else [""] * len(table)
    files = list(zip(table["file"], table["path"], boxes, strict=True))
    seen = [source, out, *(source / file for file in table["file"].head(1))]  # the last is a link to the raw images
    each = parallel.for_each(convert, files, workers=workers, label="resize", reads=seen)
    problems = pd.DataFrame(each, index=table.index)
    table[["reason", "detail"]] = problems
    bad = table["reason"] != ""
    quarantine = table.assign(path=table["source"]).loc[bad, QUARANTINE_COLUMNS].reset_index(drop=True)
    table = table.loc[~bad, IMAGE_COLUMNS + box_column(table)].reset_index(drop=True)
    table.to_csv(out / "images.csv", index=False)
    quarantine.to_csv(out / "quarantine.csv", index=False)
    about = {"image_size": image_size, "fit": fit, "format": format}
    crop = {"crop": disk.read_json(source / "crop.json")} if (source / "crop.json").is_file() else {}
    depth = {"levels": [levels["black"], levels["white"]]} if levels else {}
    disk.write_json(out / "resize.json", about | crop | depth)
    return table, quarantine


def _convert(
    files: tuple[str, str, str],
    *,
    source: Path,
    out: Path,
    image_size: int,
    fit: images.Fit,
    quality: int,
    levels: deep.Levels | None,
) -> tuple[str, str]:
    """Resize a file (or its box) of `source` into one of `out`; return why it cannot be done, or two empty strings."""
    target, box = out / files[1], images.read_box(files[2])
    if target.is_file():  # by an interrupted run, and a file appears only whole
        return "", ""
    try:
        pixels = images.load(source / files[0], image_size, fit, box=box, levels=levels, max_pixels=None)
    except ImageError as error:
        return error.reason, error.detail
    images.write(target, pixels, quality)
    return "", ""


def hand_on(source: Path, out: Path, *names: str) -> None:
    """Copy the JSON files of an earlier stage that a later one needs; one that is not there is passed over."""
    for name in names:
        if (source / name).is_file():
            disk.write_json(out / name, disk.read_json(source / name))


def box_column(table: pd.DataFrame) -> list[str]:
    """Return the name of the column that says which part of an image to keep, where 00b_crop has made one."""
    return ["box"] if "box" in table else []


def cut(text: str, size: int) -> str:
    """Return `text` cut to `size` bytes of UTF-8, never within a character."""
    return text.encode()[:size].decode(errors="ignore")
