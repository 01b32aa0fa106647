"""Files: JSON and text written whole or not at all, hashes, free disk space."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.core import project

TEMPORARY, DISCARDED = ".tmp", ".discarded"  # endings of hidden files that an interruption may leave


def read_json(path: str | os.PathLike) -> Any:
    """Return the content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_table(path: str | os.PathLike, **options: Any) -> Any:
    """Return a CSV as a pandas.DataFrame with every text as it was written: "NA" and "01" stay text.

    Args:
        path: the file.
        options: other arguments of pandas.read_csv.
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
    """Remove a folder of Thaw. It is renamed first, so that an interruption never leaves half of it under its name."""
    if folder.is_dir():
        away = folder.with_name(f".{folder.name}.{os.getpid()}{DISCARDED}")
        shutil.rmtree(away, ignore_errors=True)  # of a killed process that had the same number
        folder.rename(away)
        shutil.rmtree(away)


LEAST_FREE_BYTES = 300_000_000


def is_writable(folder: Path) -> bool:
    """Create `folder` if possible and return whether it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    return os.access(folder, os.W_OK)


def check_writable(folder: Path) -> None:
    """Create `folder` if needed, and raise a PermissionError when it cannot be written to."""
    if not is_writable(folder):
        raise PermissionError(
            f"{project.display_path(folder)} cannot be written to. Change its permissions, or set THAW_RUNS to a"
            " folder of your own."
        )


def check_disk(folder: Path) -> None:
    """Raise an OSError when too little space is free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise OSError(
            f"Only {free / 1e6:,.0f} MB are free on the disk of {project.display_path(folder)}; a stage needs at least"
            f" {LEAST_FREE_BYTES / 1e6:,.0f} MB. Free some space, or set THAW_RUNS to a folder on another disk."
        )


def is_full(error: OSError) -> bool:
    """Return whether an error says that the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def full(folder: Path) -> str:
    """Return the message for a full disk of `folder`."""
    return f"the disk of {project.display_path(folder)} is full. `thaw clean` lists what can be deleted."


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def version_of(files: Iterable[Path]) -> str:
    """Return 12 hexadecimal digits that change when one of these files changes or disappears."""
    digests = [sha256_of(file) if file.is_file() else "" for file in files]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:12]
