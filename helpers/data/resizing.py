"""Resized images of a split, and the files that one stage copies from an earlier one."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import pandas as pd

from helpers.core import disk, parallel, words
from helpers.data import images, links
from helpers.data.formats import deep
from helpers.data.images import ImageError
from helpers.data.splits import PARTS

IMAGE_COLUMNS = ["path", "label", "part", "file", "sha256"]
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
    names: Mapping[str, str] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Resize every image of a split; write images.csv, quarantine.csv and resize.json beside them.

    Args:
        out: the stage's folder. Existing images are kept: `stages.open` leaves them only after an interrupted
            run with the same parameters and inputs.
        source: the folder of 01_split.
        image_size, fit, quality: as in `images.load` and `images.write`.
        format: "png" or "jpg".
        workers: threads; 0 means one for each core.
        names: class -> new name, as `classes` returns it; a class without an entry is left out. None: all names stay.
            Only labels change, not the folders of the files.

    Returns:
        The content of images.csv (path below the source, label, part, file below `out`, sha256 of the raw file)
        and of quarantine.csv.
    """
    split = links.read_split(source)
    split = split[split["part"].isin(PARTS)].rename(columns={"file": "link"})
    if names is not None:
        split = split.assign(label=split["label"].map(names)).dropna(subset="label").reset_index(drop=True)
    table = split.assign(file=[str(PurePosixPath(link).with_suffix(f".{format}")) for link in split["link"]])
    for folder in sorted({PurePosixPath(file).parent for file in table["file"]}):
        (out / folder).mkdir(parents=True, exist_ok=True)
    levels = disk.read_json(source / deep.FILE) if (source / deep.FILE).is_file() else None
    range_of_deep = deep.Levels(levels["black"], levels["white"]) if levels else None
    options = {"image_size": image_size, "fit": fit, "quality": quality, "levels": range_of_deep}
    convert = partial(_convert, source=source, out=out, **options)
    boxes = table["box"] if "box" in table else [""] * len(table)
    files = list(zip(table["link"], table["file"], boxes, strict=True))
    shared_paths = [source, out, *(source / link for link in table["link"].head(1))]  # the last links to a raw image
    results = parallel.for_each(convert, files, workers=workers, label="resize", reads=shared_paths)
    problems = pd.DataFrame(results, index=table.index)
    table[["reason", "detail"]] = problems
    bad = table["reason"] != ""
    quarantine = table.loc[bad, QUARANTINE_COLUMNS].reset_index(drop=True)
    table = table.loc[~bad, IMAGE_COLUMNS + box_column(table)].reset_index(drop=True)
    table.to_csv(out / "images.csv", index=False)
    quarantine.to_csv(out / "quarantine.csv", index=False)
    settings = {"image_size": image_size, "fit": fit, "format": format}
    crop = {"crop": disk.read_json(source / "crop.json")} if (source / "crop.json").is_file() else {}
    depth = {"levels": [levels["black"], levels["white"]]} if levels else {}
    renamed = [name for name, new in (names or {}).items() if name != new]
    of_new = {names[name]: [old for old in names if names[old] == names[name]] for name in renamed}
    disk.write_json(out / "resize.json", settings | crop | depth | ({"merge": of_new} if of_new else {}))
    return table, quarantine


def classes(names: Sequence[str], merge: Mapping[str, Sequence[str]], keep: Sequence[str] = ()) -> dict[str, str]:
    """Return class -> new name, in the order of the classes; a class that is left out has no entry.

    Args:
        names: the classes of the split, in the model's order.
        merge: new name -> the classes that it joins.
        keep: the classes to keep, merged ones by their new name; empty: all.

    Raises:
        ValueError: a class does not exist or is merged twice, a new name is that of another class, or fewer than two
            classes remain.
    """
    merged = [name for own in merge.values() for name in own]
    new_of = {name: new for new, own in merge.items() for name in own}
    new_names = {name: new_of.get(name, name) for name in names}
    for parameter, values, known_names in (
        ("merge", merged, names),
        ("keep", keep, list(dict.fromkeys(new_names.values()))),
    ):
        if unknown := [name for name in values if name not in known_names]:
            hint = words.did_you_mean(str(unknown[0]), known_names)
            raise ValueError(f"{parameter}: there is no class {unknown[0]!r}.{hint}")
    if twice := [name for name in merged if merged.count(name) > 1]:
        raise ValueError(f"merge: {twice[0]!r} is listed twice; a class can be merged only once.")
    if taken := [new for new, own in merge.items() if new in names and new not in own]:
        raise ValueError(f"merge: {taken[0]!r} is a class already. Choose another name for the merged classes.")
    kept = {name: new for name, new in new_names.items() if not keep or new in keep}
    if len(set(kept.values())) < 2:
        raise ValueError(f"{len(set(kept.values()))} class of {len(names)} would remain; a classifier needs two.")
    return kept


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
    """Resize a file (or its box) of `source` into one of `out`; return why not, or two empty strings."""
    target, box = out / files[1], images.read_box(files[2])
    if target.is_file():  # of an interrupted run; a file is always complete
        return "", ""
    try:
        pixels = images.load(source / files[0], image_size, fit, box=box, levels=levels, max_pixels=None)
    except ImageError as error:
        return error.reason, error.detail
    images.write(target, pixels, quality)
    return "", ""


def copy_json(source: Path, out: Path, *names: str) -> None:
    """Copy the JSON files of an earlier stage that a later one needs; missing files are skipped."""
    for name in names:
        if (source / name).is_file():
            disk.write_json(out / name, disk.read_json(source / name))


def box_column(table: pd.DataFrame) -> list[str]:
    """Return the name of the column with the part of an image to keep, where 00b_crop has written it."""
    return ["box"] if "box" in table else []


def cut(text: str, size: int) -> str:
    """Return `text` cut to `size` bytes of UTF-8, never within a character."""
    return text.encode()[:size].decode(errors="ignore")
