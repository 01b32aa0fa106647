"""The store: each stage's result in a folder that is named by what it was made of.

A stage is made in `<stage>-<fingerprint>.partial` and renamed when it is complete; from then on its files are read-only
and their hashes are on record. A run is a folder of relative links into the store.
"""

import os
import stat
from pathlib import Path
from typing import Any

from helpers.core import disk, stages
from helpers.pipeline.fingerprints import fingerprint

NOT_RESULTS = ("logs", "cache", "backup")  # by-products that decide nothing downstream


def contents(folder: Path) -> dict[str, list]:
    """Return name -> [size, modification time in ns, sha256] of a stage's own files, without links and by-products."""
    by_name = {}
    for root, folders, files in os.walk(folder):
        if Path(root) == folder:
            folders[:] = [name for name in folders if name not in NOT_RESULTS]
        for name in files:
            path = Path(root, name)
            if not path.is_symlink() and path != folder / stages.STAGE_FILE:
                status = path.stat()
                by_name[str(path.relative_to(folder))] = [status.st_size, status.st_mtime_ns, disk.sha256_of(path)]
    return dict(sorted(by_name.items()))


def changed_files(folder: Path) -> list[str]:
    """Return the files of a stored stage that are missing or whose content has changed since it was made.

    A file of the size and the modification time on record counts as unchanged; `differences` reads every file.
    """
    changed = []
    for name, (size, modified, sha256) in disk.read_json(folder / stages.STAGE_FILE)["files"].items():
        try:
            status = (folder / name).stat()
        except OSError:
            changed.append(f"{name} is missing")
            continue
        if (status.st_size, status.st_mtime_ns) != (size, modified) and disk.sha256_of(folder / name) != sha256:
            changed.append(name)
    return changed


def differences(folder: Path) -> list[str]:
    """Read every file of a stored stage and return in words what has changed since the stage was made."""
    record = disk.read_json(folder / stages.STAGE_FILE)
    before, now = (
        {name: sha256 for name, (*_, sha256) in files.items()} for files in (record["files"], contents(folder))
    )
    problems = [f"{name} is missing" for name in before if name not in now]
    problems += [f"{name} was changed" for name in before if name in now and now[name] != before[name]]
    problems += [f"{name} was added" for name in now if name not in before]
    if fingerprint(record["ingredients"]) != record["fingerprint"] or not folder.name.endswith(record["fingerprint"]):
        problems.append(f"{stages.STAGE_FILE} was changed")
    return problems


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
    for path in partial.rglob(f".*{disk.TEMPORARY}"):  # what a process left that was killed while it wrote
        path.unlink()
    record = disk.read_json(partial / stages.STAGE_FILE) | record | {"made": "thaw run", "files": contents(partial)}
    disk.write_json(partial / stages.STAGE_FILE, record)
    for path in partial.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    disk.discard(folder)
    partial.replace(folder)


def link(path: Path, target: Path) -> None:
    """Make `path` a relative link to `target`, in one step, so that a reader sees the old link or the new one."""
    relative = os.path.relpath(target, path.parent)
    if not path.is_symlink() or os.readlink(path) != relative:
        temporary = path.with_name(f".{path.name}.{os.getpid()}{disk.TEMPORARY}")
        temporary.unlink(missing_ok=True)  # of a process that was killed and had the same number
        temporary.symlink_to(relative)
        os.replace(temporary, path)
