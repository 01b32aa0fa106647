"""The chain of notebooks and the store that keeps their results.

A stage's result depends on nothing but the notebook's code, the helper modules that it imports, its parameters and its
inputs. The fingerprint of these four names a folder in `runs/.store`. A run, `runs/<name>`, is a folder of relative
links into the store, so runs share what they have in common and a stage is never computed twice or overwritten.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from filelock import FileLock, Timeout

from helpers import backbones, inventory, recipes, runs, splits, store

REBUILD = "asked for with --rebuild"

State = Literal["done", "to do", "by hand"]


class StageError(RuntimeError):
    """A stage failed; the message says where, why, and how to go on."""


@dataclass(frozen=True)
class Step:
    """One stage of one run: what it is made of, where its result lives, and whether it must be made."""

    stage: recipes.Stage
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


def runs_folder() -> Path:
    """Return the folder of all runs: `runs/` of the project, or $THAW_RUNS."""
    return runs.resolve(os.environ.get("THAW_RUNS", "runs"))


def plan(recipe: recipes.Recipe, rebuild: str = "") -> list[Step]:
    """Work out, without running anything, what every stage of `recipe` needs.

    Args:
        recipe: a checked recipe.
        rebuild: the name of a stage to make again even if it is done, with those after it; "all" for every stage.

    Raises:
        StageError: a stored stage was changed by hand, or a stage made by hand is unfinished.
        ValueError: the source of the images is missing or empty.
    """
    steps: dict[str, Step] = {}
    again = False
    for name in recipes.stages():
        again = again or rebuild in (name, "all")
        steps[name] = _step(recipe, name, steps, again)
    return list(steps.values())


def _step(recipe: recipes.Recipe, name: str, before: dict[str, Step], again: bool) -> Step:
    stage, run = recipes.stages()[name], runs_folder() / recipe.name
    shelf, parameters = runs_folder() / ".store", recipe.resolved(name)
    inputs = {p: before[made_by] for p, made_by in stage.inputs.items()}
    ingredients: dict[str, Any] = {
        "parameters": parameters,
        "code": store.code_of(stage.notebook),
        "inputs": {step.stage.name: step.fingerprint for step in inputs.values()},
    }
    if files := _named_files(parameters):
        ingredients["files"] = files
    if not inputs:
        shelf.mkdir(parents=True, exist_ok=True)
        ingredients["source"] = inventory.source_fingerprint(parameters, shelf / "hashes.json")
    fingerprint = store.fingerprint(ingredients)
    folder, link = shelf / f"{name}-{fingerprint}", run / name
    state, why = ("to do", REBUILD) if again else _state(folder, link, ingredients, recipe)
    if state == "by hand":
        hashes = {name: sha256 for name, (_, _, sha256) in store.contents(link).items()}
        folder, fingerprint = link, store.fingerprint(hashes)
    folders = {p: step.folder for p, step in inputs.items()}
    return Step(stage, parameters, ingredients, fingerprint, folder, link, state, why, folders)


def _named_files(parameters: dict[str, Any]) -> dict[str, str]:
    """Return the hash of each file that a parameter names, such as weights; of a stage's folder, that of its record."""
    paths = {name: runs.resolve(value) for name, value in parameters.items() if isinstance(value, str) and value}
    files = {name: path / runs.STAGE_FILE if path.is_dir() else path for name, path in paths.items()}
    return {name: store.sha256_of(path) for name, path in files.items() if path.is_file()}


def _state(folder: Path, link: Path, ingredients: dict[str, Any], recipe: recipes.Recipe) -> tuple[State, str]:
    if link.is_dir() and not link.is_symlink():
        if runs.stage_status(link) == "done":
            return "by hand", "made by hand; it is used as it is"
        raise StageError(
            f"{runs.display_path(link)} was begun by hand and is not finished. Run its notebook to the end, or"
            f" `thaw run {_shown(recipe)} --rebuild {link.name}` to replace it, or take another --name."
        )
    if (folder / runs.STAGE_FILE).is_file():
        changed = store.changed_files(folder)
        if changed:
            raise StageError(
                f"{runs.display_path(folder)} was changed since it was made ({', '.join(changed[:3])}), so its numbers"
                f" can no longer be trusted. `thaw run {_shown(recipe)} --rebuild {link.name}` makes it again."
            )
        if dangling := store.dangling_link(folder):
            return "to do", f"its images have moved: {runs.display_path(dangling)} leads nowhere"
        return "done", "done"
    if folder.with_name(folder.name + ".partial").is_dir():
        return "to do", "was interrupted; it goes on where it stopped"
    return "to do", _why_stale(link, ingredients)


