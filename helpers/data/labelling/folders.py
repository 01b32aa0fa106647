"""Labels by folders: a folder for each class, alone or within folders of parts such as train, val and test.

Folders of parts are recognised by their names, in the spellings of data sets: train, Training, x_train, train_images,
train2017. Where the folders can be read in two ways, an error names both.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import pandas as pd

from helpers.core import words
from helpers.data.formats import listing
from helpers.data.images import SUFFIXES

Levels = Literal["auto", "upper", "lower", "path"]
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
PARTS |= {"test": "test", "testing": "test"}
# Words that name a folder of images, but not a class.
NEUTRAL = {"", *"image images img imgs data dataset set split photos pictures jpg".split()}
UNLABELLED = {"pred", "predict", "prediction", "inference", "unlabelled", "unlabeled", "unknown", "new", "submission"}


@dataclass
class Contents:
    """What the folders hold.

    Attributes:
        table: one row per image: path (posix, relative to the root), label and split ("" when unknown).
        rejected: rows of quarantine.csv: path, label, reason, detail.
        ignored: what was skipped -> how often.
        notes: sentences about how the folders were read, where that is not obvious.
    """

    table: pd.DataFrame
    rejected: list[dict[str, str]] = field(default_factory=list)
    ignored: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Image:
    path: str
    folders: tuple[str, ...]  # below the root, then below the folder of its part
    part: str = ""


def read(root: Path, class_folders: Levels = "auto") -> Contents:
    """Find the images below `root`, their classes and their parts.

    Args:
        root: the folder.
        class_folders: which of several levels of folders names the class: the upper one, the lower one, or their
            "path"; "auto" takes the only possible one.

    Raises:
        ValueError: the folders can be read in two ways; the message names both and how to choose.
    """
    contents = Contents(pd.DataFrame(columns=["path", "label", "split"]))
    images = [_Image(path, PurePosixPath(path).parts[:-1]) for path in walk(root, contents.ignored)]
    tops = {image.folders[0] for image in images if image.folders}
    empty = words.natural_order(
        {e.name for e in os.scandir(root) if listing.is_folder(e) and not listing.is_clutter(e.name)} - tops
    )
    for name in empty:
        contents.ignored[f"folders without an image: {shown(name)}"] += 1
    images = _unwrap(images, contents)
    images = _take_parts(images, root, contents)
    _take_classes(images, class_folders, contents)
    return contents


def walk(root: Path, ignored: Counter) -> Iterator[str]:
    """Yield the posix path of each file below `root` that is named like an image, sorted; count what is skipped."""
    yield from sorted(_walk(root, "", ignored, (os.path.realpath(root),)))


def _walk(root: Path, prefix: str, ignored: Counter, above: tuple[str, ...]) -> Iterator[str]:
    try:
        entries = list(os.scandir(root / prefix))
    except OSError:
        ignored["folders that cannot be opened"] += 1
        return
    for entry in entries:
        path = prefix + entry.name
        if listing.is_clutter(entry.name):
            ignored["hidden and system files"] += 1
        elif listing.is_folder(entry):
            real = os.path.realpath(entry.path)
            if real in above:
                ignored["links to a folder above"] += 1
            else:
                yield from _walk(root, path + "/", ignored, (*above, real))
        elif PurePosixPath(entry.name).suffix.lower() in SUFFIXES:
            yield path
        else:
            ignored[f"files named *{shown(PurePosixPath(entry.name).suffix.lower()) or ' without suffix'}"] += 1


def shown(text: str) -> str:
    """Return a name that can be printed: bytes that are not UTF-8 as \\x.."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


# Outer folders, and folders of parts


def _unwrap(images: list[_Image], contents: Contents) -> list[_Image]:
    """Skip an outer folder that holds everything, as in archives: it cannot be a class."""
    around = []
    while len(tops := {image.folders[0] for image in images if image.folders}) == 1:
        if not all(image.folders[1:] for image in images if image.folders) or "train" in _parts(tops).values():
            break
        around += tops
        images = [_Image(image.path, image.folders[1:]) for image in images]
    if around:
        contents.notes.append(f"All images are in {shown('/'.join(around))}/: the folders in it are read.")
    return images


