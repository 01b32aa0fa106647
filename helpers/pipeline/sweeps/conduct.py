"""The run of a sweep: every stage that is to do, each made once, several at a time, as events.

A stage begins when what it reads is made. When it fails, the members that need it fail and the others continue.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path

from helpers.core import disk, project, stages
from helpers.pipeline import chain, checks, housekeeping
from helpers.pipeline.sweeps import files, plans

Make = Callable[[plans.Unit, str], float]  # a unit and its place, such as "4/41 head"; returns seconds


@dataclass(frozen=True)
class Made:
    """A stage was made, or paused: its place, such as "4/41", what it is, the seconds that it took, its headline."""

    place: str
    name: str
    seconds: float
    headline: str


@dataclass(frozen=True)
class Failed:
    """A stage failed: its place, what it is, the error in words, and the members that cannot be completed now."""

    place: str
    name: str
    error: str
    members: list[str]


@dataclass(frozen=True)
class Complete:
    """All stages of a member are made."""

    member: str


class Inline(Executor):
    """Does each task in this process while it is submitted."""

    def submit(self, function: Callable, /, *arguments, **keywords) -> Future:
        """Return the finished future of `function`; an error that is not a failure of a stage ends the sweep."""
        future: Future = Future()
        try:
            future.set_result(function(*arguments, **keywords))
        except (RuntimeError, ValueError) as error:
            future.set_exception(error)
        return future


def check(planned: plans.Plan) -> None:
    """Check for every member what no schema can, as `checks.check` does for a recipe.

    Raises:
        ValueError: something is wrong with some members; the message names them.
    """
    problems: dict[str, list[str]] = {}
    for member in planned.sweep.members:
        todo = [step for step in planned.chains[member.name] if step.folder in planned.units]
        try:
            if todo:
                checks.check(member.recipe, todo)
        except (ValueError, FileNotFoundError) as error:
            problems.setdefault(str(error), []).append(member.name)
    if problems:
        lines = [f"{_some(members)}: {error}" for error, members in problems.items()]
        raise ValueError("\n".join([f"{planned.sweep.name} cannot be run:", *(f"  - {line}" for line in lines)]))


def _some(members: list[str]) -> str:
    return ", ".join(members[:3]) + (f" and {len(members) - 3} more" if len(members) > 3 else "")


def run(planned: plans.Plan, make: Make, pool: Executor, jobs: int = 1) -> Iterator[Made | Failed | Complete]:
    """Make what is to do and yield each event.

    Args:
        planned: as `plans.plan` returns it.
        make: makes one unit; raises a RuntimeError, ValueError or OSError when that fails.
        pool: where `make` runs.
        jobs: units at a time.
    """
    waiting = dict(planned.units)
    failed: dict[Path, str] = {}
    running: dict[Future, plans.Unit] = {}
    places: dict[Future, int] = {}
    count, done = len(planned.units), 0
    completed: set[str] = set()
    yield from _complete(planned, waiting, running, failed, completed)
    while waiting or running:
        for unit in _ready(waiting, running, failed)[: jobs - len(running)]:
            del waiting[unit.step.folder]
            done += 1
            future = pool.submit(make, unit, f"{done}/{count}")
            running[future], places[future] = unit, done
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            unit = running.pop(future)
            place = f"{places.pop(future)}/{count}"
            try:
                seconds = future.result()
                yield Made(place, unit.name, seconds, _headline(unit))
            except (RuntimeError, ValueError, OSError) as error:
                failed[unit.step.folder] = str(error)
                _drop(waiting, failed)
                yield Failed(place, unit.name, str(error), unit.members)
        yield from _complete(planned, waiting, running, failed, completed)


def _headline(unit: plans.Unit) -> str:
    try:
        return disk.read_json(unit.step.folder / stages.STAGE_FILE)["headline"]
    except FileNotFoundError:
        if not unit.until:
            raise
        return f"paused after {unit.until} epochs"


def _ready(waiting: dict[Path, plans.Unit], running: dict[Future, plans.Unit], failed: dict) -> list[plans.Unit]:
    pending = waiting.keys() | {unit.step.folder for unit in running.values()} | failed.keys()
    return [unit for unit in waiting.values() if not unit.needs & pending]


def _drop(waiting: dict[Path, plans.Unit], failed: dict[Path, str]) -> None:
    """Remove from `waiting` what cannot be made any more, and note the cause."""
    for folder, unit in list(waiting.items()):  # each comes after what it reads
        if lost := unit.needs & failed.keys():
            failed[folder] = failed[next(iter(lost))]
            del waiting[folder]


def _complete(planned: plans.Plan, waiting: dict, running: dict, failed: dict, completed: set) -> Iterator[Complete]:
    """Finish the run of each member that has all its stages and was not yielded yet."""
    if planned.until:
        return
    open_ = waiting.keys() | {unit.step.folder for unit in running.values()} | failed.keys()
    for member in planned.sweep.members:
        if member.name not in completed and not any(step.folder in open_ for step in planned.chains[member.name]):
            finish(member, planned.sweep.last)
            completed.add(member.name)
            yield Complete(member.name)


def finish(member: files.Member, last: str) -> None:
    """Link the stages of a member, all of them made, into its run and write its recipe and manifest."""
    planned = chain.plan(member.recipe, last=last)
    for _ in chain.run(member.recipe, planned, watching=_unwatched, say=lambda text: None):
        pass


def _unwatched(place: str):
    raise RuntimeError(f"{place} was made but is to be made again: its code or its images changed meanwhile.")


CACHES = ".caches.json"  # in a sweep's folder, while it is not complete: the caches that were there before it


def note_caches(folder: Path) -> None:
    """Remember which caches the store holds before a sweep begins; a sweep that resumes has remembered them already."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CACHES).is_file():
        disk.write_json(folder / CACHES, sorted(path.name for path in _caches()))


def remove_caches(folder: Path) -> int:
    """Remove the caches that a complete sweep made and return the bytes; none while another run is at work."""
    if not (folder / CACHES).is_file() or housekeeping.busy(project.runs_folder()):
        return 0
    before, size = set(disk.read_json(folder / CACHES)), 0
    for path in _caches():
        if path.name not in before:
            size += housekeeping.size_of(path)
            disk.discard(path) if path.is_dir() else path.unlink(missing_ok=True)
    (folder / CACHES).unlink()
    return size


def _caches() -> list[Path]:
    cache = project.runs_folder() / housekeeping.STORE / "cache"
    return sorted(cache.iterdir()) if cache.is_dir() else []
