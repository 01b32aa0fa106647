"""Stages of a sweep made in parallel: each by a process of its own on its share of the cores.

The process reads what to make from its standard input, which its parent keeps open: when the parent ends, by a kill
too, the process and its kernel end. Run as `python -m helpers.pipeline.sweeps.jobs`.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial

from helpers.core import project
from helpers.pipeline import planning, recipes
from helpers.pipeline.sweeps import pauses, plans

LAST_WORDS = 2000  # characters of an unexpected error


class Jobs:
    """Makes units in child processes, each on the cores of a free place."""

    def __init__(self, jobs: int):
        self.free: queue.Queue[set[int]] = queue.Queue()
        for cores in assign_cores(jobs):
            self.free.put(cores)
        self.running: list[subprocess.Popen] = []

    def make(self, unit: plans.Unit, place: str) -> float:
        """Make one unit; return the seconds.

        Raises:
            planning.StageError: it failed; the message is that of the child.
        """
        request = {"name": unit.recipe.name, "sections": unit.recipe.stages, "stage": unit.step.stage.name}
        cores = self.free.get()
        try:
            request |= {"fingerprint": unit.step.fingerprint, "until": unit.until, "cores": sorted(cores)}
            return self._ask(request)
        finally:
            self.free.put(cores)

    def _ask(self, request: dict) -> float:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        environment = os.environ | {"TF_FORCE_GPU_ALLOW_GROWTH": "true"}
        child = subprocess.Popen(
            [sys.executable, "-m", __name__], **pipes, text=True, cwd=project.ROOT, env=environment
        )
        self.running.append(child)
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            answer, log = child.stdout.read(), child.stderr.read()
            child.wait()
        finally:
            self.running.remove(child)
            for pipe in (child.stdin, child.stdout, child.stderr):
                with suppress(OSError):
                    pipe.close()
        try:
            result = json.loads(answer.splitlines()[-1])
        except (IndexError, ValueError):
            raise planning.StageError(
                f"the process that made it ended with {child.returncode}: {log.strip()[-LAST_WORDS:] or 'no message'}"
            ) from None
        if "error" in result:
            raise planning.StageError(result["error"])
        return result["seconds"]

    def stop(self) -> None:
        """End every child, and with it the kernel that it started."""
        for child in list(self.running):
            child.kill()


def assign_cores(jobs: int) -> list[set[int]]:
    """Return the cores of each of `jobs` jobs: those of this process, divided, or shared where there are too few."""
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not available:
        return [set() for _ in range(jobs)]
    return [set(available[job::jobs]) or {available[job % len(available)]} for job in range(jobs)]


def _make(request: dict) -> dict:
    """Make the stage of a request and return {"seconds"} or {"error"}."""
    if request["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, request["cores"])  # TensorFlow, OpenCV and joblib count these, in the kernel too
    recipe = recipes.Recipe(request["name"], request["sections"])
    try:
        step = next(step for step in planning.plan(recipe) if step.stage.name == request["stage"])
        if step.fingerprint != request["fingerprint"]:
            raise planning.StageError("the images, the code or a file changed since the sweep began; run it again.")
        say = partial(print, file=sys.stderr)
        return {"seconds": pauses.make(step, request["until"], lambda line: None, say)}
    except (RuntimeError, ValueError, OSError) as error:
        return {"error": str(error)}


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print(json.dumps(_make(request)), flush=True)
    os._exit(0)
