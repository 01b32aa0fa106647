"""The inventory of a source: every image opened, checked and hashed; images that fail go to the quarantine."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pandas as pd
from PIL import Image

from helpers.core import disk, parallel, words
from helpers.data import grouping, images, sources
from helpers.data.formats import deep
from helpers.data.images import ImageError

HASH_SIDE = 16  # a perceptual hash has 16 x 16 bits: 64 bits cannot tell apart images of very similar objects
BLOCK = 2**19  # pairs compared at a time: they fit in a processor's cache
SHOWN_SIZE = 160  # pixels: an image on a contact sheet
QUARANTINE = ["path", "label", "reason", "detail"]
EXIF_TAKEN, EXIF_DIRECTORY, EXIF_ORIENTATION = 0x9003, 0x8769, 0x0112


def source_fingerprint(parameters: Mapping[str, Any], cache_file: Path | None = None) -> str:
    """Return a hash of a source's content: paths, labels, fixes and the sha256 of every file; no image is decoded.

    Args:
        parameters: the parameters of 00_explore.
        cache_file: JSON file that keeps the hash of each file with its size and times, so that only new and changed
            files are read.

    Returns:
        sha256 in hexadecimal.

    Raises:
        FileNotFoundError, ValueError: as `sources.read`.
    """
    source = sources.read(parameters)
    hashes = _file_hashes([os.path.join(source.root, path) for path in source.table["path"]], cache_file)
    rows = source.table.assign(sha256=hashes).to_dict("split")
    content = [rows["columns"], rows["data"], source.rejected, source.fixes.to_dict("records")]
    return hashlib.sha256(json.dumps(content, default=str).encode("utf-8", "surrogateescape")).hexdigest()


def take(
    source: sources.Source,
    *,
    min_size: int = 16,
    max_aspect: float = 20.0,
    max_pixels: int = images.MAX_PIXELS,
    bits: int | Sequence[float] | None = None,
    workers: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Open and check every image of a source once.

    Args:
        source: as `sources.read` returns it.
        min_size: the shorter side must have this many pixels.
        max_aspect: the longer side may be this many times the shorter one.
        max_pixels: width times height may not be more.
        bits: the depth of deep images, or their black and white, where the files do not declare it; see `levels`.
        workers: processes; 0 means one for each core.

    Returns:
        The inventory (a row per usable image: the source's columns and format, width, height, mode, orientation,
        bytes, sha256, phash, taken, note; for a deep image also lowest, highest and says: its smallest and
        largest value and the black and white that the file declares) and the quarantine (path, label, reason, detail).

    Raises:
        ValueError: a class has no usable image; the message names it and the reasons.
    """
    by_hand = deep.from_bits(bits)
    check = partial(examine, min_size=min_size, max_aspect=max_aspect, max_pixels=max_pixels, levels=by_hand)
    paths = [os.path.join(source.root, path) for path in source.table["path"]]
    shared_paths = [source.root, *paths[:1]]
    facts = list(parallel.for_each(check, paths, workers=workers, label="inventory", reads=shared_paths))
    table = pd.concat([source.table, pd.DataFrame(facts, index=source.table.index)], axis=1)
    for column in ("reason", "detail", "sha256"):
        if column not in table:  # no image is broken, or all are
            table[column] = None
    table["reason"] = table["reason"].astype(object).where(table["reason"].notna(), "")
    conflict = table["sha256"].map(table.groupby("sha256")["label"].nunique()).fillna(0) > 1
    table.loc[conflict, "reason"] = "two labels"
    table.loc[conflict, "detail"] = grouping.other_labels(table[conflict])
    bad = table["reason"] != ""
    quarantine = pd.concat([pd.DataFrame(source.rejected, columns=QUARANTINE), table.loc[bad, QUARANTINE]])
    sound = table[~bad].drop(columns=["reason", "detail"]).reset_index(drop=True)
    _check_not_emptied(source.table["label"], sound["label"], quarantine)
    for column in ("width", "height", "orientation", "bytes"):
        sound[column] = sound[column].astype(int)
    if "says" in sound:
        sound["says"] = sound["says"].fillna("")
    return sound, quarantine.sort_values(["reason", "path"], kind="stable").reset_index(drop=True)


def examine(
    path: str | os.PathLike, *, min_size: int, max_aspect: float, max_pixels: int, levels: deep.Levels | None = None
) -> dict[str, Any]:
    """Return the facts about one image file, or the `reason` and `detail` when it is unusable."""
    try:
        data = images.read_bytes(path)
        image = images.open_image(data, max_pixels=max_pixels)
        facts = {"format": image.format, "width": image.width, "height": image.height, "mode": image.mode}
        facts |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        short, long = sorted(image.size)
        if short < min_size:
            raise ImageError("too small", f"{image.width} x {image.height} pixels; min_size = {min_size}")
        if long > max_aspect * short:
            raise ImageError("odd shape", f"{image.width} x {image.height} pixels; max_aspect = {max_aspect:g}")
        images.read_pixels(image, at_least=(4 * HASH_SIDE, 4 * HASH_SIDE), mode="L")
        facts |= _exif(image)
        extremes = images.extremes(image)
        pixels = images.upright(image, mode="L", levels=levels)
        if extremes:
            lowest, highest, declared = extremes
            says = f"{declared.black:g} {declared.white:g}" if declared else ""
            facts |= {"lowest": lowest, "highest": highest, "says": says}
        flat = pixels.min() == pixels.max()
        facts |= {"phash": str(imagehash.phash(Image.fromarray(pixels), hash_size=HASH_SIDE))}
        return facts | {"note": f"one flat colour, {pixels.min()} of 255" if flat else ""}
    except ImageError as error:
        return {"reason": error.reason, "detail": error.detail}


