"""What `thaw run` shows: a line per stage, live progress while one is made, and the headline at the end."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from helpers.core import disk, parallel, project, stages
from helpers.pipeline import execution, hosts, manifest, planning, recipes

SECONDS_BETWEEN_LINES = 10  # where there is no terminal to draw on


class Watcher:
    """Shows the progress of one stage: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, label: str):
        self.console, self.label, self.told = console, label, time.monotonic()
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
        shown = [f"epoch {count}" if line["unit"] == "epoch" else f"{count} {line['unit']}s"]
        shown += [f"{rate:,.0f} {'image' if line['unit'] == 'epoch' else line['unit']}s/s"] if rate else []
        shown += [f"{name} {value:.4f}" for name, value in metrics.items()]
        state = "  ".join(filter(None, [line["label"], *shown]))
        self.bar.update(self.task, total=line["total"], completed=line["done"], state=state)
        if not self.console.is_terminal and time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
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
    """Make the stages of `recipe` that are to do, from `first` to `last`, then the report.

    Args:
        address: of a Dask scheduler: its hosts train together and share the bulk work of the other stages.

    Raises:
        parallel.HostError: the hosts cannot do it.
        planning.StageError: a stage failed, or one before `first` is not done.
        ValueError: the recipe names a backbone or layer that does not exist, or its ratios do not add up.
    """
    planned = planning.plan(recipe, rebuild)
    steps = _between(planned, first, last)
    todo = [step for step in steps if step.state == "to do"]
    warning = planning.dealt_anew(planned)
    if dry_run:
        for step in steps:
            console.print(
                f"  {step.stage.name:<10} {'would run' if step in todo else 'kept     '}  {step.why}", markup=False
            )
        console.print(warning, markup=False) if warning else None
        return
    run_folder = project.runs_folder() / recipe.name
    if todo:
        disk.check_writable(run_folder.parent / ".store")
        console.print(f"{recipe.name}: {len(todo)} of {len(steps)} stages to do, in {project.display_path(run_folder)}")
        if address:
            with parallel.connect(address) as client:
                hosts.check(client, run_folder.parent / ".store")
        console.print(warning, markup=False) if warning else None
        planning.check_choices(recipe, todo, "jax" if address else "")
        disk.check_writable(run_folder)

    def tell(text: str) -> None:
        console.print(f"      {text}", markup=False)

    for number, step in enumerate(steps, 1):
        place = f"{number}/{len(steps)} {step.stage.name}"
        if step not in todo:
            planning.link_stage(step)
            continue
        with Watcher(console, place) as watcher:
            run = hosts.runner(address, step.stage.name, tell) if address else None
            seconds = execution.make(step, watcher, tell, run)
        headline = disk.read_json(step.folder / stages.STAGE_FILE)["headline"]
        console.print(f"{place:<14} {seconds:6.1f} s  {headline}", markup=False)
    later = planned[len(steps) :]
    planning.unlink_stale(later)
    planning.unlink_left_out(recipe)
    kept = [step for step in later if step.state != "to do"]
    fresh = manifest.write(recipe, [*steps, *kept], command=" ".join(sys.argv))
    report = run_folder / "report.html"
    if fresh or todo or not report.is_file():
        from helpers.reports import report as reports

        reports.build_report(run_folder)
    if not todo:
        console.print(f"{recipe.name}: nothing to do, every stage is done.")
    if steps[-1].stage.name == "evaluate":
        from helpers.evaluation import metrics

        result = disk.read_json(run_folder / "evaluate" / "metrics.json")
        console.print(metrics.headline(result, recipe.published), markup=False)
    console.print(f"Report: {project.display_path(report)}", markup=False)


def _between(steps: list[planning.Step], first: str, last: str) -> list[planning.Step]:
    names = [step.stage.name for step in steps]
    if left_out := [name for name in (first, last) if name and name not in names]:
        raise ValueError(f"The recipe has no section {left_out[0]}, so it leaves that stage out: {', '.join(names)}.")
    begin = names.index(first) if first else 0
    end = names.index(last) + 1 if last else len(names)
    if begin >= end:
        raise ValueError(f"--from {first} comes after --to {last}. The order is: {', '.join(names)}.")
    missing = [step.stage.name for step in steps[:begin] if step.state == "to do"]
    if missing:
        raise planning.StageError(
            f"--from {first} needs {', '.join(missing)} to be done. Leave --from out to run them too."
        )
    return steps[:end]
