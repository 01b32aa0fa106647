"""The run of a recipe: the stages that are to do, one after the other, as events.

Nothing is shown here. The caller iterates over the events, and gives what watches the progress of one stage.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from helpers.core import disk, parallel, project, stages
from helpers.pipeline import checks, execution, hosts, kernels, manifest, planning, recipes

Watching = Callable[[str], AbstractContextManager[execution.Watch]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """What a run is going to do; nothing is made yet.

    Attributes:
        folder: of the run.
        steps: from the first stage to the last requested one.
        later: the steps after these, which the run leaves as they are.
        warning: what the user should know before anything starts, "" for nothing.
    """

    folder: Path
    steps: list[planning.Step]
    later: list[planning.Step]
    warning: str

    @property
    def todo(self) -> list[planning.Step]:
        """Return the steps that will be made."""
        return [step for step in self.steps if step.state == "to do"]


@dataclass(frozen=True)
class Made:
    """A stage was made: its place in the chain, such as "4/6 head", the seconds that it took and its headline."""

    place: str
    seconds: float
    headline: str


@dataclass(frozen=True)
class Finished:
    """The run is complete.

    Attributes:
        folder: of the run.
        changed: whether it changed, so that its report has to be written again.
        metrics: metrics.json of the last stage that has one, None where none has.
    """

    folder: Path
    changed: bool
    metrics: Path | None


def plan(recipe: recipes.Recipe, first: str = "", last: str = "", *, rebuild: str = "") -> Planned:
    """Return what a run would do, from stage `first` to stage `last`.

    Raises:
        planning.StageError: a stage before `first` is not done.
        ValueError: the recipe leaves one of the two out, or they are in the wrong order.
    """
    planned = planning.plan(recipe, rebuild)
    steps = _between(planned, first, last)
    folder = project.runs_folder() / recipe.name
    return Planned(folder, steps, planned[len(steps) :], checks.warning(planned))


def run(
    recipe: recipes.Recipe, planned: Planned, *, watching: Watching, say: Say, address: str = ""
) -> Iterator[Made | Finished]:
    """Check the recipe, then make the stages that are to do and yield each when it is made, and the end of the run.

    Args:
        recipe: the recipe.
        planned: as `plan` returns it.
        watching: called with the place of a stage; returns what is called with each line of its progress, as a context.
        say: called with each message for the user.
        address: of a Dask scheduler: its hosts train together and share the bulk work of the other stages.

    Raises:
        parallel.HostError: the hosts cannot do it.
        planning.StageError: a stage failed.
        ValueError: the recipe names a backbone or layer that does not exist, or its ratios do not add up.
    """
    todo = planned.todo
    if todo:
        store = planned.folder.parent / ".store"
        disk.check_writable(store)
        if address:
            with parallel.connect(address) as client:
                hosts.check(client, store)
        checks.check(recipe, todo, "jax" if address else "")
        disk.check_writable(planned.folder)
    yield from make(planned.steps, watching=watching, say=say, address=address)
    planning.unlink_stale(planned.later)
    planning.unlink_left_out(recipe)
    kept_steps = [step for step in planned.later if step.state != "to do"]
    is_new = manifest.write(recipe, [*planned.steps, *kept_steps], command=" ".join(sys.argv))
    measured = (step.link / "metrics.json" for step in reversed(planned.steps))
    yield Finished(planned.folder, is_new or bool(todo), next(filter(Path.is_file, measured), None))


def make(steps: list[planning.Step], *, watching: Watching, say: Say, address: str = "") -> Iterator[Made]:
    """Make the steps that are to do, link to all of them, and yield each that was made. Arguments as for `run`."""
    todo = [step.stage.notebook for step in steps if step.state == "to do"]
    forks = None if address else kernels.forks_for(todo)
    forked = partial(execution.execute, forks=forks) if forks else None
    for number, step in enumerate(steps, 1):
        if step.state != "to do":
            planning.link_stage(step)
            continue
        place = f"{number}/{len(steps)} {step.stage.name}"
        with watching(place) as watch:
            runner = hosts.runner(address, step.stage.name, say) if address else forked
            seconds = execution.make(step, watch, say, runner)
        yield Made(place, seconds, disk.read_json(step.folder / stages.STAGE_FILE)["headline"])


def _between(steps: list[planning.Step], first: str, last: str) -> list[planning.Step]:
    names = [step.stage.name for step in steps]
    if left_out := [name for name in (first, last) if name and name not in names]:
        raise ValueError(f"The recipe has no section {left_out[0]}, so it leaves that stage out: {', '.join(names)}.")
    begin = names.index(first) if first else 0
    end = names.index(last) + 1 if last else len(names)
    if begin >= end:
        raise ValueError(f"--from {first} comes after --to {last}. The order is: {', '.join(names)}.")
    if missing := [step.stage.name for step in steps[:begin] if step.state == "to do"]:
        raise planning.StageError(
            f"--from {first} needs {', '.join(missing)} to be done. Leave --from out to run them too."
        )
    return steps[:end]
