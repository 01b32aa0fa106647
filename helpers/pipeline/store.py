"""The store: each stage's result in a folder that is named by what it was made of.

A stage is made in `<stage>-<fingerprint>.partial` and renamed when it is complete; from then on its files are read-only
and their hashes are on record. A run is a folder of relative links into the store.
"""

import errno
import hashlib
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from helpers.core import runs
from helpers.pipeline.fingerprints import fingerprint

LEAST_FREE_BYTES = 300_000_000
NOT_RESULTS = ("logs", "cache", "backup")  # by-products that decide nothing downstream


def contents(folder: Path) -> dict[str, list]:
    """Return name -> [size, modification time in ns, sha256] of a stage's own files, without links and by-products."""
    found = {}
    for root, folders, files in os.walk(folder):
        if Path(root) == folder:
            folders[:] = [name for name in folders if name not in NOT_RESULTS]
        for name in files:
            path = Path(root, name)
            if not path.is_symlink() and path != folder / runs.STAGE_FILE:
                status = path.stat()
                found[str(path.relative_to(folder))] = [status.st_size, status.st_mtime_ns, sha256_of(path)]
    return dict(sorted(found.items()))


def changed_files(folder: Path) -> list[str]:
    """Return the files of a stored stage that are missing or whose content is not what it was when it was made.

    A file of the size and the modification time on record is taken to be as it was; `differences` reads every file.
    """
    changed = []
    for name, (size, modified, sha256) in runs.read_json(folder / runs.STAGE_FILE)["files"].items():
        try:
            found = (folder / name).stat()
        except OSError:
            changed.append(f"{name} is missing")
            continue
        if (found.st_size, found.st_mtime_ns) != (size, modified) and sha256_of(folder / name) != sha256:
            changed.append(name)
    return changed


def differences(folder: Path) -> list[str]:
    """Read every file of a stored stage and say in words what is not as it was when the stage was made."""
    record = runs.read_json(folder / runs.STAGE_FILE)
    before, now = (
        {name: sha256 for name, (*_, sha256) in files.items()} for files in (record["files"], contents(folder))
    )
    found = [f"{name} is missing" for name in before if name not in now]
    found += [f"{name} was changed" for name in before if name in now and now[name] != before[name]]
    found += [f"{name} was added" for name in now if name not in before]
    if fingerprint(record["ingredients"]) != record["fingerprint"] or not folder.name.endswith(record["fingerprint"]):
        found.append(f"{runs.STAGE_FILE} was changed")
    return found


def dangling_link(folder: Path) -> Path | None:
    """Return the first link in the folder that leads nowhere, looking at one linked file per sub-folder."""
    for root, folders, files in os.walk(folder):
        linked_files = (path for name in files if (path := Path(root, name)).is_symlink())
        for path in [*(Path(root, name) for name in folders), next(linked_files, Path(root))]:
            if path.is_symlink() and not path.exists():
                return path
    return None


def keep(partial: Path, folder: Path, record: dict[str, Any]) -> None:
    """Record what the finished stage in `partial` is, protect its files, and move it to `folder`."""
    for path in partial.rglob(f".*{runs.TEMPORARY}"):  # what a process left that was killed while it wrote
        path.unlink()
    record = runs.read_json(partial / runs.STAGE_FILE) | record | {"made": "thaw run", "files": contents(partial)}
    runs.write_json(partial / runs.STAGE_FILE, record)
    for path in partial.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    runs.discard(folder)
    partial.replace(folder)


def link(path: Path, target: Path) -> None:
    """Make `path` a relative link to `target`, in one step, so that a reader sees the old link or the new one."""
    relative = os.path.relpath(target, path.parent)
    if not path.is_symlink() or os.readlink(path) != relative:
        temporary = path.with_name(f".{path.name}.{os.getpid()}{runs.TEMPORARY}")
        temporary.unlink(missing_ok=True)  # of a process that was killed and had the same number
        temporary.symlink_to(relative)
        os.replace(temporary, path)


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
            f"{runs.display_path(folder)} cannot be written to. Give yourself the right to, or set THAW_RUNS to a"
            " folder of your own."
        )


def check_disk(folder: Path) -> None:
    """Raise an OSError when too little space is left where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise OSError(
            f"Only {free / 1e6:,.0f} MB are free where {runs.display_path(folder)} lies; a stage needs at least"
            f" {LEAST_FREE_BYTES / 1e6:,.0f} MB. Free some space, or set THAW_RUNS to a folder on another disk."
        )


def is_full(error: OSError) -> bool:
    """Tell whether an error says that the disk, or what the user may have of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def full(folder: Path) -> str:
    """Return what to tell the user when the disk is full where `folder` lies."""
    return f"the disk where {runs.display_path(folder)} lies is full. `thaw clean` says what could go."


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