def _why_stale(link: Path, ingredients: dict[str, Any]) -> str:
    """Say what differs from the stage that the run last linked to."""
    try:
        old = runs.read_json(link / runs.STAGE_FILE)["ingredients"]
    except (OSError, ValueError, KeyError):
        return "its folder is gone" if link.is_symlink() else "not made yet"
    reasons = []
    for key, value in ingredients["parameters"].items():
        if (before := old["parameters"].get(key)) != value:
            reasons.append(f"{key}: {before} -> {value}")
    reasons += [f"{key} changed" for key, value in ingredients["code"].items() if old["code"].get(key) != value]
    reasons += [f"{key} will change" for key, value in ingredients["inputs"].items() if old["inputs"].get(key) != value]
    old_files, files = old.get("files", {}), ingredients.get("files", {})
    reasons += [f"the file that {key} names changed" for key in files if old_files.get(key, files[key]) != files[key]]
    if old.get("source") != ingredients.get("source"):
        reasons.append("the images changed")
    shown = reasons[:4] + ([f"and {len(reasons) - 4} more"] if len(reasons) > 4 else [])
    return "; ".join(shown) or "not made yet"


def make(step: Step, watch: Callable[[dict[str, Any]], None], say: Callable[[str], None]) -> float:
    """Make one stage, or wait for another `thaw run` that is making it; return the seconds it took.

    Args:
        step: what to make.
        watch: called with each line of progress (see `runs.report_progress`).
        say: called with a sentence when there is something to tell.

    Raises:
        StageError: a cell failed or the kernel died. The unfinished stage is kept, so that the next try goes on there.
    """
    step.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(step.folder.with_suffix(".lock"))
    start = time.time()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another thaw run is making {step.stage.name}; waiting for it")
        lock.acquire()
    try:
        if step.why == REBUILD:
            shutil.rmtree(step.partial, ignore_errors=True)
        made_meanwhile = step.why != REBUILD and (step.folder / runs.STAGE_FILE).is_file()
        if not made_meanwhile or store.dangling_link(step.folder):
            store.check_disk(step.folder.parent)
            _execute(step, watch)
            shutil.move(step.partial.with_suffix(".ipynb"), step.partial / "notebook.ipynb")
            step.partial.with_suffix(".log").replace(step.partial / "notebook.log")
            seconds = round(time.time() - start, 1)
            record = {"stage": step.stage.name, "fingerprint": step.fingerprint, "ingredients": step.ingredients}
            store.keep(step.partial, step.folder, record | {"seconds": seconds})
    finally:
        lock.release()
    link_stage(step)
    return time.time() - start


def _execute(step: Step, watch: Callable[[dict[str, Any]], None]) -> None:
    """Run the notebook by papermill into the partial folder."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    # When Ctrl-C ends the kernel, asyncio would complain of a task of papermill that nobody awaits any more.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    executed, log = step.partial.with_suffix(".ipynb"), step.partial.with_suffix(".log")
    folders = {name: runs.display_path(path) for name, path in step.input_folders.items()}
    parameters = step.parameters | folders | {"out": runs.display_path(step.partial)}
    with _kernel_environment(step.folder.parent, watch), open(log, "a", encoding="utf-8") as stream:
        try:
            papermill.execute_notebook(
                step.stage.notebook,
                executed,
                parameters,
                kernel_name="python3",
                cwd=str(runs.ROOT),
                progress_bar=False,
                stdout_file=stream,
                stderr_file=stream,
                start_timeout=180,
                kernel_manager_class=_kernel_that_logs_to(stream),
            )
        except PapermillExecutionError as error:
            trace = "\n".join(error.traceback)
            stream.write(trace + "\n")
            # Its index counts from 0, but also the cell that papermill put in after the parameters cell.
            cell = f"cell {error.cell_index}, {error.ename}: {error.evalue.strip()}"
            raise StageError(_failure(step, executed, log, cell)) from None
        except DeadKernelError:
            cause = "its kernel died, most often because memory ran out"
            raise StageError(_failure(step, executed, log, cause)) from None
    if runs.stage_status(step.partial) != "done":
        raise StageError(_failure(step, executed, log, "it ended without runs.finish_stage in its last cell"))


def _kernel_that_logs_to(stream: TextIO) -> type:
    """Return a kernel manager whose kernel's own output, which is not a cell's, goes to `stream`."""
    from jupyter_client.manager import AsyncKernelManager

    class LoggedKernelManager(AsyncKernelManager):
        async def _async_start_kernel(self, **settings: Any) -> None:
            await super()._async_start_kernel(stdout=stream, stderr=stream, **settings)

        start_kernel = _async_start_kernel

    return LoggedKernelManager


def _failure(step: Step, executed: Path, log: Path, cause: str) -> str:
    """Leave the executed copy in the run's folder and say what happened and how to go on."""
    copy = step.link.parent / step.stage.notebook.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.unlink(missing_ok=True)
    shutil.copy(executed, copy)
    return (
        f"notebooks/{step.stage.notebook.name} failed: {cause}\n"
        f"  executed copy: {runs.display_path(copy)}\n"
        f"  log: {runs.display_path(log)}\n"
        "  When the cause is mended, the same command goes on from here."
    )


