"""Successive halving: all members begin, and after a few epochs only the best go on, where they stood.

Members are compared after `from_epochs` epochs, then after `eta` times as many, and so on; each time one in `eta` goes
on (Karnin, Koren and Somekh 2013; Jamieson and Talwalkar 2016). Who goes on follows from the epochs on record alone, so
a sweep that was interrupted decides as it would have. What was stopped stays in the store: without `halving` in the
file, the same command trains it on.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

from helpers.core import disk
from helpers.pipeline.sweeps import conduct, files, pauses, plans

STOPPED = "{stage}-stopped.csv"  # in the run of a member that was stopped: the epochs that it was judged by

# A history.csv and how many epochs of it count, None for all -> the metric, or NaN.
Score = Callable[[Path, int | None], float]


@dataclass(frozen=True)
class Stopped:
    """A member does not go on: its name, the epochs that it was judged by, its rank among those compared."""

    member: str
    epochs: int
    rank: int
    compared: int


Event = conduct.Made | conduct.Failed | conduct.Complete | Stopped


def rungs(sweep: files.Sweep) -> list[int]:
    """Return the epochs after which members are compared, all fewer than any member has."""
    stage = files.trained(sweep.members[0].recipe, sweep.last)
    fewest = min(member.recipe.resolved(stage)[files.EPOCHS] for member in sweep.members)
    found, epochs = [], sweep.halving.from_epochs
    while epochs < fewest:
        found.append(epochs)
        epochs *= sweep.halving.eta
    return found


def run(sweep: files.Sweep, make: conduct.Make, pool: Executor, jobs: int, score: Score) -> Iterator[Event]:
    """Make the members of a sweep, fewer after each comparison, and yield each event.

    Args:
        sweep: a checked sweep with `halving`.
        make, pool, jobs: as for `conduct.run`.
        score: what ranks a member.
    """
    going = sweep.members
    for epochs in rungs(sweep):
        if len(going) < 2:
            break
        planned, failed = until(sweep, going, epochs), set()
        for event in conduct.run(planned, make, pool, jobs):
            failed |= set(event.members) if isinstance(event, conduct.Failed) else set()
            yield event
        ranked = _ranked(sweep, planned, [member for member in going if member.name not in failed], epochs, score)
        kept = max(1, len(going) // sweep.halving.eta)
        for rank, member in enumerate(ranked[kept:], kept + 1):
            stop(member, planned, epochs)
            yield Stopped(member.name, epochs, rank, len(ranked))
        chosen = {member.name for member in ranked[:kept]}
        going = [member for member in going if member.name in chosen]
    if going:
        yield from conduct.run(plans.plan(replace(sweep, members=going)), make, pool, jobs)


def until(sweep: files.Sweep, members: list[files.Member], epochs: int) -> plans.Plan:
    """Return the plan of some members up to so many epochs of their training."""
    stage = files.trained(members[0].recipe, sweep.last)
    planned = plans.plan(replace(sweep, members=members, last=stage))
    units = {}
    for folder, unit in planned.units.items():
        if unit.step.stage.name != stage:
            units[folder] = unit
        elif pauses.epochs(unit.step) < epochs:
            units[folder] = replace(unit, until=epochs)
    return replace(planned, units=units, until=epochs)


def _ranked(sweep: files.Sweep, planned: plans.Plan, members: list[files.Member], epochs: int, score: Score):
    """Return the members, the best first; those without a number stand last."""
    sign = 1 if sweep.halving.falls else -1

    def place(member: files.Member) -> float:
        found = sign * score(pauses.history(planned.chains[member.name][-1]), epochs)
        return math.inf if math.isnan(found) else found

    return sorted(members, key=place)


def stop(member: files.Member, planned: plans.Plan, epochs: int) -> None:
    """Write the run of a member that does not go on: the stages before its training, and the epochs that count."""
    *before, training = planned.chains[member.name]
    conduct.finish(member, before[-1].stage.name)
    lines = pauses.history(training).read_text(encoding="utf-8").splitlines(keepends=True)
    path = training.link.parent / STOPPED.format(stage=training.stage.name)
    disk.write_text(path, "".join(lines[: epochs + 1]))
