"""What `thaw sweep` does and shows: a plan, a line for each stage, a table of the members, the study at the end."""

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from helpers.cli import terminal
from helpers.core import disk, notebooks, project, words
from helpers.pipeline import chain, planning
from helpers.pipeline.sweeps import axes, conduct, files, halving, jobs, pauses, plans, search

TABLE = "sweep.csv"  # in the sweep's folder: a row for each member


def run(sweep: files.Sweep, console: Console, *, count: int = 1, dry_run: bool = False, address: str = "") -> int:
    """Make all members of a sweep, each stage once, then the study of them; return how many members failed.

    Args:
        sweep: a checked sweep.
        console: where the lines go.
        count: stages made at a time.
        dry_run: only print what would be made.
        address: of a Dask scheduler, whose hosts make a stage each.

    Raises:
        ImportError: a search lacks Optuna, or hosts Dask.
        ValueError: a member cannot be run, or `count` is not positive.
        planning.StageError: a stored stage was changed, or the study failed.
    """
    if count < 1:
        raise ValueError(f"--jobs: expected 1 or more, got {count}.")
    if address and count > 1:
        raise ValueError("--jobs and --hosts: give one of the two; each host makes one stage at a time.")
    if sweep.search:
        search.check()
    planned = plans.plan(search.examples(sweep) if sweep.search else sweep)
    _print_plan(planned, console, count)
    if dry_run:
        return 0
    conduct.check(planned)
    conduct.note_caches(sweep.folder)
    members = {member.name: member for member in sweep.members}
    states = {name: {"state": "not made", "error": ""} for name in members}
    with _maker(console, count, address) as (make, pool, at_a_time):
        for event in _events(planned, sweep, make, pool, at_a_time):
            if isinstance(event, search.Drawn):
                members[event.member.name] = event.member
            _note(event, states)
            _show(event, console)
    sweep = replace(sweep, members=list(members.values()))
    write_table(sweep, states)
    failed = sum(state["state"] in ("not made", "failed") for state in states.values())
    if not failed and (size := conduct.remove_caches(sweep.folder)):
        console.print(f"Caches that the members shared are removed: {size / 1e6:,.0f} MB.")
    if failed < len(states):
        _study(plans.plan(sweep), states, console)
        if (best := sweep.folder / search.BEST).is_file() and sweep.search:
            console.print(f"The best recipe: thaw run {project.display_path(best)}", markup=False)
    return failed


def _events(planned: plans.Plan, sweep: files.Sweep, make: conduct.Make, pool: Executor, count: int) -> Iterator:
    if not sweep.metric:
        return conduct.run(planned, make, pool, count)

    def score(history: Path, epochs: int | None = None) -> float:
        from helpers.evaluation import members

        table = pd.read_csv(history).head(epochs) if history.is_file() else pd.DataFrame()
        return members.scores(table).get(sweep.metric, float("nan")) if len(table) else float("nan")

    return (search if sweep.search else halving).run(sweep, make, pool, count, score)


def _print_plan(planned: plans.Plan, console: Console, count: int) -> None:
    sweep = planned.sweep
    if sweep.search:
        order = f"by {sweep.search.metric}, sampler {sweep.search.sampler}; members not drawn yet may look as follows."
        console.print(f"{sweep.name}: a search of {sweep.search.trials} trials {order}", markup=False)
    if sweep.halving:
        rungs = " and ".join(map(str, halving.rungs(sweep)))
        console.print(
            f"{sweep.name}: after {rungs} epochs, one member in {sweep.halving.eta} continues. The plan ignores this.",
            markup=False,
        )
    console.print(
        f"{sweep.name}: {len(sweep.members)} members in {project.display_path(sweep.folder)}; {planned.stages} stages"
        f" instead of {planned.alone}, since members share what is the same; {len(planned.units)} to do",
        markup=False,
    )
    for stage, different, todo in plans.by_stage(planned):
        console.print(f"  {stage:<10} {different:>4} different, {todo} to do", markup=False)
    if not planned.units:
        return
    all_ = plans.estimate([unit.step for unit in planned.units.values()])
    spread = f", or {words.duration(all_.seconds / count)} if {count} at a time are as quick" if count > 1 else ""
    unknown = f" without {', '.join(all_.unknown)}, of which none was made here yet" if all_.unknown else ""
    console.print(
        f"Estimated from the most similar stages made here: {words.duration(all_.seconds)}{spread},"
        f" {all_.size / 1e6:,.0f} MB{unknown}.",
        markup=False,
    )