def link_stage(step: Step) -> None:
    """Point the run's links to this stage and its notebook at the store; what was made by hand is left alone."""
    if step.state == "by hand":
        return
    step.link.parent.mkdir(parents=True, exist_ok=True)
    if step.link.is_dir() and not step.link.is_symlink():
        shutil.rmtree(step.link)
    store.link(step.link, step.folder)
    store.link(step.link.parent / step.stage.notebook.name, step.link / "notebook.ipynb")


def unlink_stale(steps: list[Step]) -> None:
    """Take the links of stages that are to be made anew out of the run; what they lead to stays in the store."""
    for step in steps:
        if step.state == "to do" and step.link.is_symlink():
            step.link.unlink()
            (step.link.parent / step.stage.notebook.name).unlink(missing_ok=True)


def check_choices(recipe: recipes.Recipe, steps: list[Step]) -> None:
    """Check what no schema can: that the ratios add up, and that the backbone exists and has the layer to unfreeze.

    The last two are asked of Keras, in a process of its own; what was found good is remembered.

    Raises:
        ValueError: something is wrong; the message says what.
    """
    splits.check_ratio(recipe.resolved("split")["ratio"])
    backbones.spec(recipe.resolved("head")["backbone"])
    weights = recipe.resolved("head")["weights"]
    if weights not in ("imagenet", "none") and not runs.resolve(weights).is_file():
        raise recipes.RecipeError(f"head.weights: there is no file {weights}. Give imagenet, none, or a file.")
    if not {step.stage.name for step in steps} & {"head", "fine_tune"}:
        return
    choice = [recipe.resolved("head")["backbone"], json.dumps(recipe.resolved("fine_tune")["unfreeze"])]
    choice.append(str(recipe.resolved("resize")["image_size"]))
    checked = runs_folder() / ".store" / "checked-layers.json"
    code = [store.sha256_of(runs.ROOT / "helpers" / name) for name in ("backbones.py", "models.py")]
    key = store.fingerprint([choice, code])
    good = runs.read_json(checked) if checked.is_file() else []
    if key in good:
        return
    command = [sys.executable, "-m", "helpers.models", "check", *choice]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    found = subprocess.run(command, capture_output=True, text=True, cwd=runs.ROOT, env=environment, check=False)
    if found.returncode:
        raise recipes.RecipeError(f"fine_tune.unfreeze: {found.stdout.strip() or found.stderr.strip()[-2000:]}")
    runs.write_json(checked, [*good, key])


def write_manifest(recipe: recipes.Recipe, steps: list[Step], command: str) -> bool:
    """Write the run's recipe.yaml and manifest.json; return whether anything differs from what they said before."""
    run = runs_folder() / recipe.name
    stages = {step.stage.name: step.fingerprint for step in steps}
    path, resolved, text = run / "manifest.json", run / "recipe.yaml", recipe.as_yaml()
    written = path.is_file() and resolved.is_file() and resolved.read_text(encoding="utf-8") == text
    if written and runs.read_json(path).get("stages") == stages:
        return False
    runs.write_text(resolved, text)
    runs.write_json(path, {"name": recipe.name, "command": command, "stages": stages, "versions": runs.versions()})
    return True


@contextmanager
def _kernel_environment(shelf: Path, watch: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Make "python3" mean this Python whatever kernels the machine has, and follow the progress it reports."""
    from ipykernel.kernelspec import write_kernel_spec

    place = shelf / f"kernel-{os.getpid()}"
    # Without the first, log lines of native libraries would stand in the notebook as if they were errors.
    quiet = ["--IPKernelApp.capture_fd_output=False", "--IPKernelApp.log_level=ERROR"]
    write_kernel_spec(place / "kernels" / "python3", extra_arguments=quiet)
    progress = place / "progress.jsonl"
    progress.touch()
    search = os.pathsep.join(filter(None, [str(place), os.environ.get("JUPYTER_PATH")]))
    changed = {"JUPYTER_PATH": search, runs.PROGRESS_VARIABLE: str(progress), "TF_CPP_MIN_LOG_LEVEL": "2"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    finished = threading.Event()
    follower = threading.Thread(target=_follow, args=(progress, watch, finished), daemon=True)
    follower.start()
    try:
        yield
    finally:
        finished.set()
        follower.join()
        shutil.rmtree(place, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _follow(progress: Path, watch: Callable[[dict[str, Any]], None], finished: threading.Event) -> None:
    with open(progress, encoding="utf-8") as stream:
        unfinished = ""
        while True:
            last = finished.is_set()
            *lines, unfinished = (unfinished + stream.read()).split("\n")
            for line in lines:
                watch(json.loads(line))
            if last:
                return
            finished.wait(0.2)


def _shown(recipe: recipes.Recipe) -> str:
    return runs.display_path(recipe.path) if recipe.path else recipe.name
