"""List the images among files and folders, in order: one folder at a time, so a million images need little memory."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from helpers.data import images

IGNORED_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "icon\r"}


def find(paths: Iterable[str | os.PathLike]) -> Iterator[Path]:
    """Return the files among `paths`, and the images below the folders among them, sorted within each folder.

    Hidden files, system files and links to a folder above are skipped.

    Raises:
        FileNotFoundError: a path does not exist; or, when the iteration reaches it, a folder holds no image.
    """
    paths = [Path(path) for path in paths]
    for path in paths:
        if not os.path.lexists(path):
            raise FileNotFoundError(f"There is no image or folder {path}.")
    return _each(paths)


def _each(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        below = _below(path, (os.path.realpath(path),))
        if (first := next(below, None)) is None:
            raise FileNotFoundError(f"The folder {path} holds no images.")
        yield first
        yield from below


def _below(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    names, folders = [], set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_clutter(entry.name):
                continue
            if is_folder(entry):
                folders.add(entry.name)
            elif os.path.splitext(entry.name)[1].lower() not in images.SUFFIXES:
                continue
            names.append(entry.name)
    for name in sorted(names):
        if name not in folders:
            yield folder / name
        elif (real := os.path.realpath(folder / name)) not in above:
            yield from _below(folder / name, (*above, real))


def is_folder(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder or a link to one; a link to itself is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_clutter(name: str) -> bool:
    """Return whether a name is hidden or that of a system file."""
    return name.startswith(".") or name.lower() in IGNORED_NAMES