@contextmanager
def _maker(console: Console, count: int, address: str):
    """Yield what makes a unit, the pool in which it works, and how many work at a time."""
    if address:
        from helpers.pipeline.sweeps import remote

        with remote.opened(address) as hosts:
            console.print(f"{len(hosts.workers)} hosts make a stage each: {', '.join(hosts.workers)}", markup=False)
            pool = ThreadPoolExecutor(len(hosts.workers))
            try:
                yield hosts.make, pool, len(hosts.workers)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return
    if count > 1:
        children = jobs.Jobs(count)
        pool = ThreadPoolExecutor(count)
        try:
            yield children.make, pool, count
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
        return

    def make(unit: plans.Unit, place: str) -> float:
        watching, say = terminal.following(console).values()
        with watching(f"{place} {unit.name}") as watch:
            return pauses.make(unit.step, unit.until, watch, say)

    yield make, conduct.Inline(), 1


def _note(event: Any, states: dict) -> None:
    if isinstance(event, search.Drawn):
        states[event.member.name] = {"state": "not made", "error": ""}
    elif isinstance(event, halving.Stopped):
        states[event.member] = {"state": f"stopped after {event.epochs} epochs", "error": ""}
    elif isinstance(event, conduct.Complete):
        states[event.member] = {"state": "done", "error": ""}
    elif isinstance(event, conduct.Failed):
        for member in event.members:
            states[member] = {"state": "failed", "error": event.error.splitlines()[0]}


def _show(event: Any, console: Console) -> None:
    if isinstance(event, conduct.Made):
        console.print(f"{event.place:<8} {event.name:<40} {event.seconds:6.1f} s  {event.headline}", markup=False)
    elif isinstance(event, conduct.Failed):
        console.print(f"{event.place:<8} {event.name:<40} failed: {event.error}", style="red", markup=False)
    elif isinstance(event, halving.Stopped):
        outcome = f"stopped after {event.epochs} epochs: rank {event.rank} of {event.compared}"
        console.print(f"{'':<8} {event.member:<40} {outcome}", markup=False)
    elif isinstance(event, search.Scored):
        labels = ", ".join(f"{k.rpartition('.')[2]} {axes.as_text(v)}" for k, v in event.member.labels.items())
        scores = f"{event.value:.4f}, the best is {event.best:.4f}"
        console.print(f"{event.place:<8} {event.member.name}: {labels}: {scores}", markup=False)


def write_table(sweep: files.Sweep, states: dict[str, dict[str, str]]) -> None:
    """Write sweep.csv: for each member its name, what varies, its state and the error, if any."""
    rows = [{"member": member.name} | _columns(member) | states[member.name] for member in sweep.members]
    disk.write_text(sweep.folder / TABLE, pd.DataFrame(rows).to_csv(index=False))


def _columns(member: files.Member) -> dict:
    return {("set" if name == "member" else name): label for name, label in member.labels.items()}


def _study(planned: plans.Plan, states: dict, console: Console) -> None:
    """Run notebooks/study.ipynb on the members, kept in the store like a stage."""
    step = _step(planned, states)
    for event in chain.make([step], **terminal.following(console)):
        terminal.show_made(event, console)
    console.print((step.folder / "leaderboard.txt").read_text(encoding="utf-8"), markup=False)
    console.print(f"Figures: {project.display_path(step.link / 'study.html')}", markup=False)


def _step(planned: plans.Plan, states: dict) -> planning.Step:
    study, sweep = notebooks.studies()[files.STUDY], planned.sweep
    parameters = {name: p.default for name, p in study.settings.items()} | {"sweep": project.display_path(sweep.folder)}
    parameters |= {"monitor": sweep.metric} if sweep.metric else {}
    fingerprints = {name: steps[-1].fingerprint for name, steps in planned.chains.items()}
    fingerprints["members"] = [[member.name, member.labels, states[member.name]] for member in sweep.members]
    if (importance := sweep.folder / search.IMPORTANCE).is_file():
        fingerprints["importance"] = disk.sha256_of(importance)
    return planning.alone(study, parameters, fingerprints, sweep.folder / study.name)