def part_of(name: str) -> tuple[str, str]:
    """Return the part in a folder's name, or "", and the rest of the name.

    `train_images` is ("train", "images"), `x_train` is ("train", "x"), `station` is ("", "station").
    """
    pieces = [piece.lower() for piece in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
    joined = [re.fullmatch(r"x?(train|val|valid|test)(?:set|data|images)?", piece) for piece in pieces]
    pieces = [match[1] if match else piece for match, piece in zip(joined, pieces, strict=True)]
    parts = [PARTS[piece] for piece in pieces if piece in PARTS]
    return parts[0] if len(parts) == 1 else "", "".join(piece for piece in pieces if piece not in PARTS)


def _parts(names: set[str]) -> dict[str, str]:
    """Return the folders that are parts of one split: their names differ only in the part."""
    by_rest: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        part, rest = part_of(name)
        if part:
            by_rest["" if rest in NEUTRAL else rest][name] = part
    sets = [folders for folders in by_rest.values() if "train" in folders.values() and len({*folders.values()}) > 1]
    if len(sets) > 1:
        raise ValueError(
            f"These folders look like {len(sets)} ready-made splits: {'; '.join(map(_listed, sets))}. Name the"
            " folder of one of them as source, or move the others elsewhere."
        )
    if sets:
        return sets[0]
    if len(by_rest.get("", {})) == len(names):  # train alone, or val and test without train
        return by_rest[""]
    return {}


def _take_parts(images: list[_Image], root: Path, contents: Contents) -> list[_Image]:
    """Set the parts of the images and skip the folders of the parts, where the folders are a ready-made split."""
    by_top: dict[str, list[_Image]] = defaultdict(list)
    for image in images:
        if image.folders:
            by_top[image.folders[0]].append(image)
    inner = {top: _inside(top, own) for top, own in by_top.items()}
    deep = {top for top, folders in inner.items() if any(folders)}
    parts = _parts({*by_top}) or _train_alone(by_top, deep, root)
    if not parts:
        return _parts_in_classes(images, contents)
    part_names = _listed(parts)
    if not any(parts[top] == "train" for top in deep & {*parts}) and "train" in parts.values():
        raise ValueError(
            f"{part_names} in {shown(str(root))} look like parts of a split, but train holds no folder for each class, "
            "so nothing names the class of an image. Set a table of labels (explore.labels), or make folders for the"
            " classes. If they are the classes, rename them."
        )
    if "train" not in parts.values():
        raise ValueError(
            f"{part_names} in {shown(str(root))} look like parts of a split, but there is no train. Add a folder train,"
            " or rename them if they are the classes."
        )
    images_in_parts = []
    for top, own in by_top.items():
        if top in parts and top in deep:
            images_in_parts += [
                _Image(image.path, folders, parts[top]) for image, folders in zip(own, inner[top], strict=True)
            ]
        elif top in parts:
            contents.ignored["images outside any class folder"] += len(own)
            contents.notes.append(
                f"{shown(top)}/ holds {len(own):,} images without folders of classes: they have no labels and are left"
                " out. `thaw predict` classifies them."
            )
        else:
            _leave_out(top, own, part_names, root, contents)
    contents.ignored["images outside any class folder"] += sum(not image.folders for image in images)
    return images_in_parts


def _inside(top: str, images: list[_Image]) -> list[tuple[str, ...]]:
    """Return the folders below the part `top` that can name a class: not x_train/x_train or train/images."""
    inner = [image.folders[1:] for image in images]
    while len(first := {folders[:1] for folders in inner}) == 1 and (name := "".join(*first).lower()):
        if name != top.lower() and name not in NEUTRAL:
            break
        inner = [folders[1:] for folders in inner]
    return inner


def _train_alone(by_top: dict[str, list[_Image]], deep: set[str], root: Path) -> dict[str, str]:
    """Return train as the only part where the other folders hold images without labels."""
    train = [top for top in by_top if part_of(top)[0] == "train" and top in deep]
    others = {*by_top} - {*train}
    if len(train) != 1 or not others or others & deep:
        return {}
    if all({*re.findall("[a-z]+", other.lower())} & (UNLABELLED | {*PARTS}) for other in others):
        return {train[0]: "train"}
    raise ValueError(
        f"The folders in {shown(str(root))} can be read in two ways: {shown(train[0])} is a part with folders of"
        f" classes and {_listed(others)} beside it without labels, or they are all classes. For the first, move"
        f" {_listed(others)} elsewhere; for the second, rename {shown(train[0])}."
    )


def _leave_out(top: str, own: list[_Image], part_names: str, root: Path, contents: Contents) -> None:
    """Skip a folder beside the parts that has no labels or is a separate set; raise an error for any other."""
    inner = {image.folders[1] for image in own if image.folders[1:]}
    if {name.lower() for name in inner} <= NEUTRAL:
        why = "images without folders of classes: they have no labels"
    elif _parts(inner) or _parts({image.folders[2] for image in own if image.folders[2:]}):
        why = "images in parts of its own: it is a separate set, perhaps a copy"
    elif {*re.findall("[a-z]+", top.lower())} & UNLABELLED:
        why = "images: its name says that they have no labels"
    else:
        raise ValueError(
            f"{part_names} in {shown(str(root))} look like parts of a split, not classes, but {shown(top)} with"
            f" {len(own):,} images in folders is beside them. For a ready-made split, move that folder elsewhere. If"
            " all of them are classes, rename those that are named like parts."
        )
    contents.ignored[f"images in {shown(top)}, beside the parts"] += len(own)
    contents.notes.append(f"{shown(top)}/, beside the parts, holds {len(own):,} {why}. It is left out.")


def _parts_in_classes(images: list[_Image], contents: Contents) -> list[_Image]:
    """Set parts that are within the folders of the classes: cat/train, cat/test, dog/train, dog/test."""
    second = {image.folders[1] for image in images if image.folders[1:]}
    parts = _parts(second)
    if not parts or {*parts} != second or not all(len(image.folders) == 2 for image in images if image.folders):
        return images
    contents.notes.append(f"{_listed(parts)} are in the folder of each class.")
    loose = [image for image in images if not image.folders]
    inner = [_Image(image.path, image.folders[:1], parts[image.folders[1]]) for image in images if image.folders]
    return inner + loose


# Folders of classes


def _take_classes(images: list[_Image], class_folders: Levels, contents: Contents) -> None:
    for image in images:
        image.folders = _naming(image.folders)
    levels = class_folders if class_folders != "auto" else _only_reading([image.folders for image in images], contents)
    rows = []
    for image in sorted(images, key=lambda image: image.path):
        if not image.folders:
            contents.ignored["images outside any class folder"] += 1
            continue
        label = _label(image.folders, levels)
        if _is_utf8(image.path):
            rows.append({"path": image.path, "label": label, "split": image.part})
        else:  # with pyarrow installed, a table cannot hold such a name
            reason = {"reason": "unusable name", "detail": "the name is not valid UTF-8; rename it"}
            contents.rejected.append({"path": shown(image.path), "label": shown(label)} | reason)
    contents.ignored += Counter()  # drops zero counts
    contents.table = pd.DataFrame(rows, columns=["path", "label", "split"], dtype=str)


def _naming(folders: tuple[str, ...]) -> tuple[str, ...]:
    """Return the folders that can name a class: cat for cat/images and cat/cat."""
    pairs = zip(folders[1:], folders, strict=False)
    return folders[:1] + tuple(
        name for name, above in pairs if name.lower() not in NEUTRAL and name.lower() != above.lower()
    )


def _label(folders: tuple[str, ...], levels: Levels) -> str:
    return {"upper": folders[0], "lower": folders[-1], "path": "/".join(folders)}[levels]


def _only_reading(folders: list[tuple[str, ...]], contents: Contents) -> Levels:
    """Return "upper" unless the folders contradict it.

    Raises:
        ValueError: the upper and the lower folders make different classes.
    """
    below: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for own in folders:
        if own:
            below[own[0]].add(own[1:])
    if all(() in inner for inner in below.values()):
        if count := sum(len(own) > 1 for own in folders):
            contents.notes.append(f"{count:,} images in sub-folders belong to the class of the folder above.")
        return "upper"
    readings = {level: {_label(own, level) for own in folders if own} for level in ("upper", "lower", "path")}
    options = [
        f"{level} ({len(names):,} classes: {_listed(names, 6)})"
        for level, names in readings.items()
        if level != "path" or len(names) != len(readings["lower"])
    ]
    raise ValueError(
        f"The folders are {max(map(len, folders))} levels deep, and they can be read as {' or as '.join(options)}."
        " Choose: thaw new NAME FOLDER --classes upper, lower or path, or explore.class_folders in a recipe. `path`"
        " takes both names, such as animal/cat."
    )


def _listed(names, limit: int = 10) -> str:
    names = [shown(name) for name in words.natural_order(names)]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
