"""The chain of notebooks and the store that keeps their results.

A stage's result depends on nothing but the notebook's code, the helper modules that it imports, its parameters and its
inputs. The fingerprint of these four names a folder in `runs/.store`. A run, `runs/<name>`, is a folder of relative
links into the store, so runs share what they have in common and a stage is never computed twice or overwritten.
"""

import importlib
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from helpers.core import disk, notebooks, project, stages
from helpers.data import crop, inventory, links, splits
from helpers.models import backbones, efficientnet_lite
from helpers.pipeline import fingerprints, recipes, store

REBUILD = "asked for with --rebuild"

# Parameters that are checked with Keras; those of the head and of fine_tune together.
CHECKED = ("augmentation", "backbone", "dense", "epochs", "flip", "from_run", "imbalance", "label_smoothing", "loss")
CHECKED += ("mix", "monitor", "next_unfreeze", "optimizer", "output", "profile_steps", "schedule", "steps")
CHECKED += ("stop_smoothed", "unfreeze", "views")
State = Literal["done", "to do", "by hand"]


class StageError(RuntimeError):
    """A stage failed; the message says where, why, and how to go on."""


@dataclass(frozen=True)
class Step:
    """One stage of one run: what it is made of, where its result lives, and whether it must be made."""

    stage: notebooks.Stage
    parameters: dict[str, Any]
    ingredients: dict[str, Any]
    fingerprint: str
    folder: Path
    link: Path
    state: State
    why: str
    input_folders: dict[str, Path]

    @property
    def partial(self) -> Path:
        """The folder in which the stage is made before it is renamed to `folder`."""
        return self.folder.with_name(self.folder.name + ".partial")


def plan(recipe: recipes.Recipe, rebuild: str = "") -> list[Step]:
    """Work out, without running anything, what every stage of `recipe` needs.

    Args:
        recipe: a checked recipe.
        rebuild: the name of a stage to make again even if it is done, with those after it; "all" for every stage.

    Raises:
        StageError: a stored stage was changed by hand, or a stage made by hand is unfinished.
        ValueError: the source of the images is missing or empty, or the recipe leaves out the stage to rebuild.
    """
    if rebuild not in ("", "all", *recipe.chain()):
        raise ValueError(f"The recipe leaves {rebuild} out: it has no section of that name, so nothing can be rebuilt.")
    steps: list[Step] = []
    readable: dict[str, Step] = {}  # by the stage that a notebook names as its input
    again = False
    for name in recipe.chain():
        again = again or rebuild in (name, "all")
        step = _step(recipe, name, readable, again)
        steps.append(step)
        readable[name] = step
        if step.stage.replaces:
            readable[step.stage.replaces] = step
    return steps


def _step(recipe: recipes.Recipe, name: str, before: dict[str, Step], again: bool) -> Step:
    stage, run = notebooks.stages()[name], project.runs_folder() / recipe.name
    shelf, parameters = project.runs_folder() / ".store", recipe.resolved(name)
    inputs = {p: before[made_by] for p, made_by in stage.inputs.items()}
    ingredients: dict[str, Any] = {
        "parameters": parameters,
        "code": fingerprints.code_of(stage.notebook),
        "inputs": {step.stage.name: step.fingerprint for step in inputs.values()},
    }
    if files := _named_files(parameters):
        ingredients["files"] = files
    if not inputs:
        remembered = shelf / "hashes.json" if disk.is_writable(shelf) else None
        ingredients["source"] = inventory.source_fingerprint(parameters, remembered)
    fingerprint = fingerprints.fingerprint(ingredients)
    folder, link = shelf / f"{name}-{fingerprint}", run / name
    state, why = ("to do", REBUILD) if again else _state(folder, link, ingredients, recipe)
    if state == "by hand":
        hashes = {name: sha256 for name, (_, _, sha256) in store.contents(link).items()}
        folder, fingerprint = link, fingerprints.fingerprint(hashes)
    folders = {p: step.folder for p, step in inputs.items()}
    return Step(stage, parameters, ingredients, fingerprint, folder, link, state, why, folders)


def _named_files(parameters: dict[str, Any]) -> dict[str, str]:
    """Return the hash of each file that a parameter names, such as weights; of a stage's folder, that of its record."""
    paths = {name: project.resolve(value) for name, value in parameters.items() if isinstance(value, str) and value}
    with suppress(FileNotFoundError):  # what is missing is told by `check_choices`
        if taken := parameters.get("from_run"):
            paths["from_run"] = stages.of_run(taken, "head", "model.keras", parameter="head.from_run")
    files = {name: path / stages.STAGE_FILE if path.is_dir() else path for name, path in paths.items()}
    return {name: disk.sha256_of(path) for name, path in files.items() if path.is_file()}