def levels(table: pd.DataFrame, bits: int | Sequence[float] | None = None) -> tuple[deep.Levels | None, str]:
    """Return black and white for all deep images of an inventory, and a sentence about their origin.

    Args:
        table: as `take` returns it.
        bits: a depth such as 12, or black and white such as [0, 4095]; 0 or None: as the files declare, else
            the smallest depth that holds the largest value of all images.

    Returns:
        None, with a sentence, when no image is deep.
    """
    if "highest" not in table or table["highest"].isna().all():
        return None, "no image has more than 8 bits a channel"
    deep_images = table[table["highest"].notna()]
    declared_levels = [deep.Levels(*map(float, text.split())) if text else None for text in deep_images["says"]]
    chosen, why = deep.levels_of(list(deep_images["lowest"]), list(deep_images["highest"]), declared_levels)
    if by_hand := deep.from_bits(bits):
        chosen, why = by_hand, "set by bits"
    beyond = int(((deep_images["lowest"] < chosen.black) | (deep_images["highest"] > chosen.white)).sum())
    cut_off = f"; {beyond:,} of them have values outside, which are cut off" if beyond else ""
    ends = f"{chosen.black:g} is black, {chosen.white:g} white"
    return chosen, f"{len(deep_images):,} images of more than 8 bits: {ends} ({why}){cut_off}"


def examples(
    table: pd.DataFrame, root: Path, *, per_class: int = 6, classes: int = 24, levels: deep.Levels | None = None
) -> dict[str, list[np.ndarray]]:
    """Return a few images of each of the first classes, always the same: those with the lowest hashes."""
    chosen = table.sort_values("sha256").groupby("label").head(per_class).groupby("label")["path"]
    names = words.natural_order(table["label"])[:classes]
    return {name: thumbnails(root, chosen.get_group(name), levels) for name in names}


def write(
    out: Path,
    source: sources.Source,
    table: pd.DataFrame,
    quarantine: pd.DataFrame,
    levels: deep.Levels | None = None,
    sentence: str = "",
) -> list[str]:
    """Write the inventory, the quarantine, the applied fixes and the link `source`; return the files' names.

    Where there are deep images, `levels` and the sentence about them go into levels.json.
    """
    table.to_csv(out / "inventory.csv", index=False)
    quarantine.to_csv(out / "quarantine.csv", index=False)
    source.fixes.to_csv(out / "fixes.csv", index=False)
    disk.write_json(out / "ignored.json", dict(source.ignored))
    disk.write_json(out / "class_names.json", words.natural_order(table["label"]))
    (out / "source").unlink(missing_ok=True)
    (out / "source").symlink_to(source.root.resolve())
    names = ["inventory.csv", "quarantine.csv", "fixes.csv", "ignored.json", "class_names.json"]
    if levels is None:
        return names
    disk.write_json(out / deep.FILE, {"black": levels.black, "white": levels.white, "sentence": sentence})
    return [*names, deep.FILE]


def read(folder: Path) -> pd.DataFrame:
    """Return a folder's inventory.csv with every text as the file holds it."""
    numbers = {"width": int, "height": int, "orientation": int, "bytes": int}
    columns = pd.read_csv(folder / "inventory.csv", nrows=0).columns
    types = {column: numbers.get(column, str) for column in columns}
    return pd.read_csv(folder / "inventory.csv", dtype=types, keep_default_na=False)


def _exif(image: Image.Image) -> dict[str, Any]:
    """Return the orientation (1-8) and the time taken of an image whose pixels have been read."""
    try:
        exif = image.getexif()
        taken = exif.get_ifd(EXIF_DIRECTORY).get(EXIF_TAKEN, "")
        orientation = int(exif.get(EXIF_ORIENTATION, 1))
    except Exception:  # damaged metadata can raise any error; the image may still be valid
        return {"orientation": 1, "taken": ""}
    return {"orientation": orientation if 1 <= orientation <= 8 else 1, "taken": str(taken)}


def _check_not_emptied(before: pd.Series, after: pd.Series, quarantine: pd.DataFrame) -> None:
    emptied = words.natural_order(set(before) - set(after))
    if emptied:
        reasons = quarantine[quarantine["label"].isin(emptied)]["reason"].value_counts()
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise ValueError(
            f"No usable image is left of {', '.join(emptied)} ({counts}). Fix the files or drop the class."
        )


def thumbnails(root: Path, paths: pd.Series, levels: deep.Levels | None = None) -> list[np.ndarray]:
    return [images.load(root / path, SHOWN_SIZE, "pad", levels=levels, max_pixels=None) for path in paths]


def _file_hashes(paths: list[str], cache_file: Path | None) -> list[str]:
    try:
        cache = disk.read_json(cache_file) if cache_file else {}
    except (OSError, ValueError):
        cache = {}
    with ThreadPoolExecutor() as pool:
        entries = list(pool.map(lambda path: _file_hash(path, cache.get(path)), paths))
    fresh = {path: entry for path, entry in zip(paths, entries, strict=True) if entry[0] is not None}
    if cache_file and any(cache.get(path) != entry for path, entry in fresh.items()):
        disk.write_json(cache_file, cache | fresh)
    return [entry[1] for entry in entries]


def _file_hash(path: str, cached_entry: list | None) -> list:
    """Return [[size, modified, changed], sha256] of a file, read only when it differs from the cached entry."""
    try:
        stat = os.stat(path)
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        if cached_entry and cached_entry[0] == stamp:
            return cached_entry
        with open(path, "rb") as stream:
            return [stamp, hashlib.file_digest(stream, "sha256").hexdigest()]
    except OSError as error:
        return [None, f"unreadable: {error.strerror}"]
