"""The chain of notebooks and the store that keeps their results.

A stage's result depends only on the notebook's code, the helper modules that it imports, its parameters and its
inputs. The fingerprint of these four names a folder in `runs/.store`. A run, `runs/<name>`, is a folder of relative
links into the store, so runs share what they have in common and a stage is never computed twice or overwritten.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from helpers.core import disk, notebooks, project, stages
from helpers.data import inventory
from helpers.pipeline import fingerprints, recipes, store

REBUILD = "requested with --rebuild"

State = Literal["done", "to do", "by hand"]


class StageError(RuntimeError):
    """A stage failed; the message says where, why, and how to resume."""


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
        """Return the folder in which the stage is made before it is renamed to `folder`."""
        return self.folder.with_name(self.folder.name + ".partial")


def alone(
    stage: notebooks.Stage,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, Any],
    link: Path,
    *,
    input_folders: Mapping[str, Path] | None = None,
    places: Mapping[str, Any] | None = None,
) -> Step:
    """Return one notebook, outside any chain, as a step that the store keeps like a stage.

    Args:
        stage: the notebook.
        parameters: those that decide its result.
        inputs: what else does, such as fingerprints of what it reads.
        link: where the result is linked to.
        input_folders: the folders that its parameters name, by parameter.
        places: parameters that name folders and decide nothing.
    """
    ingredients = {"parameters": dict(parameters), "code": fingerprints.code_of(stage.notebook), "inputs": dict(inputs)}
    fingerprint = fingerprints.fingerprint(ingredients)
    folder = project.runs_folder() / ".store" / f"{stage.name}-{fingerprint}"
    is_made = (folder / stages.STAGE_FILE).is_file()
    return Step(
        stage=stage,
        parameters={**parameters, **(places or {})},
        ingredients=ingredients,
        fingerprint=fingerprint,
        folder=folder,
        link=link,
        state="done" if is_made else "to do",
        why="done" if is_made else "not made yet",
        input_folders=dict(input_folders or {}),
    )


def plan(recipe: recipes.Recipe, rebuild: str = "") -> list[Step]:
    """Return, without running anything, what every stage of `recipe` needs.

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
    store_folder, parameters = project.runs_folder() / ".store", recipe.resolved(name)
    inputs = {p: before[made_by] for p, made_by in stage.inputs.items()}
    ingredients: dict[str, Any] = {
        "parameters": {n: value for n, value in parameters.items() if n not in fingerprints.DECIDE_NOTHING},
        "code": fingerprints.code_of(stage.notebook),
        "inputs": {step.stage.name: step.fingerprint for step in inputs.values()},
    }
    if files := _named_files(name, parameters):
        ingredients["files"] = files
    if not inputs:
        remembered = store_folder / "hashes.json" if disk.is_writable(store_folder) else None
        ingredients["source"] = inventory.source_fingerprint(parameters, remembered)
    fingerprint = fingerprints.fingerprint(ingredients)
    folder, link = store_folder / f"{name}-{fingerprint}", run / name
    state, why = ("to do", REBUILD) if again else _state(folder, link, ingredients, recipe)
    if state == "by hand":
        hashes = {name: sha256 for name, (_, _, sha256) in store.contents(link).items()}
        folder, fingerprint = link, fingerprints.fingerprint(hashes)
    folders = {p: step.folder for p, step in inputs.items()}
    return Step(stage, parameters, ingredients, fingerprint, folder, link, state, why, folders)


def _named_files(stage: str, parameters: dict[str, Any]) -> dict[str, str]:
    """Return the hash of each file that a parameter names, such as weights; of a stage's folder, that of its record.

    `from_run` names a run whose result of the same stage is taken over, `runs` names runs whose models are read.
    """
    paths = {name: project.resolve(value) for name, value in parameters.items() if isinstance(value, str) and value}
    with suppress(FileNotFoundError):  # `checks.check` reports what is missing
        if from_run := parameters.get("from_run"):
            paths["from_run"] = stages.of_run(from_run, stage, "model.keras", parameter=f"{stage}.from_run")
    for run in parameters.get("runs", []):
        stage_names = [other.name for other in notebooks.stages().values() if other.trains or other.replaces]
        paths |= {f"runs: {run}/{name}": project.run_folder(run) / name for name in stage_names}
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
        return "to do", "was interrupted; it resumes"
    return "to do", _why_stale(link, ingredients)


def _why_stale(link: Path, ingredients: dict[str, Any]) -> str:
    """Return what differs from the stage that the run last linked to."""
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
    listed = reasons[:4] + ([f"and {len(reasons) - 4} more"] if len(reasons) > 4 else [])
    return "; ".join(listed) or "not made yet"


def _is_flat(code: dict[str, str]) -> bool:
    """Return whether a stage was made before the modules of helpers/ had departments."""
    modules = [name for name in code if name.startswith("helpers.")]
    return bool(modules) and all(name.count(".") == 1 for name in modules)


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
    """Take the links of stages that are to be made again out of the run; what they lead to stays in the store."""
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


def _shown(recipe: recipes.Recipe) -> str:
    return project.display_path(recipe.path) if recipe.path else recipe.name
