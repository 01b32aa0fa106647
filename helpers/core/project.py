"""The project's folder, the folder of all runs, and how a path is shown and resolved."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOSTS_VARIABLE = "THAW_HOSTS"  # the scheduler of `thaw run --hosts`, for the notebooks
RANK_VARIABLE = "THAW_RANK"  # see `ranks`


def resolve(path: str | os.PathLike) -> Path:
    """Return `path` as an absolute path; a relative one starts at the project's root, not the working directory."""
    return Path(os.path.abspath(ROOT / Path(path).expanduser()))


def display_path(path: Path) -> str:
    """Return `path` as a person would type it: relative to the project's root where it is below the root."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def relative(path: str | os.PathLike, folder: Path) -> str:
    """Return `path` relative to `folder`, with forward slashes, as the CSV files hold it."""
    return Path(path).relative_to(folder).as_posix()


def runs_folder() -> Path:
    """Return the folder of all runs: `runs/` of the project, or $THAW_RUNS."""
    return resolve(os.environ.get("THAW_RUNS", "runs"))


def run_folder(text: str | os.PathLike) -> Path:
    """Return the folder of a run from its path, or from its name in the folder of all runs.

    Where there is no such folder, return a path below the project, for a message.
    """
    places = (Path(text), resolve(text), runs_folder() / text)
    return next((place.absolute() for place in places if place.is_dir()), resolve(text))
