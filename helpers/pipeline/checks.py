"""What no schema can check of a recipe, and what a user should know before its first stage starts.

This is the only module of the pipeline that names stages: each check belongs to one, or to what several must agree on.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

from helpers.core import child, disk, notebooks, project, promise, stages, words
from helpers.core.mended import jsonschema
from helpers.data import crop, links, sources, splits
from helpers.models import backbones
from helpers.models.families import family
from helpers.pipeline import fingerprints, planning, recipes

TRAINED = ("head", "fine_tune")  # the stages that are checked with Keras
# Parameters that are checked with Keras; those of the head and of fine_tune together.
CHECKED = ("augmentation", "backbone", "dense", "epochs", "flip", "from_run", "imbalance", "label_smoothing", "levels")
CHECKED += ("loss", "mix", "monitor", "next_unfreeze", "optimizer", "output", "profile_steps", "schedule", "steps")
CHECKED += ("solver", "stop_smoothed", "unfreeze", "views", "adapter")

ADDED = ("group", "format", "width", "height", "mode", "orientation", "taken")  # columns that 00_explore finds


def check(recipe: recipes.Recipe, steps: list[planning.Step], backend: str = "") -> None:
    """Check what no schema can: ratios that add up, boxes that exist, a backbone that has the layer to unfreeze.

    Keras checks layers, optimisers, schedules and losses, in a process of its own; what passes is remembered.

    Args:
        recipe: the recipe.
        steps: what is to be made.
        backend: what Keras will run on, if not what it runs on here.

    Raises:
        ValueError: something is wrong; the message says what.
    """
    stages_of_run, todo = recipe.chain(), {step.stage.name for step in steps}
    for stage, check_stage in CHECKS.items():
        if stage in stages_of_run:
            check_stage(recipe)
    if "explore" in todo:
        _check_subgroups(recipe, sources.read(recipe.resolved("explore")).table)
    if "split" in todo:
        labelled, settings = sources.read(recipe.resolved("explore")).table, recipe.resolved("split")
        splits.rehearse(labelled, settings)
        if todo & set(TRAINED) and not splits.has_validation(labelled, settings):
            raise notebooks.RecipeError(
                "split: there would be no validation part, by which 03 and 04 choose the best epoch. Give it a share,"
                " such as split.ratio=[0.6, 0.15, 0.25], or split.counts=[0, 50, 100] where the method is fixed."
            )
    if "head" in todo and recipe.resolved("head")["weights"] == "imagenet":
        _fetch_weights(recipe.resolved("head")["backbone"])
    if todo & set(TRAINED):
        _check_training(recipe, backend)


def _check_subgroups(recipe: recipes.Recipe, labelled: Any) -> None:
    columns = [*labelled.columns, *ADDED]
    for name in recipe.resolved("evaluate")["subgroups"] if "evaluate" in recipe.chain() else ():
        if name not in columns:
            raise notebooks.RecipeError(
                f"evaluate.subgroups: the source has no column {name!r}.{words.did_you_mean(name, columns)}"
            )


def _check_split(recipe: recipes.Recipe) -> None:
    splits.check_ratio(recipe.resolved("split")["ratio"])
    previous, split_folder = recipe.resolved("split")["previous"], project.runs_folder() / recipe.name / "split"
    if previous and project.resolve(previous) in (split_folder.parent, split_folder, split_folder / "split.csv"):
        copy = f"data/{recipe.name}_split.csv"
        raise notebooks.RecipeError(
            f"split.previous: {previous} is this run's own split, which the new one replaces. Keep a copy and name it:"
            f" cp {project.display_path(split_folder)}/split.csv {copy}, then split.previous={copy}"
        )
    links.read_earlier(previous)


def _check_crop(recipe: recipes.Recipe) -> None:
    crop.check(recipe.resolved("crop"))


def _check_export(recipe: recipes.Recipe) -> None:
    if "crop" in recipe.chain() and (detector := recipe.resolved("crop")["detector"]):
        raise notebooks.RecipeError(
            f"export: no bundle carries a detector, and crop.detector is {detector}. Leave the section export out:"
            " `thaw predict` cuts images as in training. Or train on boxes from a table, crop.boxes; then those who use"
            " the bundle cut their images themselves."
        )


def _check_head(recipe: recipes.Recipe) -> None:
    head = recipe.resolved("head")
    backbones.spec(head["backbone"])
    if head["weights"] not in ("imagenet", "none") and not project.resolve(head["weights"]).is_file():
        raise notebooks.RecipeError(
            f"head.weights: there is no file {head['weights']}. Give imagenet, none, or a file."
        )


def _check_evaluate(recipe: recipes.Recipe) -> None:
    promise.check(recipe.resolved("evaluate")["promise"])
    split, part = recipe.resolved("split"), recipe.resolved("evaluate")["part"]
    shares = {"ratio": split["ratio"], "hash": split["ratio"], "fixed": split["counts"]}.get(split["method"])
    if shares and not shares[splits.PARTS.index(part)]:
        raise notebooks.RecipeError(
            f"evaluate.part: {part} would be empty, by split: {list(shares)} for train, val and test. Give it a share,"
            " or measure on validation: evaluate.part=val."
        )
    monitor = recipe.resolved("evaluate")["monitor"]
    for stage in TRAINED:
        section = recipe.resolved(stage)
        trains = section["epochs"] and not section.get("from_run")
        if trains and monitor not in ("val_loss", "val_accuracy", section["monitor"]):
            raise notebooks.RecipeError(
                f"evaluate.monitor: {monitor} is to decide between the phases, but {stage} does not measure it. Set"
                f" {stage}.monitor to {monitor} too, or evaluate.monitor to val_loss or val_accuracy."
            )


def _check_join(recipe: recipes.Recipe) -> None:
    runs = recipe.resolved("join")["runs"]
    if not runs:
        raise notebooks.RecipeError("join.runs: name the runs to join with this one, as in join.runs=[elpv-2, elpv-3].")
    for run in runs:
        if run == recipe.name or project.resolve(run) == project.runs_folder() / recipe.name:
            raise notebooks.RecipeError(f"join.runs: {run} is this run itself, which is joined anyway.")
        stages.of_run(run, "head", "model.keras", parameter="join.runs")


def _check_from_run(recipe: recipes.Recipe) -> None:
    origin = recipe.resolved("head")["from_run"]
    if not origin:
        return
    run = project.runs_folder() / recipe.name
    if origin == recipe.name or project.resolve(origin) in (run, run / "head"):
        raise notebooks.RecipeError(f"head.from_run: {origin} is this run itself. Take another --name, or another run.")
    stages.of_run(origin, "head", "model.keras", parameter="head.from_run")


def _check_training(recipe: recipes.Recipe, backend: str) -> None:
    """Check everything that trains with Keras, unless the same passed before."""
    _check_from_run(recipe)
    image_size = recipe.resolved("resize")["image_size"]
    phases = {stage: recipe.resolved(stage) for stage in TRAINED}
    decisive = [{name: phase.get(name) for name in CHECKED} for phase in phases.values()]
    code = fingerprints.code_of_modules(["helpers.training.checks"])
    backend = backend or os.environ.get("KERAS_BACKEND", "")
    key = fingerprints.fingerprint([decisive, image_size, code, backend])
    checked = project.runs_folder() / ".store" / "checked-choices.json"
    passed = disk.read_json(checked) if checked.is_file() else []
    if key in passed:
        return
    environment = {"KERAS_BACKEND": backend} if backend else {}
    request = phases | {"image_size": image_size}
    try:
        problems = child.ask(
            "helpers.training.checks", request, environment=environment, meanwhile=_import_what_comes_next
        ).value
    except child.ChildError as error:
        raise notebooks.RecipeError(str(error)) from None
    if problems:
        raise notebooks.RecipeError("\n".join(problems))
    disk.write_json(checked, [*passed, key])


def _import_what_comes_next() -> None:
    jsonschema.correct()
    for package in ("papermill", "nbconvert"):  # of the stages and of the report
        importlib.import_module(package)


def pretrained(argument: str) -> list[str]:
    """Return the backbones whose ImageNet weights are meant: `argument` itself, or those that a recipe needs."""
    if not argument.endswith((".yaml", ".yml")):
        return [backbones.spec(argument).name]
    loaded = recipes.load(argument)
    sections = [loaded.resolved(stage) for stage in loaded.chain()]
    return [backbones.spec(s["backbone"]).name for s in sections if s.get("backbone") and s["weights"] == "imagenet"]


def _fetch_weights(backbone: str) -> None:
    """Fetch ImageNet weights, in a process of its own and once for each folder of runs.

    Raises:
        FileNotFoundError: they are not on this machine, and there is no network.
    """
    if backbones.weights_installed(backbone):
        return
    record = project.runs_folder() / ".store" / "fetched-weights.json"
    fetched = disk.read_json(record) if record.is_file() else []
    if [backbone, str(family.keras_home())] in fetched:
        return
    try:
        child.ask("helpers.models.fetching", {"name": backbone}, shows=True)
    except child.ChildError as error:
        raise FileNotFoundError(f"head.weights: {error}") from None
    disk.write_json(record, [*fetched, [backbone, str(family.keras_home())]])


def warning(steps: list[planning.Step]) -> str:
    """Warn that old images will change parts, and how to keep them, when the split of changed data has no memory.

    Args:
        steps: as `planning.plan` returns them.

    Returns:
        A sentence or two, or "" when every image keeps its part.
    """
    split = next((step for step in steps if step.stage.name == "split" and step.state == "to do"), None)
    if split is None or split.parameters.get("method") != "ratio" or split.parameters.get("previous"):
        return ""
    explore = steps[0]
    try:
        before = disk.read_json(explore.link / stages.STAGE_FILE)["ingredients"]["source"]
        earlier = (split.link / "split.csv").resolve(strict=True)
    except (OSError, ValueError, KeyError):
        return ""
    if before == explore.ingredients.get("source"):
        return ""
    copy = f"data/{split.link.parent.name}_split.csv"
    return (
        "The images or labels have changed since this run was split. The split is made again to keep its shares, so"
        " images move from one part to another, from test to train too. To keep every image where it was:"
        f" cp {project.display_path(earlier)} {copy}, and add --set split.previous={copy}"
    )


# What is checked for the sake of a stage, where the recipe has it.
CHECKS: dict[str, Callable[[recipes.Recipe], None]] = {
    "split": _check_split,
    "crop": _check_crop,
    "head": _check_head,
    "join": _check_join,
    "evaluate": _check_evaluate,
    "export": _check_export,
}
