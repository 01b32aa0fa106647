"""What `thaw sweep` does and shows: a plan, a line for each stage, a table of the members, the study at the end."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pandas as pd
from rich.console import Console

from helpers.cli import terminal
from helpers.core import disk, notebooks, project, words
from helpers.pipeline import chain, execution, planning
from helpers.pipeline.sweeps import conduct, files, jobs, plans

TABLE = "sweep.csv"  # in the sweep's folder: a row for each member


def run(sweep: files.Sweep, console: Console, *, count: int = 1, dry_run: bool = False) -> int:
    """Make all members of a sweep, each stage once, then the study of them; return how many members failed.

    Args:
        sweep: a checked sweep.
        console: where the lines go.
        count: stages made at a time.
        dry_run: only say what would be made.

    Raises:
        ValueError: a member cannot be run, or `count` is not positive.
        planning.StageError: a stored stage was changed, or the study failed.
    """
    if count < 1:
        raise ValueError(f"--jobs: expected 1 or more, got {count}.")
    planned = plans.plan(sweep)
    _say_plan(planned, console, count)
    if dry_run:
        return 0
    conduct.check(planned)
    conduct.note_caches(sweep.folder)
    states = {member.name: {"state": "not made", "error": ""} for member in sweep.members}
    with _maker(sweep, console, count) as (make, pool):
        for event in conduct.run(planned, make, pool, count):
            _note(event, states)
            _show(event, console)
    write_table(sweep, states)
    failed = sum(state["state"] != "done" for state in states.values())
    if not failed and (size := conduct.remove_caches(sweep.folder)):
        console.print(f"Caches that the members shared are removed: {size / 1e6:,.0f} MB.")
    if failed < len(states):
        _study(planned, states, console)
    return failed


def _say_plan(planned: plans.Plan, console: Console, count: int) -> None:
    sweep = planned.sweep
    console.print(
        f"{sweep.name}: {len(sweep.members)} members in {project.display_path(sweep.folder)}; {planned.stages} stages"
        f" in place of {planned.alone}, since members share what is the same; {len(planned.units)} to do",
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
def _maker(sweep: files.Sweep, console: Console, count: int):
    """Yield what makes a unit, and the pool in which it works."""
    if count > 1:
        children = jobs.Jobs(sweep, count)
        pool = ThreadPoolExecutor(count)
        try:
            yield children.make, pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
        return

    def make(unit: plans.Unit, place: str) -> float:
        watching, say = terminal.following(console).values()
        with watching(f"{place} {unit.name}") as watch:
            return execution.make(unit.step, watch, say)

    yield make, conduct.Inline()


def _note(event: conduct.Made | conduct.Failed | conduct.Complete, states: dict) -> None:
    if isinstance(event, conduct.Complete):
        states[event.member] = {"state": "done", "error": ""}
    elif isinstance(event, conduct.Failed):
        for member in event.members:
            states[member] = {"state": "failed", "error": event.error.splitlines()[0]}


def _show(event: conduct.Made | conduct.Failed | conduct.Complete, console: Console) -> None:
    if isinstance(event, conduct.Made):
        console.print(f"{event.place:<8} {event.name:<40} {event.seconds:6.1f} s  {event.headline}", markup=False)
    elif isinstance(event, conduct.Failed):
        console.print(f"{event.place:<8} {event.name:<40} failed: {event.error}", style="red", markup=False)


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
    read = {name: steps[-1].fingerprint for name, steps in planned.chains.items()}
    read["members"] = [[member.name, member.labels, states[member.name]] for member in sweep.members]
    return planning.alone(study, parameters, read, sweep.folder / study.name)
