"""The command `thaw`. It never loads TensorFlow itself, except to predict and to review labels."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from helpers.cli import classify
from helpers.core import disk, notebooks, project
from helpers.pipeline import recipes

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
WIDE = 200  # columns of a table that goes into a file or a pipe
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
START, RUN, LOOK, COMPARE, SHIP, MAINTAIN = "Start", "Run", "Look", "Compare", "Ship", "Maintain"
INTERRUPTED = 130  # the exit code that typer makes of Ctrl-C

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/elpv.yaml.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="STAGE.PARAMETER=VALUE", help="Change a parameter; may be repeated."),
]
Name = Annotated[str, typer.Option(help="Name of the run, instead of the recipe's.")]
Hosts = Annotated[
    str, typer.Option(metavar="ADDRESS", help="A Dask scheduler, tcp://...:8786, whose hosts do the work together.")
]
Formats = Annotated[str, typer.Option(metavar="A,B,...", help="See `thaw params 07`; the first one is used.")]
Serve = Annotated[bool, typer.Option("--serve", help="Also write a function that answers over HTTP.")]
More = Annotated[
    list[str] | None, typer.Option("--set", metavar="PARAMETER=VALUE", help="A parameter of 07; may be repeated.")
]


@app.callback()
def main() -> None:
    """Thaw: transfer learning for image classification, from a folder of images to an honest report."""


@app.command(rich_help_panel=START)
def new(
    name: Annotated[str, typer.Argument(help="Name of the recipe and of its run.")],
    source: Annotated[
        str, typer.Argument(help="A folder of images, a table of labels, an archive, or a built-in data set.")
    ] = "",
    origin: Annotated[
        str,
        typer.Option(
            "--from", metavar="ARCHIVE", help="Instead of SOURCE: a zip or tar file; it is unpacked into data/NAME."
        ),
    ] = "",
    classes: Annotated[
        Literal["auto", "upper", "lower", "path"],
        typer.Option(help="Of folders in folders, those that name the classes; path takes both names."),
    ] = "auto",
    label: Annotated[str, typer.Option(metavar="COLUMN", help="Of a table: the column that holds the class.")] = "",
    group: Annotated[str, typer.Option(metavar="COLUMN", help="Of a table: equal values stay in one part.")] = "",
) -> None:
    """Write recipes/NAME.yaml for your images, filled in from what is found and with every parameter explained."""
    from helpers.cli import starter

    if bool(source) == bool(origin):
        raise ValueError("Name one source: thaw new NAME SOURCE, or thaw new NAME --from ARCHIVE.")
    console.print(starter.write_recipe(name, source or origin, classes, label=label, group=group))


@app.command(rich_help_panel=RUN)
def run(
    recipe: RecipeFile,
    overrides: Set = None,
    name: Name = "",
    first: Annotated[
        str, typer.Option("--from", metavar="STAGE", help="Begin here; what comes before must be done.")
    ] = "",
    last: Annotated[str, typer.Option("--to", metavar="STAGE", help="Stop after this stage.")] = "",
    rebuild: Annotated[
        str, typer.Option(metavar="STAGE", help="Make this stage and those after it again, or `all`.")
    ] = "",
    dry_run: Annotated[bool, typer.Option(help="Only print which stages would run, and why.")] = False,
    hosts: Hosts = "",
) -> None:
    """Run every stage of RECIPE that is not done yet, and write the report."""
    from helpers.cli import terminal

    loaded = recipes.load(recipe, overrides, name)
    rebuild = rebuild if rebuild in ("", "all") else notebooks.find_stage(rebuild).name
    between = [notebooks.find_stage(stage).name if stage else "" for stage in (first, last)]
    terminal.run(loaded, console, *between, rebuild=rebuild, dry_run=dry_run, address=hosts)


@app.command(rich_help_panel=RUN)
def show(recipe: RecipeFile, overrides: Set = None, name: Name = "") -> None:
    """Show every parameter of RECIPE with its value, and the state of each stage."""
    from helpers.pipeline import planning

    loaded = recipes.load(recipe, overrides, name)
    table = Table("stage", "parameter", "value", "state", box=None, pad_edge=False)
    for step in planning.plan(loaded):
        rows = [(p, _text(value)) for p, value in step.parameters.items()] or [("", "")]
        section = loaded.stages.get(step.stage.name, {})
        for number, (parameter, value) in enumerate(rows):
            style = "bold" if parameter in section else ""
            state = (step.state if step.why == step.state else f"{step.state}: {step.why}") if not number else ""
            table.add_row(step.stage.name if not number else "", parameter, value, state, style=style)
    console.print(table)
    console.print("Bold: set by the recipe. The other values are the notebooks' own.", style="dim")


@app.command(rich_help_panel=START)
def params(
    stage: Annotated[str, typer.Argument(help="A stage, its notebook or its number: head, 03_train_head, 03.")],
) -> None:
    """Explain the parameters of a stage, read from its notebook."""
    stage_notebook = notebooks.find_notebook(stage)
    table = Table("parameter", "type", "default", "meaning", box=None, pad_edge=False)
    for p in stage_notebook.parameters.values():
        table.add_row(
            p.name, p.type_text.replace("[", r"\["), _text(p.default), f"{p.meaning} {p.allowed}".replace("[", r"\[")
        )
    console.print(f"[bold]{stage_notebook.name}[/] (notebooks/{stage_notebook.notebook.name})")
    console.print(table)


@app.command("backbones", rich_help_panel=START)
def list_backbones(hub: Annotated[bool, typer.Option("--hub", help="Those of KerasHub instead.")] = False) -> None:
    """List the backbones, with the size in pixels of the images that their ImageNet weights were trained on."""
    from helpers.cli import backbones

    console.print("\n".join(backbones.hub_lines() if hub else backbones.lines()), markup=False)


@app.command(rich_help_panel=COMPARE)
def bakeoff(
    recipe: RecipeFile,
    names: Annotated[str, typer.Option("--backbones", metavar="A,B,...", help="What to compare, or all-local.")],
    overrides: Set = None,
    name: Name = "",
    own_size: Annotated[
        bool, typer.Option(help="Give each backbone images of the size that its weights were trained at.")
    ] = False,
) -> None:
    """Rank backbones by a probe on the validation images of RECIPE, before anything is trained."""
    from helpers.cli import backbones
    from helpers.cli import bakeoff as study

    loaded = recipes.load(recipe, overrides, name)
    folder = study.run(loaded, backbones.parse(names), console, own_size=own_size)
    console.print(study.as_text(folder), markup=False)
    console.print(f"Figures: {project.display_path(folder.parent / 'bakeoff.ipynb')}", markup=False)


@app.command(rich_help_panel=COMPARE)
def sweep(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A recipe and what varies: recipes/sweeps/*.yaml.")],
    overrides: Set = None,
    name: Name = "",
    jobs: Annotated[int, typer.Option(help="Stages made at a time; they share the cores.")] = 1,
    dry_run: Annotated[bool, typer.Option(help="Only print what would be made, with time and disk.")] = False,
    hosts: Hosts = "",
) -> None:
    """Run every member of the sweep in FILE, each shared stage once, and the study of them all."""
    from helpers.cli import sweep as sweeps
    from helpers.pipeline.sweeps import files

    if sweeps.run(files.load(file, overrides, name), console, count=jobs, dry_run=dry_run, address=hosts):
        raise typer.Exit(1)


@app.command(rich_help_panel=COMPARE)
def compare(
    runs: Annotated[list[str], typer.Argument(help="Finished runs; the others are compared with the first.")],
    common: Annotated[bool, typer.Option(help="Where test parts differ, compare on the images in common.")] = False,
) -> None:
    """Show which of RUNS is better, by how much, and whether it is more than chance."""
    from helpers.cli import compare as study

    console.print(f"Page: {project.display_path(study.run(runs, console, common=common))}", markup=False)


@app.command("two-stage", rich_help_panel=COMPARE)
def two_stage(
    run: Annotated[str, typer.Argument(help="A finished run of three classes or more.")],
    groups: Annotated[
        str, typer.Option(help="Classes that a second stage separates: auto, or as in '[[a, b], [c, d]]'.")
    ] = "auto",
    overrides: Set = None,
) -> None:
    """Group the classes that RUN confuses, train a model for each group, and compare the whole with RUN."""
    from helpers.cli import two_stage as study

    page = study.run(run, groups, console, overrides=overrides or [])
    console.print(f"Page: {project.display_path(page)}", markup=False)


@app.command(rich_help_panel=SHIP)
def predict(
    run: Annotated[str, typer.Argument(help="A run, e.g. runs/elpv; left out with --bundle.")],
    images: Annotated[
        list[Path] | None, typer.Argument(help="Images, or folders that are searched for images.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write the predictions to this file, which may end in .parquet.")
    ] = None,
    columns: Annotated[
        str, typer.Option(metavar="A,B,...", help="What a competition asks for, as in id,breed; * is every class.")
    ] = "",
    hosts: Hosts = "",
    bundle: classify.Bundle = None,
) -> None:
    """Classify IMAGES with the model of RUN, or with --bundle FOLDER instead."""
    if bundle:
        code = classify.by_bundle(bundle, [Path(run), *(images or [])], csv, columns, console)
    elif not images:
        raise ValueError("Name images or folders after the run: thaw predict runs/elpv photo.png")
    else:
        code = classify.by_run(run, images, csv, columns, hosts, console)
    if code:
        raise typer.Exit(code)


@app.command(rich_help_panel=SHIP)
def export(
    run: Annotated[str, typer.Argument(help="A run, e.g. runs/elpv.")],
    formats: Formats = "",
    serve: Serve = False,
    overrides: More = None,
) -> None:
    """Write the model of RUN as a bundle that needs no Thaw and no TensorFlow, and prove that it predicts the same."""
    from helpers.cli import export as stage

    folder = stage.run(run, stage.parameters(formats, serve, overrides), console)
    console.print(f"Bundle: {project.display_path(folder)}", markup=False)


@app.command(rich_help_panel=LOOK)
def review(
    run: Annotated[str, typer.Argument(help="A run whose phase 1 is done, e.g. runs/elpv.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; review.html of the run by default.")] = None,
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation that judges the labels.")] = 5,
) -> None:
    """Write a page to correct the labels of RUN that look wrong."""
    from helpers.cli import quiet

    with quiet.native_log():
        from helpers.reports import review as pages

        path, summary = pages.build(run, out, folds=folds)
    console.print(f"Written: {project.display_path(path)}: {summary}", markup=False)
    console.print("Open it in a browser; its button saves fixes.csv, which explore.fixes applies to the labels.")


@app.command(rich_help_panel=LOOK)
def board(port: Annotated[int, typer.Option(help="Port on this machine.")] = 6006) -> None:
    """Open TensorBoard for all runs."""
    logs = sorted(project.runs_folder().glob("*/*/logs"))
    if not logs:
        raise FileNotFoundError("No run has TensorBoard logs yet. Run `thaw run recipes/elpv.yaml` first.")
    spec = ",".join(f"{path.parts[-3]}/{path.parts[-2]}:{path.resolve()}" for path in logs)
    subprocess.run([sys.executable, "-m", "tensorboard.main", f"--logdir_spec={spec}", f"--port={port}"], check=False)


@app.command(rich_help_panel=START)
def doctor() -> None:
    """Check everything that a run needs on this machine, compute on each device, and list what to fix."""
    from helpers.cli import doctor as doctors

    if doctors.show(console):
        raise typer.Exit(1)


@app.command(rich_help_panel=START)
def prefetch(
    arguments: Annotated[list[str], typer.Argument(metavar="BACKBONE|RECIPE...", help="Backbones, or recipes' files.")],
) -> None:
    """Fetch ImageNet weights now, so that runs need no network."""
    from helpers.cli import quiet
    from helpers.models import fetching
    from helpers.pipeline import checks

    names = list(dict.fromkeys(name for argument in arguments for name in checks.pretrained(argument)))
    failed = 0
    for name in names:
        try:
            with quiet.native_log():
                fetching.fetch(name)
            console.print(f"{name}: its ImageNet weights are on this machine", markup=False)
        except (OSError, ImportError) as error:
            failed += 1
            console.print(f"{name}: {error}", style="red", markup=False)
    if failed:
        raise typer.Exit(1)


@app.command(rich_help_panel=MAINTAIN)
def verify(run: Annotated[str, typer.Argument(help="A run, e.g. runs/elpv.")]) -> None:
    """Read every file of RUN and its images again, and list what changed since it was made."""
    from helpers.pipeline import manifest

    wrong = 0
    for name, problems in manifest.verify(project.run_folder(run)).items():
        wrong += len(problems)
        console.print(f"{name:<12}{'; '.join(problems) or 'as it was made'}", markup=False)
    if wrong:
        raise typer.Exit(1)


@app.command(rich_help_panel=MAINTAIN)
def reproduce(
    run: Annotated[
        str, typer.Argument(help="A run, e.g. runs/elpv; its manifest.json and evaluate folder are enough.")
    ],
    elsewhere: Annotated[
        str, typer.Option("--runs", help="Folder of runs to work in; runs/.reproduced if not given.")
    ] = "",
    overrides: Set = None,
) -> None:
    """Make RUN again from its manifest.json, in another folder, and report whether the predictions agree."""
    from helpers.cli import terminal
    from helpers.pipeline import manifest

    first = project.run_folder(run)
    before = manifest.read(first)
    place = project.resolve(elsewhere) if elsewhere else project.runs_folder() / manifest.AGAIN
    second = place / before["name"]
    if second.resolve() == first.resolve():
        raise ValueError(f"{project.display_path(place)} is where the run lies. Give another folder with --runs.")
    os.environ["THAW_RUNS"] = str(place)
    recipe = manifest.recipe_of(before, place / f"{before['name']}.yaml", overrides)
    terminal.run(recipe, console, rebuild="all" if (second / manifest.FILE).is_file() else "")
    same, sentences = manifest.results(first, second)
    changed = manifest.differences(before, manifest.read(second))
    console.print("\n".join([*sentences, *(f"Differs: {line}" for line in changed or ["nothing"])]), markup=False)
    if not same:
        raise typer.Exit(1)


@app.command("ls", rich_help_panel=LOOK)
def list_runs() -> None:
    """List the runs, the newest last: date, size, stages that are done, headline."""
    from helpers.cli import terminal

    terminal.show_runs(console)


@app.command(rich_help_panel=MAINTAIN)
def clean(yes: Annotated[bool, typer.Option("--yes", help="Remove it without asking.")] = False) -> None:
    """Remove what no run needs: stages without a run, interrupted ones, caches; lists them with their sizes first."""
    from helpers.pipeline import housekeeping

    folder = project.runs_folder()
    if busy := housekeeping.busy(folder):
        raise ValueError(f"A `thaw run` is making {', '.join(busy)}. Clean when it has ended.")
    leftovers = housekeeping.leftovers(folder)
    for leftover in leftovers:
        console.print(f"{leftover.size / 1e6:10,.1f} MB  {leftover.paths[0].name}  ({leftover.kind})", markup=False)
    if not leftovers:
        console.print("Every file belongs to a run.")
    elif yes or typer.confirm(f"Remove {len(leftovers)} things, {sum(item.size for item in leftovers) / 1e6:,.1f} MB?"):
        console.print(f"{housekeeping.remove(folder, leftovers) / 1e6:,.1f} MB removed.")


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("[", r"\[")


def entry() -> None:
    """Run the command line: an expected error is one clear message and exit code 1, Ctrl-C 130, SIGTERM 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            console.print("\nInterrupted. Nothing is lost: the same command resumes here.", style="yellow")
        raise
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("THAW_DEBUG"):
            raise
        console.print(_advised(error), style="red", markup=False)
        sys.exit(1)


def _advised(error: Exception) -> str:
    full = isinstance(error, OSError) and disk.is_full(error)
    stopped = [f"Stopped: {disk.full(project.runs_folder())}"] if full else []
    return "\n".join([str(error), *stopped, *getattr(error, "__notes__", [])])


if __name__ == "__main__":
    entry()
