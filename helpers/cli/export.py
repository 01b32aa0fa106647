"""`thaw export`: notebook 07 on a finished run, kept in the store like every other stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from helpers.cli import terminal
from helpers.core import disk, notebooks, project, stages, words
from helpers.pipeline import chain, planning

STAGE = "export"
CUT = "crop"  # replaces the stage whose raw files 07 reads


def run(text: str, changes: Mapping[str, Any], console: Console) -> Path:
    """Export a run as it is and return the folder of the bundle.

    Args:
        text: the run, such as runs/elpv.
        changes: parameters of 07 that differ from its own.
        console: where progress is shown.

    Raises:
        FileNotFoundError: the run lacks a stage that 07 reads.
        RecipeError: a parameter is wrong.
        planning.StageError: the notebook failed, such as for a format that does not predict the same.
    """
    step = _step(project.run_folder(text), changes)
    for event in chain.make([step], **terminal.following(console)):
        terminal.show_made(event, console)
    from helpers.reports import report

    report.build_report(step.link.parent)
    return step.link / "bundle"


def parameters(formats: str, serve: bool, overrides: list[str] | None) -> dict[str, Any]:
    """Return the parameters of 07 that the command line sets.

    Raises:
        RecipeError: an override is not PARAMETER=VALUE.
    """
    values: dict[str, Any] = {"formats": [part.strip() for part in formats.split(",")]} if formats else {}
    values |= {"serve": True} if serve else {}
    for text in overrides or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise notebooks.RecipeError(f"--set {text}: expected PARAMETER=VALUE, such as checked=100.")
        values[name.removeprefix(f"{STAGE}.")] = notebooks.yaml().load(value)
    return values


def _step(folder: Path, changes: Mapping[str, Any]) -> planning.Step:
    stage = notebooks.stages()[STAGE]
    if unknown := [name for name in changes if name not in stage.settings]:
        raise notebooks.RecipeError(f"07 has no {unknown[0]!r}.{words.did_you_mean(unknown[0], stage.settings)}")
    values = {name: p.default for name, p in stage.settings.items()} | {"title": folder.name} | dict(changes)
    if wrong := notebooks.problems(stage, values):
        raise notebooks.RecipeError("\n".join(wrong))
    replaced = notebooks.stages()[CUT].replaces if stages.status(folder / CUT) == "done" else ""
    made_by = {name: CUT if source == replaced else source for name, source in stage.inputs.items()}
    inputs = {name: folder / source for name, source in made_by.items()}
    for path in inputs.values():
        if stages.status(path) != "done":
            raise FileNotFoundError(
                f"{project.display_path(folder)} has no finished {path.name}, which the export reads. Make it with"
                " `thaw run`."
            )
    fingerprints = {path.name: _fingerprint(path) for path in inputs.values()}
    folders = {name: path.resolve() for name, path in inputs.items()}
    return planning.alone(stage, values, fingerprints, folder / STAGE, input_folders=folders)


def _fingerprint(folder: Path) -> str:
    """Return the fingerprint of a stage; of one made by hand, the hash of its record."""
    return disk.read_json(folder / stages.STAGE_FILE).get("fingerprint") or disk.sha256_of(folder / stages.STAGE_FILE)
