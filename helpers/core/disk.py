"""Files: JSON and text written whole or not at all, hashes, room on the disk."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.core import project

TEMPORARY, DISCARDED = ".tmp", ".discarded"  # ends of the hidden names of what an interruption may leave behind


def read_json(path: str | os.PathLike) -> Any:
    """Return the content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_table(path: str | os.PathLike, **options: Any) -> Any:
    """Return a CSV as a pandas.DataFrame with every text as it was written: "NA" and "01" stay what they are.

    Args:
        path: the file.
        options: more of pandas.read_csv.
    """
    import pandas as pd

    return pd.read_csv(path, dtype=str, keep_default_na=False, **options)


def write_json(path: str | os.PathLike, content: Any) -> Path:
    """Write `content` as JSON; the file appears whole or not at all."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write `text` as UTF-8; the file appears whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path


def discard(folder: Path) -> None:
    """Remove a folder of ours. It is renamed first, so that an interruption never leaves half of it in its place."""
    if folder.is_dir():
        away = folder.with_name(f".{folder.name}.{os.getpid()}{DISCARDED}")
        shutil.rmtree(away, ignore_errors=True)  # of a process that was killed and had the same number
        folder.rename(away)
        shutil.rmtree(away)


LEAST_FREE_BYTES = 300_000_000


def is_writable(folder: Path) -> bool:
    """Make `folder` if it can be made and say whether it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    return os.access(folder, os.W_OK)


def check_writable(folder: Path) -> None:
    """Make `folder` if need be, and raise a PermissionError when it cannot be written to."""
    if not is_writable(folder):
        raise PermissionError(
            f"{project.display_path(folder)} cannot be written to. Give yourself the right to, or set THAW_RUNS to a"
            " folder of your own."
        )


def check_disk(folder: Path) -> None:
    """Raise an OSError when too little space is left where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise OSError(
            f"Only {free / 1e6:,.0f} MB are free where {project.display_path(folder)} lies; a stage needs at least"
            f" {LEAST_FREE_BYTES / 1e6:,.0f} MB. Free some space, or set THAW_RUNS to a folder on another disk."
        )


def is_full(error: OSError) -> bool:
    """Tell whether an error says that the disk, or what the user may have of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def full(folder: Path) -> str:
    """Return what to tell the user when the disk is full where `folder` lies."""
    return f"the disk where {project.display_path(folder)} lies is full. `thaw clean` says what could go."


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def version_of(files: Iterable[Path]) -> str:
    """Return 12 hexadecimal digits that change when the content of one of these files does, or when it goes."""
    digests = [sha256_of(file) if file.is_file() else "" for file in files]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:12]