def _state(folder: Path, link: Path, ingredients: dict[str, Any], recipe: recipes.Recipe) -> tuple[State, str]:
    if link.is_dir() and not link.is_symlink():
        if stages.status(link) == "done":
            return "by hand", "made by hand; it is used as it is"
        raise StageError(
            f"{project.display_path(link)} was begun by hand and is not finished. Run its notebook to the end, or"
            f" `thaw run {_shown(recipe)} --rebuild {link.name}` to replace it, or take another --name."
        )
    if (folder / stages.STAGE_FILE).is_file():
        changed = store.changed_files(folder)
        if changed:
            raise StageError(
                f"{project.display_path(folder)} was changed since it was made ({', '.join(changed[:3])}), so its"
                f" numbers can no longer be trusted. `thaw run {_shown(recipe)} --rebuild {link.name}` makes it again."
            )
        if dangling := store.dangling_link(folder):
            return "to do", f"its images have moved: {project.display_path(dangling)} leads nowhere"
        return "done", "done"
    if folder.with_name(folder.name + ".partial").is_dir():
        return "to do", "was interrupted; it goes on where it stopped"
    return "to do", _why_stale(link, ingredients)


def _why_stale(link: Path, ingredients: dict[str, Any]) -> str:
    """Say what differs from the stage that the run last linked to."""
    try:
        old = disk.read_json(link / stages.STAGE_FILE)["ingredients"]
    except (OSError, ValueError, KeyError):
        return "its folder is gone" if link.is_symlink() else "not made yet"
    reasons = []
    for key, value in ingredients["parameters"].items():
        if (before := old["parameters"].get(key)) != value:
            reasons.append(f"{key}: {before} -> {value}")
    if _is_flat(old["code"]):
        reasons.append("Thaw's own code was reorganised")
    else:
        reasons += [f"{key} changed" for key, value in ingredients["code"].items() if old["code"].get(key) != value]
    reasons += [f"{key} will change" for key, value in ingredients["inputs"].items() if old["inputs"].get(key) != value]
    old_files, files = old.get("files", {}), ingredients.get("files", {})
    reasons += [f"the file that {key} names changed" for key in files if old_files.get(key, files[key]) != files[key]]
    if old.get("source") != ingredients.get("source"):
        reasons.append("the images changed")
    shown = reasons[:4] + ([f"and {len(reasons) - 4} more"] if len(reasons) > 4 else [])
    return "; ".join(shown) or "not made yet"


def _is_flat(code: dict[str, str]) -> bool:
    """Whether a stage was made before the modules of helpers/ had departments."""
    modules = [name for name in code if name.startswith("helpers.")]
    return bool(modules) and all(name.count(".") == 1 for name in modules)


def dealt_anew(steps: list[Step]) -> str:
    """Tell that old images will change parts, and how to keep them, when the split of changed data has no memory.

    Args:
        steps: as `plan` returns them.

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
    kept = f"data/{split.link.parent.name}_split.csv"
    return (
        "The images or labels have changed since this run was split. The split is dealt anew to keep its shares, so"
        " images move from one part to another, from test to train too. To keep every image where it was:"
        f" cp {project.display_path(earlier)} {kept}, and add --set split.previous={kept}"
    )


def link_stage(step: Step) -> None:
    """Point the run's links to this stage and its notebook at the store; what was made by hand is left alone."""
    if step.state == "by hand":
        return
    step.link.parent.mkdir(parents=True, exist_ok=True)
    if not step.link.is_symlink():
        disk.discard(step.link)
    store.link(step.link, step.folder)
    store.link(step.link.parent / step.stage.notebook.name, step.link / "notebook.ipynb")


def unlink_stale(steps: list[Step]) -> None:
    """Take the links of stages that are to be made anew out of the run; what they lead to stays in the store."""
    for step in steps:
        if step.state == "to do":
            _unlink(step.link, step.stage)


def unlink_left_out(recipe: recipes.Recipe) -> None:
    """Take the links of optional stages that `recipe` leaves out of its run, where it once had them."""
    for name in notebooks.stages().keys() - set(recipe.chain()):
        _unlink(project.runs_folder() / recipe.name / name, notebooks.stages()[name])


def _unlink(link: Path, stage: notebooks.Stage) -> None:
    if link.is_symlink():
        link.unlink()
        (link.parent / stage.notebook.name).unlink(missing_ok=True)


