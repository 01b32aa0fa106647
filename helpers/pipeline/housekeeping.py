"""The folder of all runs: the runs themselves, and what none of them needs any more."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from helpers.core import disk, notebooks, stages
from helpers.pipeline import execution, hosts, manifest

STORE = ".store"


@dataclass(frozen=True)
class Run:
    """A run as `thaw ls` shows it.

    Attributes:
        name: its folder, relative to the folder of all runs.
        size: bytes of its stages; what it shares with other runs is counted in each.
        created: when its newest stage was made, ISO 8601 in UTC; "" for a run without a finished stage.
        stages: names of its finished stages, in order.
        headline: of the last of them.
    """

    name: str
    size: int
    created: str
    stages: list[str]
    headline: str


@dataclass(frozen=True)
class Leftover:
    """Something that no run needs: what it is, where, and how many bytes it takes."""

    kind: str
    paths: tuple[Path, ...]
    size: int


def runs_in(folder: Path) -> list[Run]:
    """Return the runs in a folder, the newest last; a run within a folder of runs, such as a sweep, counts too."""
    runs = [_run(path, folder) for path in _run_folders(folder)]
    return sorted(runs, key=lambda run: (run.created, run.name))


def _run_folders(folder: Path, depth: int = 2) -> Iterator[Path]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or path.is_symlink() or not path.is_dir():
            continue
        if any((path / stage / stages.STAGE_FILE).is_file() for stage in notebooks.stages()):
            yield path
        elif depth > 1:
            yield from _run_folders(path, depth - 1)


def _run(path: Path, folder: Path) -> Run:
    done = [stage for stage in notebooks.stages() if stages.status(path / stage) == "done"]
    records = [disk.read_json(path / stage / stages.STAGE_FILE) for stage in done]
    size = sum(size_of(path / stage) for stage in notebooks.stages() if (path / stage).is_dir())
    created = max((record.get("created", "") for record in records), default="")
    headline = records[-1].get("headline", "") if records else ""
    return Run(path.relative_to(folder).as_posix(), size, created, done, headline)


def size_of(path: Path) -> int:
    """Return the bytes on disk of a file or of a folder and all below it; links count nothing but themselves."""
    total, seen = 0, set()
    for root, _, files in os.walk(path.resolve()):
        for name in files:
            status = os.lstat(os.path.join(root, name))
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_blocks * 512
    return total if path.is_dir() else os.lstat(path).st_blocks * 512


def busy(folder: Path) -> list[str]:
    """Return the stages that a `thaw run` is making at the moment."""
    return [lock.stem.rpartition("-")[0] for lock in sorted((folder / STORE).glob("*.lock")) if _is_held(lock)]


def _is_held(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # not ours to lock
        return False


def leftovers(folder: Path) -> list[Leftover]:
    """Return what no run in `folder` needs: stages, interrupted stages, caches, and what killed processes left."""
    store, needed = folder / STORE, _needed(folder)
    unneeded: list[Leftover] = []
    for path in sorted(store.iterdir()) if store.is_dir() else ():
        if path.suffix == ".partial":
            around = [path.with_suffix(".ipynb"), path.with_suffix(".log"), path.with_suffix(".lock")]
            around += store.glob(f"{path.stem}.rank*.log")
            unneeded.append(_leftover("interrupted stage, which would resume", path, *around))
        elif (path / stages.STAGE_FILE).is_file() and path.name not in needed:
            unneeded.append(_leftover("stage that no run links to", path, path.with_suffix(".lock")))
        elif path.name.startswith(execution.KERNEL) or path.name.endswith(
            (disk.DISCARDED, disk.TEMPORARY, hosts.ALIVE)
        ):
            unneeded.append(_leftover("left by a process that was killed", path))
    caches = [store / "cache", *(run / "cache" for run in _run_folders(folder))]
    banks = (bank for cache in caches if cache.is_dir() for bank in sorted(cache.iterdir()))
    unneeded += [_leftover("cached activations, which can be computed again", bank) for bank in banks]
    again = folder / manifest.AGAIN
    return [*unneeded, _leftover("made by `thaw reproduce`", again)] if again.is_dir() else unneeded


def _leftover(kind: str, *paths: Path) -> Leftover:
    existing = tuple(path for path in paths if path.exists())
    return Leftover(kind, existing, sum(size_of(path) for path in existing))


def _needed(folder: Path) -> set[str]:
    """Return the names in the store to which any link in `folder`, however deep, leads."""
    store, names = (folder / STORE).resolve(), set()
    for root, folders, files in os.walk(folder):
        if Path(root) == folder:
            folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *files):
            path = Path(root, name)
            if path.is_symlink() and (target := path.resolve()).is_relative_to(store) and target != store:
                names.add(target.relative_to(store).parts[0])
    return names


def remove(folder: Path, unneeded: list[Leftover]) -> int:
    """Remove leftovers and return the bytes removed; what a `thaw run` has begun to use meanwhile stays."""
    removed = 0
    for leftover in unneeded:
        with ExitStack() as held:
            try:
                for lock in (path for path in leftover.paths if path.suffix == ".lock"):
                    held.enter_context(FileLock(lock, timeout=0))
            except Timeout:
                continue
            if leftover.paths[0].name in _needed(folder):
                continue
            for path in leftover.paths:
                disk.discard(path) if path.is_dir() else path.unlink(missing_ok=True)
            removed += leftover.size
    return removed
