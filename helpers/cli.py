"""The command `thaw`. It never loads TensorFlow itself, except to predict and to review labels."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from helpers import recipes, runs

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
WIDE = 200  # columns of a table that goes into a file or a pipe
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
INTERRUPTED = 130  # the exit code that typer makes of Ctrl-C

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/elpv.yaml.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="STAGE.PARAMETER=VALUE", help="Change a parameter; may be repeated."),
]
Name = Annotated[str, typer.Option(help="Name of the run, in place of the recipe's.")]


@app.callback()
def main() -> None:
    """Thaw: transfer learning for image classification, from a folder of images to an honest report."""


@app.command()
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
    dry_run: Annotated[bool, typer.Option(help="Only say which stages would run, and why.")] = False,
) -> None:
    """Run every stage of RECIPE that is not done yet, and write the report."""
    from helpers import terminal

    loaded = recipes.load(recipe, overrides, name)
    rebuild = rebuild if rebuild in ("", "all") else recipes.find_stage(rebuild).name
    between = [recipes.find_stage(stage).name if stage else "" for stage in (first, last)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    terminal.run(loaded, console, *between, rebuild=rebuild, dry_run=dry_run)


@app.command()
def show(recipe: RecipeFile, overrides: Set = None, name: Name = "") -> None:
    """Show every parameter of RECIPE as it would be in force, and how far each stage is."""
    from helpers import pipeline

    loaded = recipes.load(recipe, overrides, name)
    table = Table("stage", "parameter", "value", "state", box=None, pad_edge=False)
    for step in pipeline.plan(loaded):
        rows = [(p, _text(value)) for p, value in step.parameters.items()] or [("", "")]
        given = loaded.stages.get(step.stage.name, {})
        for number, (parameter, value) in enumerate(rows):
            style = "bold" if parameter in given else ""
            state = (step.state if step.why == step.state else f"{step.state}: {step.why}") if not number else ""
            table.add_row(step.stage.name if not number else "", parameter, value, state, style=style)
    console.print(table)
    console.print("Bold: set by the recipe. The other values are the notebooks' own.", style="dim")


@app.command()
def params(
    stage: Annotated[str, typer.Argument(help="A stage, its notebook or its number: head, 03_train_head, 03.")],
) -> None:
    """Explain the parameters of a stage, read from its notebook."""
    found = recipes.find_stage(stage)
    table = Table("parameter", "type", "default", "meaning", box=None, pad_edge=False)
    for p in found.parameters.values():
        table.add_row(
            p.name, p.type_text.replace("[", r"\["), _text(p.default), f"{p.meaning} {p.allowed}".replace("[", r"\[")
        )
    console.print(f"[bold]{found.name}[/] (notebooks/{found.notebook.name})")
    console.print(table)


@app.command("backbones")
def list_backbones() -> None:
    """List the backbones, with the size in pixels of the images that their ImageNet weights were trained on."""
    from helpers import backbones

    for name in backbones.names():
        console.print(f"{name:<32} {backbones.spec(name).size or ''}", markup=False)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the recipe and of its run.")],
    source: Annotated[str, typer.Argument(help="A folder of images, or the name of a built-in data set.")],
) -> None:
    """Write recipes/NAME.yaml for your images, filled in from what is found and with every parameter explained."""
    from helpers import starter

    console.print(starter.write_recipe(name, source))


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="A run, e.g. runs/elpv.")],
    images: Annotated[list[Path], typer.Argument(help="Images, or folders that are searched for images.")],
    csv: Annotated[Path | None, typer.Option(help="Write the predictions to this CSV file.")] = None,
    columns: Annotated[
        str, typer.Option(metavar="A,B,...", help="Columns of the CSV as a competition asks for them: image, class ...")
    ] = "",
) -> None:
    """Classify IMAGES with the model of RUN."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from helpers import labels, prediction

    if columns and not csv:
        raise ValueError("--columns says how the CSV is to be written: give --csv FILE too.")
    table, unreadable = prediction.predict(run, images)
    for path, predicted, confidence in zip(table["path"], table["predicted"], table["confidence"], strict=True):
        console.print(f"{path}  {predicted}  {confidence:.3f}", markup=False)
    for path, reason in unreadable.items():
        console.print(f"{path}  not read: {reason}", style="yellow", markup=False)
    if csv:
        written = labels.submission(table, columns.split(",")) if columns else table
        runs.write_text(csv, written.to_csv(index=False))
        console.print(f"Written: {csv}", markup=False)
    if unreadable:
        raise typer.Exit(1)


@app.command()
def review(
    run: Annotated[str, typer.Argument(help="A run whose phase 1 is done, e.g. runs/elpv.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; review.html of the run by default.")] = None,
    folds: Annotated[int, typer.Option(help="Of the cross-validation that judges the labels.")] = 5,
) -> None:
    """Write a page that shows the labels of RUN that look wrong, on which to put them right."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from helpers import review as pages

    path, found = pages.build(run, out, folds=folds)
    console.print(f"Written: {runs.display_path(path)}: {found}", markup=False)
    console.print("Open it in a browser; its button saves fixes.csv, which explore.fixes lays over the source.")


@app.command()
def board(port: Annotated[int, typer.Option(help="Port on this machine.")] = 6006) -> None:
    """Open TensorBoard for all runs."""
    from helpers import pipeline

    logs = sorted(pipeline.runs_folder().glob("*/*/logs"))
    if not logs:
        raise FileNotFoundError("No run has TensorBoard logs yet. Run `thaw run recipes/elpv.yaml` first.")
    spec = ",".join(f"{path.parts[-3]}/{path.parts[-2]}:{path.resolve()}" for path in logs)
    subprocess.run([sys.executable, "-m", "tensorboard.main", f"--logdir_spec={spec}", f"--port={port}"], check=False)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("[", r"\[")


def entry() -> None:
    """Run the command line: an expected error is one clear message and exit code 1, Ctrl-C is exit code 130."""
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            console.print(
                "\nInterrupted. Nothing is lost: the same command goes on where this one stopped.", style="yellow"
            )
        raise
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("THAW_DEBUG"):
            raise
        console.print(str(error), style="red", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    entry()
