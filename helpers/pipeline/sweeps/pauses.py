"""A training that is paused after some epochs, to resume later.

Its kernel is killed, as when a run is interrupted, and its unfinished stage is kept in the store. When it resumes, it
is the same stage with all its epochs, so a schedule sees its full length, and the result is that of an undisturbed one.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from helpers.pipeline import execution, planning

HISTORY = "history.csv"  # a row an epoch, written when the epoch ends


def history(step: planning.Step) -> Path:
    """Return the history of a training that is finished or paused; it need not exist."""
    folder = step.folder if step.folder.is_dir() else step.partial
    return folder / HISTORY


def epochs(step: planning.Step) -> int:
    """Return how many epochs of a training are on record."""
    try:
        return max(0, history(step).read_text(encoding="utf-8").count("\n") - 1)
    except FileNotFoundError:
        return 0


def make(step: planning.Step, until: int, watch: execution.Watch, say: Callable[[str], None]) -> float:
    """Make a stage and return the seconds; pause it after `until` epochs, 0 for never.

    It is checked every second, so it may train a few quick epochs more.

    Raises:
        planning.StageError: it failed before.
    """
    if not until:
        return execution.make(step, watch, say)
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # it would report that the paused kernel died
    start = time.monotonic()
    run = partial(execution.execute, is_wanted=lambda: epochs(step) < until)
    try:
        return execution.make(step, watch, say, run)
    except planning.StageError:
        if epochs(step) < until:
            raise
        return time.monotonic() - start
