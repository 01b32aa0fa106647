"""How far a notebook is: lines for `thaw run`, a bar for a person."""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

PROGRESS_VARIABLE = "THAW_PROGRESS"
T = TypeVar("T")


def report(done: int, total: int, *, unit: str, label: str, **metrics: float) -> None:
    """Report to a watching `thaw run` how far this stage is. Do nothing when no `thaw run` watches."""
    target = os.environ.get(PROGRESS_VARIABLE)
    if target:
        line = {"time": time.time(), "done": done, "total": total, "unit": unit, "label": label, "metrics": metrics}
        with open(target, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def track(items: Iterable[T], *, total: int, unit: str = "image", label: str = "", step: int = 1) -> Iterator[T]:
    """Yield `items` with progress: a bar when a person runs the notebook, lines for `thaw run` when it is headless.

    Args:
        items: what is processed.
        total: number of all units.
        unit: what is counted.
        label: the name of the work.
        step: units in each item; the last item may hold fewer.
    """
    if not os.environ.get(PROGRESS_VARIABLE):
        from tqdm import tqdm

        with tqdm(total=total, unit=f" {unit}s", desc=label, leave=False, file=sys.stdout, mininterval=1) as bar:
            for item in items:
                yield item
                bar.update(min(step, total - bar.n))
        return
    last_report = start = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        done = min(number * step, total)
        if done == total or time.monotonic() - last_report > 0.5:
            last_report = time.monotonic()
            report(done, total, unit=unit, label=label, rate=done / max(last_report - start, 1e-6))
