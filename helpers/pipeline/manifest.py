"""What a run is made of, on record in its manifest.json: to check it, and to make it again somewhere else.

A run needs no passwords and no tokens, so of the environment only the variables named here are recorded.
"""

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from helpers.core import disk, machine, notebooks, project, stages
from helpers.data import inventory
from helpers.pipeline import planning, recipes, store

FILE = "manifest.json"
AGAIN = ".reproduced"  # in the folder of all runs, where `thaw reproduce` works unless it gets another folder
ENVIRONMENT = ("KERAS_BACKEND", "CUDA_VISIBLE_DEVICES", "TF_ENABLE_ONEDNN_OPTS", "TF_XLA_FLAGS", "OMP_NUM_THREADS")
COMPARED = ("accuracy", "balanced_accuracy", "macro_f1", "log_loss")  # of metrics.json
SHOWN = 5  # of the differences of a kind


def write(recipe: recipes.Recipe, steps: list[planning.Step], command: str) -> bool:
    """Write the run's recipe.yaml and manifest.json; return whether their content changed."""
    run = project.runs_folder() / recipe.name
    fingerprints = {step.stage.name: step.fingerprint for step in steps}
    path, resolved, text = run / FILE, run / "recipe.yaml", recipe.as_yaml()
    is_written = path.is_file() and resolved.is_file() and resolved.read_text(encoding="utf-8") == text
    if is_written and disk.read_json(path).get("stages") == fingerprints:
        return False
    disk.write_text(resolved, text)
    content = {
        "name": recipe.name,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": notebooks.read_yaml(resolved),
        "seeds": {step.stage.name: step.parameters["seed"] for step in steps if "seed" in step.parameters},
        "source": steps[0].ingredients.get("source", ""),
        "stages": fingerprints,
        "code": {step.stage.name: step.ingredients["code"] for step in steps},
        "git": _git(),
        "hardware": machine.hardware(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "versions": stages.versions(),
        "packages": machine.packages(),
    }
    disk.write_json(path, content)
    return True


def read(run: Path) -> dict[str, Any]:
    """Return the manifest of a run.

    Raises:
        FileNotFoundError: the folder is not a run, or one that `thaw run` has not finished.
        ValueError: it is damaged, or of an older version that did not record the recipe.
    """
    name = project.display_path(run)
    try:
        content = disk.read_json(run / FILE)
    except OSError:
        raise FileNotFoundError(f"{name} has no {FILE}: it is not a run, or `thaw run` has not finished it.") from None
    except ValueError:
        raise ValueError(f"{name}/{FILE} is damaged: it is not JSON.") from None
    if not isinstance(content, dict) or "recipe" not in content:
        raise ValueError(f"{name}/{FILE} does not hold the recipe. `thaw run` on its recipe writes it again.")
    return content


def verify(run: Path) -> dict[str, list[str]]:
    """Read every recorded file of a run again and return what is wrong, stage by stage, in words.

    Returns:
        Stage -> problems, an empty list where nothing has changed; "source" for the raw images and "run" for the
        run's own files are among the keys.
    """
    manifest = read(run)
    problems = {name: _verify_stage(run / name, fingerprint) for name, fingerprint in manifest["stages"].items()}
    try:
        same = notebooks.read_yaml(run / "recipe.yaml") == manifest["recipe"]
        problems["run"] = [] if same else ["recipe.yaml was changed"]
    except (OSError, ValueError):
        problems["run"] = ["recipe.yaml is missing or damaged"]
    try:
        now = inventory.source_fingerprint(manifest["recipe"][_first()])
        problems["source"] = [] if now == manifest["source"] else ["the images, their labels or the fixes were changed"]
    except (OSError, ValueError) as error:
        problems["source"] = [str(error)]
    return problems


def _first() -> str:
    """Return the stage that reads the raw images: the one without an input."""
    return next(name for name, stage in notebooks.stages().items() if not stage.inputs)


def _verify_stage(link: Path, fingerprint: str) -> list[str]:
    if not link.is_dir():
        return ["it is missing"]
    try:
        record = disk.read_json(link / stages.STAGE_FILE)
    except (OSError, ValueError):
        return [f"{stages.STAGE_FILE} is missing or damaged"]
    if "files" not in record:
        return ["it was made by hand, so no hashes are on record"]
    problems = store.differences(link.resolve())
    return problems if record["fingerprint"] == fingerprint else [*problems, f"it is not the one that {FILE} names"]


def recipe_of(content: dict[str, Any], file: Path, overrides: list[str] | None = None) -> recipes.Recipe:
    """Write the recipe that a manifest holds to `file` and return it, checked against the notebooks as they are now."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return recipes.load(disk.write_json(file, content["recipe"]), overrides)  # JSON is YAML too


def results(run: Path, again: Path) -> tuple[bool, list[str]]:
    """Compare what two runs gave: whether every test image got the same class, and a sentence for each comparison."""
    files = [next(folder.glob("*/predictions.csv"), folder) for folder in (run, again)]
    if missing := [project.display_path(file) for file in files if file.is_dir()]:
        return False, [f"There is nothing to compare: {' and '.join(missing)} holds no predictions.csv."]
    if files[0].read_bytes() == files[1].read_bytes():
        return True, ["The predictions are equal, byte for byte."]
    first, second = (pd.read_csv(file, dtype={"path": str}).set_index("path") for file in files)
    if set(first.index) != set(second.index) or list(first.columns) != list(second.columns):
        return False, ["The test images or the classes are not the same."]
    second = second.loc[first.index]
    same = int((first["predicted"] == second["predicted"]).sum())
    off = (first.select_dtypes("number") - second.select_dtypes("number")).abs().to_numpy().max()
    lines = [f"{same:,} of {len(first):,} test images got the same class; probabilities differ by {off:.2g} at most."]
    before, now = (disk.read_json(file.with_name("metrics.json")) for file in files)
    values = ((name, before[name]["value"], now[name]["value"]) for name in COMPARED)
    lines += [f"{name.replace('_', ' ')}: {old:.6g} -> {new:.6g}" for name, old, new in values if old != new]
    return same == len(first), lines


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return in words how two manifests differ in what may change a result: images, recipe, code, packages, machine."""
    lines = [] if before["source"] == now["source"] else ["the images, their labels or the fixes are not the same"]
    lines += _changes("parameters", *(_parameters(manifest["recipe"]) for manifest in (before, now)))
    code = [
        {part: code for parts in manifest["code"].values() for part, code in parts.items()}
        for manifest in (before, now)
    ]
    changed = [part for part in code[0].keys() | code[1].keys() if code[0].get(part) != code[1].get(part)]
    lines += [f"code: {_few(changed)}"] if changed else []
    for kind in ("git", "packages", "hardware", "environment"):
        lines += _changes(kind, before[kind], now[kind])
    return lines


def _parameters(recipe: dict[str, Any]) -> dict[str, Any]:
    sections = ((stage, section) for stage, section in recipe.items() if stage in notebooks.stages())
    return {f"{stage}.{name}": value for stage, section in sections for name, value in section.items()}


def _changes(kind: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    changed = [f"{name} {before.get(name)} -> {now.get(name)}" for name in sorted(names)]
    return [f"{kind}: {_few(changed)}"] if changed else []


def _few(items: list[str]) -> str:
    more = [f"and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return ", ".join([*sorted(items)[:SHOWN], *more])


def _git() -> dict[str, Any]:
    """Return the commit of the project and whether files differ from it; both None where there is no git."""
    commit, changes = _ask_git("rev-parse", "HEAD"), _ask_git("status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _ask_git(*arguments: str) -> str | None:
    command = ["git", "-C", str(project.ROOT), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