def check_choices(recipe: recipes.Recipe, steps: list[Step], backend: str = "") -> None:
    """Check what no schema can: ratios that add up, boxes that exist, a backbone that has the layer to unfreeze.

    Layers, optimisers, schedules and losses are asked of Keras, in a process of its own; what was found good is
    remembered.

    Args:
        recipe: the recipe.
        steps: what is to be made.
        backend: what Keras will run on, if not what it runs on here.

    Raises:
        ValueError: something is wrong; the message says what.
    """
    splits.check_ratio(recipe.resolved("split")["ratio"])
    _check_previous(recipe)
    if "crop" in recipe.stages:
        crop.check(recipe.resolved("crop"))
    _check_measured(recipe)
    backbones.spec(recipe.resolved("head")["backbone"])
    weights = recipe.resolved("head")["weights"]
    if weights not in ("imagenet", "none") and not project.resolve(weights).is_file():
        raise notebooks.RecipeError(f"head.weights: there is no file {weights}. Give imagenet, none, or a file.")
    if weights == "imagenet" and "head" in {step.stage.name for step in steps}:
        _fetch_weights(recipe.resolved("head")["backbone"])
    if not {step.stage.name for step in steps} & {"head", "fine_tune"}:
        return
    _check_from_run(recipe)
    choices = {stage: recipe.resolved(stage) for stage in ("head", "fine_tune")}
    chosen = [{name: given.get(name) for name in CHECKED} for given in choices.values()]
    choices["image_size"] = recipe.resolved("resize")["image_size"]
    checked = project.runs_folder() / ".store" / "checked-choices.json"
    code = fingerprints.code_of_modules(["helpers.training.checks"])
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | ({"KERAS_BACKEND": backend} if backend else {})
    key = fingerprints.fingerprint([chosen, choices["image_size"], code, environment.get("KERAS_BACKEND", "")])
    good = disk.read_json(checked) if checked.is_file() else []
    if key in good:
        return
    command = [sys.executable, "-m", "helpers.training.checks", json.dumps(choices)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, cwd=project.ROOT, env=environment) as asked:
        for needed in ("papermill", "nbconvert"):  # by the stages and the report; it takes seconds that nobody waits
            importlib.import_module(needed)
        said, complained = asked.communicate()
    if asked.returncode:
        raise notebooks.RecipeError(said.strip() or complained.strip()[-2000:])
    disk.write_json(checked, [*good, key])


def _check_previous(recipe: recipes.Recipe) -> None:
    given, own = recipe.resolved("split")["previous"], project.runs_folder() / recipe.name / "split"
    if given and project.resolve(given) in (own.parent, own, own / "split.csv"):
        kept = f"data/{recipe.name}_split.csv"
        raise notebooks.RecipeError(
            f"split.previous: {given} is this run's own split, which the new one replaces. Keep a copy and name that:"
            f" cp {project.display_path(own)}/split.csv {kept}, then split.previous={kept}"
        )
    links.read_earlier(given)


def _check_measured(recipe: recipes.Recipe) -> None:
    split, part = recipe.resolved("split"), recipe.resolved("evaluate")["part"]
    shares = {"ratio": split["ratio"], "hash": split["ratio"], "fixed": split["counts"]}.get(split["method"])
    if shares and not shares[splits.PARTS.index(part)]:
        raise notebooks.RecipeError(
            f"evaluate.part: {part} would be empty, by split: {list(shares)} for train, val and test. Give it a share,"
            " or measure on validation: evaluate.part=val."
        )
    monitor = recipe.resolved("evaluate")["monitor"]
    for stage in ("head", "fine_tune"):
        given = recipe.resolved(stage)
        trains = given["epochs"] and not given.get("from_run")
        if trains and monitor not in ("val_loss", "val_accuracy", given["monitor"]):
            raise notebooks.RecipeError(
                f"evaluate.monitor: {monitor} is to decide between the phases, but {stage} does not measure it. Set"
                f" {stage}.monitor to {monitor} too, or evaluate.monitor to val_loss or val_accuracy."
            )


def _check_from_run(recipe: recipes.Recipe) -> None:
    taken = recipe.resolved("head")["from_run"]
    if not taken:
        return
    run = project.runs_folder() / recipe.name
    if taken == recipe.name or project.resolve(taken) in (run, run / "head"):
        raise notebooks.RecipeError(f"head.from_run: {taken} is this run itself. Take another --name, or another run.")
    stages.of_run(taken, "head", "model.keras", parameter="head.from_run")


def _fetch_weights(backbone: str) -> None:
    """Fetch ImageNet weights, or say why they cannot be had, in a process of its own and once for each folder of runs.

    Raises:
        FileNotFoundError: they are not on this machine, and there is no network.
    """
    if backbone in efficientnet_lite.SCALES:
        efficientnet_lite.weights_file(backbone)
        return
    known = project.runs_folder() / ".store" / "fetched-weights.json"
    fetched = disk.read_json(known) if known.is_file() else []
    if [backbone, str(backbones.keras_home())] in fetched:
        return
    command = [sys.executable, "-m", "helpers.cli.prefetch", backbone]
    asked = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=project.ROOT, check=False)
    if asked.returncode:
        raise FileNotFoundError(f"head.weights: {asked.stdout.strip()}")
    disk.write_json(known, [*fetched, [backbone, str(backbones.keras_home())]])


def _shown(recipe: recipes.Recipe) -> str:
    return project.display_path(recipe.path) if recipe.path else recipe.name
