"""Successive halving: all members begin, and after a few epochs only the best continue, from where they are.

Members are compared after `from_epochs` epochs, then after `eta` times as many, and so on; each time one in `eta`
continues (Karnin, Koren and Somekh 2013; Jamieson and Talwalkar 2016). Only the epochs on record decide which members
continue, so an interruption changes no decision. A stopped member stays in the store: without `halving` in the file,
the same command trains it to the end.
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
    """A member is stopped: its name, the epochs that it was judged by, its rank among those compared."""

    member: str
    epochs: int
    rank: int
    compared: int


Event = conduct.Made | conduct.Failed | conduct.Complete | Stopped


def rungs(sweep: files.Sweep) -> list[int]:
    """Return the epochs after which members are compared, all fewer than any member has."""
    stage = files.trained(sweep.members[0].recipe, sweep.last)
    fewest = min(member.recipe.resolved(stage)[files.EPOCHS] for member in sweep.members)
    comparisons, epochs = [], sweep.halving.from_epochs
    while epochs < fewest:
        comparisons.append(epochs)
        epochs *= sweep.halving.eta
    return comparisons


def run(sweep: files.Sweep, make: conduct.Make, pool: Executor, jobs: int, score: Score) -> Iterator[Event]:
    """Make the members of a sweep, fewer after each comparison, and yield each event.

    Args:
        sweep: a checked sweep with `halving`.
        make, pool, jobs: as for `conduct.run`.
        score: what ranks a member.
    """
    members = sweep.members
    for epochs in rungs(sweep):
        if len(members) < 2:
            break
        planned, failed = until(sweep, members, epochs), set()
        for event in conduct.run(planned, make, pool, jobs):
            failed |= set(event.members) if isinstance(event, conduct.Failed) else set()
            yield event
        ranked = _ranked(sweep, planned, [member for member in members if member.name not in failed], epochs, score)
        kept = max(1, len(members) // sweep.halving.eta)
        for rank, member in enumerate(ranked[kept:], kept + 1):
            stop(member, planned, epochs)
            yield Stopped(member.name, epochs, rank, len(ranked))
        best_names = {member.name for member in ranked[:kept]}
        members = [member for member in members if member.name in best_names]
    if members:
        yield from conduct.run(plans.plan(replace(sweep, members=members)), make, pool, jobs)


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
    """Return the members, the best first; those without a number come last."""
    sign = 1 if sweep.halving.falls else -1

    def place(member: files.Member) -> float:
        value = sign * score(pauses.history(planned.chains[member.name][-1]), epochs)
        return math.inf if math.isnan(value) else value

    return sorted(members, key=place)


def stop(member: files.Member, planned: plans.Plan, epochs: int) -> None:
    """Write the run of a member that is stopped: the stages before its training, and the epochs that count."""
    *before, training = planned.chains[member.name]
    conduct.finish(member, before[-1].stage.name)
    lines = pauses.history(training).read_text(encoding="utf-8").splitlines(keepends=True)
    path = training.link.parent / STOPPED.format(stage=training.stage.name)
    disk.write_text(path, "".join(lines[: epochs + 1]))
