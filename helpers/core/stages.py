"""A stage's folder: opening, finishing and reading it.

Every notebook opens its `out` with `open` and closes it with `finish`. Both write to
`stage.json`, which separates a finished stage from an unfinished one and from a folder of the user.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from helpers.core import disk, project

STAGE_FILE = "stage.json"
VERSIONED = ("tensorflow", "keras", "numpy", "opencv-python", "pillow", "scikit-learn", "split-folders", "papermill")


def require(folder: str | os.PathLike, *files: str, made_by: str) -> Path:
    """Return the input folder `folder` after checking that the named files are in it.

    Args:
        folder: a stage's folder, as a parameters cell names it.
        files: names of files that must exist in it.
        made_by: the notebook that writes the folder, e.g. "02_resize".

    Raises:
        FileNotFoundError: the folder or a file is missing; the message names the notebook that makes it.
    """
    path = project.resolve(folder)
    missing = [name for name in files if not (path / name).exists()] if path.is_dir() else []
    if missing or not path.is_dir():
        problem = f"has no {', '.join(missing)}" if missing else "does not exist"
        raise FileNotFoundError(
            f"The folder {project.display_path(path)} {problem}. Run notebooks/{made_by}.ipynb first, or name the"
            " folder it wrote."
        )
    if status(path) == "open":
        raise FileNotFoundError(
            f"{project.display_path(path)} is unfinished: notebooks/{made_by}.ipynb did not reach its last cell."
            " Run it to the end."
        )
    return path


def of_run(text: str, stage: str, *files: str, parameter: str) -> Path:
    """Return the folder of the finished `stage` that `text` names.

    Args:
        text: the name of a run, its folder, or the folder of the stage itself.
        stage: name of the stage, e.g. "head".
        files: names of files that must exist in it.
        parameter: where `text` comes from, for the message.

    Raises:
        FileNotFoundError: there is no such stage; the message names the runs that have one.
    """
    shelf = project.runs_folder()
    for place in (project.resolve(text), project.resolve(text) / stage, shelf / text / stage):
        if all((place / name).is_file() for name in files) and status(place) == "done":
            return place.resolve()
    run_names = ", ".join(sorted(path.parent.name for path in shelf.glob(f"*/{stage}") if path.is_dir())) or "none yet"
    raise FileNotFoundError(
        f"{parameter}: {text!r} is neither a run with a finished {stage} nor the folder of one. Runs with one:"
        f" {run_names}."
    )


def status(folder: Path) -> str:
    """Return "done", "open" (not finished), "absent" or "foreign" (a folder that no notebook opened)."""
    if not folder.is_dir() or all(path.name.endswith(disk.TEMPORARY) for path in folder.iterdir()):
        return "absent"
    try:
        return disk.read_json(folder / STAGE_FILE)["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return "foreign"


def open(out: str | os.PathLike, parameters: dict[str, Any] | None = None) -> Path:
    """Prepare the folder `out` for writing and return it.

    A link (a stage that `thaw run` keeps in its store) is replaced by a new folder, so the store never changes. A
    finished stage starts again. An unfinished one continues when its parameters and inputs are the same, so that
    training resumes after its last epoch. Otherwise it starts again.

    Args:
        out: the folder of the stage.
        parameters: the parameters in force, as `notebooks.in_force` returns them.

    Raises:
        FileExistsError: the folder holds files that no notebook of this suite has written.
    """
    path = project.resolve(out)
    if path.is_symlink():
        path.unlink()
    state, signature = status(path), _signature(parameters)
    if state == "foreign":
        raise FileExistsError(
            f"{project.display_path(path)} holds files that Thaw did not write, so it stays as it is. Choose"
            " another `out`."
        )
    if state == "done" or (state == "open" and disk.read_json(path / STAGE_FILE).get("signature") != signature):
        disk.discard(path)
    path.mkdir(parents=True, exist_ok=True)
    opened = {"status": "open", "stage": path.name, "parameters": _plain(parameters), "signature": signature}
    disk.write_json(path / STAGE_FILE, opened | {"opened": time.time()})
    return path


def finish(out: Path, *, files: Iterable[str], headline: str, next_notebook: str = "") -> None:
    """Check that the stage's files exist, mark it as done, and print the headline, the files and the next notebook.

    Raises:
        FileNotFoundError: a file is missing or empty.
    """
    files = list(files)
    missing = [name for name in files if not _is_written(out / name)]
    if missing:
        raise FileNotFoundError(
            f"{project.display_path(out)} should hold {', '.join(missing)} by now. Run the cells above."
        )
    opened = disk.read_json(out / STAGE_FILE)
    seconds = max(round(time.time() - opened["opened"], 1), 0.0)  # the clock may have changed
    record = {"status": "done", "made": "by hand", "headline": headline, "seconds": seconds}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    disk.write_json(out / STAGE_FILE, opened | record | {"created": created, "versions": versions()})
    print(headline)
    print(f"Written to {project.display_path(out)}: " + ", ".join(f"{name} ({_size(out / name)})" for name in files))
    if next_notebook:
        print(f"Next: notebooks/{next_notebook}.ipynb")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that influence a result."""
    by_package = {"python": sys.version.split()[0]}
    for package in VERSIONED:
        try:
            by_package[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return by_package


def _signature(parameters: dict[str, Any] | None) -> str:
    """Return a hash of the parameters and of the stages that they name as inputs."""
    parts = {name: value for name, value in _plain(parameters).items() if name != "out"}
    inputs = [project.resolve(value) / STAGE_FILE for value in parts.values() if isinstance(value, str) and value]
    stamps = [disk.read_json(path) for path in inputs if path.is_file()]
    return hashlib.sha256(json.dumps([parts, stamps], sort_keys=True).encode()).hexdigest()


def _plain(parameters: Any) -> dict[str, Any]:
    if parameters is None:
        return {}
    return dict(parameters["value"]) if hasattr(parameters, "columns") else dict(parameters)


def _is_written(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0


def _size(path: Path) -> str:
    if path.is_dir():
        return f"{sum(1 for item in path.rglob('*') if not item.is_dir()):,} files"
    size = path.stat().st_size
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
