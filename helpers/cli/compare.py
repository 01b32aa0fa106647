"""`thaw compare`: notebooks/06_compare.ipynb on finished runs, kept in the store, and its page."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from helpers.cli import terminal
from helpers.core import disk, notebooks, project, stages
from helpers.evaluation import entries
from helpers.pipeline import chain, planning
from helpers.reports import pages

STUDY = "compare"


def run(runs: Sequence[str], console: Console, *, common: bool = False) -> Path:
    """Compare finished runs and write the page of it; both are in the folder of the first run.

    Args:
        runs: names or folders of runs; the others are compared with the first.
        console: where progress and the result are printed.
        common: where the measured images differ, compare on those that all runs have.

    Returns:
        The page, compare.html.

    Raises:
        FileNotFoundError: one of them is not a run that 05_evaluate has measured.
        ValueError: they cannot be compared; the message says why.
    """
    entries.same_images(entries.grouped(entries.read(runs)), common)  # before a kernel is started for nothing
    step = _step(runs, common)
    for event in chain.make([step], **terminal.following(console)):
        terminal.show_made(event, console)
    console.print(disk.read_json(step.link / stages.STAGE_FILE)["headline"], markup=False)
    return pages.of_notebook(step.link / "notebook.ipynb", step.link.parent / "compare.html", "Compare · Thaw")


def _step(runs: Sequence[str], common: bool) -> planning.Step:
    study = notebooks.studies()[STUDY]
    parameters = {name: p.default for name, p in study.settings.items()} | {"runs": list(runs), "common": common}
    fingerprints = {f"run {n}": disk.sha256_of(entries.measured(run) / stages.STAGE_FILE) for n, run in enumerate(runs)}
    return planning.alone(study, parameters, fingerprints, project.run_folder(runs[0]) / study.name)
