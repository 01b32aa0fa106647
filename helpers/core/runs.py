"""A stage's folder: opening, finishing, reading and reporting progress.

Every notebook opens its `out` with `open_stage` and closes it with `finish_stage`. Both note what they did in
`stage.json`, which makes a finished stage, an unfinished one and somebody's own folder three different things.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
STAGE_FILE = "stage.json"
TEMPORARY, DISCARDED = ".tmp", ".discarded"  # ends of the hidden names of what an interruption may leave behind
PROGRESS_VARIABLE = "THAW_PROGRESS"
HOSTS_VARIABLE = "THAW_HOSTS"  # the scheduler of `thaw run --hosts`, for the notebooks
RANK_VARIABLE = "THAW_RANK"  # see `ranks`
VERSIONED = ("tensorflow", "keras", "numpy", "opencv-python", "pillow", "scikit-learn", "split-folders", "papermill")

T = TypeVar("T")


def resolve(path: str | os.PathLike) -> Path:
    """Return `path` as an absolute path; a relative one starts at the project's root, not the working directory."""
    return Path(os.path.abspath(ROOT / Path(path).expanduser()))


def display_path(path: Path) -> str:
    """Return `path` as a person would type it: relative to the project's root where it lies below it."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def relative(path: str | os.PathLike, folder: Path) -> str:
    """Return `path` relative to `folder`, with forward slashes, as the CSV files hold it."""
    return Path(path).relative_to(folder).as_posix()


def read_json(path: str | os.PathLike) -> Any:
    """Return the content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


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


def require(folder: str | os.PathLike, *files: str, made_by: str) -> Path:
    """Return the input folder `folder` after checking that the named files are in it.

    Args:
        folder: a stage's folder, as given in a parameters cell.
        files: names of files that must exist in it.
        made_by: the notebook that writes the folder, e.g. "02_resize".

    Raises:
        FileNotFoundError: the folder or a file is missing; the message names the notebook that makes it.
    """
    path = resolve(folder)
    missing = [name for name in files if not (path / name).exists()] if path.is_dir() else []
    if missing or not path.is_dir():
        what = f"has no {', '.join(missing)}" if missing else "does not exist"
        raise FileNotFoundError(
            f"The folder {display_path(path)} {what}. Run notebooks/{made_by}.ipynb first, or name the folder it wrote."
        )
    if stage_status(path) == "open":
        raise FileNotFoundError(
            f"{display_path(path)} is unfinished: notebooks/{made_by}.ipynb was begun but did not reach its last cell."
            " Run it to the end."
        )
    return path


def stage_status(folder: Path) -> str:
    """Return "done", "open" (begun, not finished), "absent" or "foreign" (a folder that no notebook opened)."""
    if not folder.is_dir() or all(path.name.endswith(TEMPORARY) for path in folder.iterdir()):
        return "absent"
    try:
        return read_json(folder / STAGE_FILE)["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return "foreign"


def open_stage(out: str | os.PathLike, parameters: dict[str, Any] | None = None) -> Path:
    """Make `out` ready to be written and return it.

    A link (a stage that `thaw run` keeps in its store) is replaced by a fresh folder, never written through. A
    finished stage is begun anew. An unfinished one is continued when its parameters and inputs are the same, so that
    training can go on from its last epoch, and begun anew when they are not.

    Args:
        out: the folder of the stage.
        parameters: the parameters in force, as `recipes.in_force` returns them.

    Raises:
        FileExistsError: the folder holds files that no notebook of this suite has written.
    """
    path = resolve(out)
    if path.is_symlink():
        path.unlink()
    status, signature = stage_status(path), _signature(parameters)
    if status == "foreign":
        raise FileExistsError(
            f"{display_path(path)} holds files that Thaw did not write, so it is left alone. Choose another `out`."
        )
    if status == "done" or (status == "open" and read_json(path / STAGE_FILE).get("signature") != signature):
        discard(path)
    path.mkdir(parents=True, exist_ok=True)
    opened = {"status": "open", "stage": path.name, "parameters": _plain(parameters), "signature": signature}
    write_json(path / STAGE_FILE, opened | {"opened": time.time()})
    return path


def finish_stage(out: Path, *, files: Iterable[str], headline: str, next_notebook: str = "") -> None:
    """Check that the stage's files exist, record that it is done, and print the headline, the files and what is next.

    Raises:
        FileNotFoundError: a file is missing or empty.
    """
    files = list(files)
    missing = [name for name in files if not _is_written(out / name)]
    if missing:
        raise FileNotFoundError(f"{display_path(out)} should hold {', '.join(missing)} by now. Run the cells above.")
    opened = read_json(out / STAGE_FILE)
    seconds = max(round(time.time() - opened["opened"], 1), 0.0)  # the clock may have been set back
    done = {"status": "done", "made": "by hand", "headline": headline, "seconds": seconds}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(out / STAGE_FILE, opened | done | {"created": created, "versions": versions()})
    print(headline)
    print(f"Written to {display_path(out)}: " + ", ".join(f"{name} ({_size(out / name)})" for name in files))
    if next_notebook:
        print(f"Next: notebooks/{next_notebook}.ipynb")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    found = {"python": sys.version.split()[0]}
    for package in VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def report_progress(done: int, total: int, *, unit: str, label: str, **metrics: float) -> None:
    """Tell a watching `thaw run` how far this stage is. Does nothing when nobody watches."""
    target = os.environ.get(PROGRESS_VARIABLE)
    if target:
        line = {"time": time.time(), "done": done, "total": total, "unit": unit, "label": label, "metrics": metrics}
        with open(target, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def track(items: Iterable[T], *, total: int, unit: str = "image", label: str = "", step: int = 1) -> Iterator[T]:
    """Yield `items` with progress: a bar when a person runs the notebook, lines for `thaw run` when it is headless.

    Args:
        items: what to go through.
        total: number of units in all.
        unit: what is counted.
        label: what is being done.
        step: units in each item; the last item may hold fewer.
    """
    if not os.environ.get(PROGRESS_VARIABLE):
        from tqdm import tqdm

        with tqdm(total=total, unit=f" {unit}s", desc=label, leave=False, file=sys.stdout, mininterval=1) as bar:
            for item in items:
                yield item
                bar.update(min(step, total - bar.n))
        return
    told = start = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        done = min(number * step, total)
        if done == total or time.monotonic() - told > 0.5:
            told = time.monotonic()
            report_progress(done, total, unit=unit, label=label, rate=done / max(told - start, 1e-6))


def _signature(parameters: dict[str, Any] | None) -> str:
    """Identify the parameters and the stages they name as inputs."""
    parts = {name: value for name, value in _plain(parameters).items() if name != "out"}
    inputs = [resolve(value) / STAGE_FILE for value in parts.values() if isinstance(value, str) and value]
    stamps = [read_json(path) for path in inputs if path.is_file()]
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
