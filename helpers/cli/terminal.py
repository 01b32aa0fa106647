"""What `thaw run` shows, a line per stage and live progress, and what `thaw ls` shows of all runs."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from helpers.core import disk, project
from helpers.pipeline import chain, housekeeping, recipes

SECONDS_BETWEEN_LINES = 10  # where there is no terminal to draw on


class Watcher:
    """Shows the progress of one stage: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, label: str):
        self.console, self.label, self.printed_at = console, label, time.monotonic()
        columns = ("{task.description}", BarColumn(24), "{task.fields[state]}", TimeRemainingColumn())
        self.bar = Progress(
            *[TextColumn(c) if isinstance(c, str) else c for c in columns], console=console, transient=True
        )
        self.task = self.bar.add_task(label, total=None, state="starting")

    def __enter__(self) -> "Watcher":
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def __call__(self, line: dict[str, Any]) -> None:
        """Show one line of `progress.report`."""
        metrics = dict(line["metrics"])
        rate = metrics.pop("rate", None)
        count = f"{line['done']:,} of {line['total']:,}"
        parts = [f"epoch {count}" if line["unit"] == "epoch" else f"{count} {line['unit']}s"]
        parts += [f"{rate:,.0f} {'image' if line['unit'] == 'epoch' else line['unit']}s/s"] if rate else []
        parts += [f"{name} {value:.4f}" for name, value in metrics.items()]
        state = "  ".join(filter(None, [line["label"], *parts]))
        self.bar.update(self.task, total=line["total"], completed=line["done"], state=state)
        if not self.console.is_terminal and time.monotonic() - self.printed_at > SECONDS_BETWEEN_LINES:
            self.printed_at = time.monotonic()
            self.console.print(f"      {state}", markup=False)


def run(
    recipe: recipes.Recipe,
    console: Console,
    first: str = "",
    last: str = "",
    *,
    rebuild: str = "",
    dry_run: bool = False,
    address: str = "",
) -> None:
    """Run `recipe` from stage `first` to stage `last`, then write the report; show each stage as it is made.

    Args:
        recipe: a checked recipe.
        console: where the lines go.
        first, last: names of stages; "" for the first and the last of the chain.
        rebuild: as for `planning.plan`.
        dry_run: only print which stages would run, and why.
        address: as for `chain.run`.

    Raises:
        parallel.HostError, planning.StageError, ValueError: as `chain.plan` and `chain.run`.
    """
    planned = chain.plan(recipe, first, last, rebuild=rebuild)
    if dry_run:
        for step in planned.steps:
            state = "would run" if step in planned.todo else "kept     "
            console.print(f"  {step.stage.name:<10} {state}  {step.why}", markup=False)
    elif planned.todo:
        count = f"{len(planned.todo)} of {len(planned.steps)}"
        console.print(f"{recipe.name}: {count} stages to do, in {project.display_path(planned.folder)}")
    if planned.warning and (dry_run or planned.todo):
        console.print(planned.warning, markup=False)
    if dry_run:
        return
    for event in chain.run(recipe, planned, address=address, **following(console)):
        if isinstance(event, chain.Made):
            show_made(event, console)
        else:
            _finish(recipe, event, console, is_idle=not planned.todo)


def following(console: Console) -> dict[str, Any]:
    """Return the arguments `watching` and `say` of `chain.run` and `chain.make` that show progress on `console`."""
    return {
        "watching": lambda place: Watcher(console, place),
        "say": lambda text: console.print(f"      {text}", markup=False),
    }


def show_made(event: chain.Made, console: Console) -> None:
    """Print the line of a stage that was made."""
    console.print(f"{event.place:<14} {event.seconds:6.1f} s  {event.headline}", markup=False)


def _finish(recipe: recipes.Recipe, event: chain.Finished, console: Console, is_idle: bool) -> None:
    report = event.folder / "report.html"
    if event.changed or not report.is_file():
        from helpers.reports import report as reports

        reports.build_report(event.folder)
    if is_idle:
        console.print(f"{recipe.name}: nothing to do, every stage is done.")
    if event.metrics:
        from helpers.evaluation import metrics

        console.print(metrics.headline(disk.read_json(event.metrics), recipe.published), markup=False)
    console.print(f"Report: {project.display_path(report)}", markup=False)


def show_runs(console: Console) -> None:
    """Print a line for each run, the newest last, and the size of the store."""
    folder = project.runs_folder()
    table = Table("run", "made", "MB", "done", "headline", box=None, pad_edge=False)
    for run in housekeeping.runs_in(folder):
        created, size = run.created[:16].replace("T", " "), f"{run.size / 1e6:,.1f}"
        table.add_row(run.name, created, size, str(len(run.stages)), run.headline.replace("[", r"\["))
    console.print(table)
    store = housekeeping.size_of(folder / housekeeping.STORE) if (folder / housekeeping.STORE).is_dir() else 0
    console.print(f"Runs share stages: together the store takes {store / 1e6:,.1f} MB.", style="dim")
