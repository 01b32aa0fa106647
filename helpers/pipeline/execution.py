"""One stage made: by one process at a time, by papermill, in a folder beside the place where it will be kept.

After any end of a run, a kill or a full disk too, the same command resumes it.
"""

import errno
import json
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from helpers.core import disk, machine, progress, project, stages
from helpers.core.mended import jsonschema
from helpers.pipeline import fingerprints, kernels, planning, store
from helpers.pipeline.planning import StageError, Step

try:
    import fcntl
except ImportError:  # Windows, whose kernels end with their parent
    fcntl = None

Watch = Callable[[dict[str, Any]], None]

KERNEL = "kernel-"  # begins the names of the folders in the store that serve a running kernel
NEARLY_FULL = 10_000_000  # bytes
NO_SPACE = re.compile(r"No space left|[Ee]rrno(:| =)? (27|28|122)\b|Disk quota exceeded|File too large")


def make(
    step: Step,
    watch: Watch,
    say: Callable[[str], None],
    run: Callable[[Step, Watch, TextIO], None] | None = None,
) -> float:
    """Make one stage, or wait for another `thaw run` that is making it; return the seconds it took.

    Args:
        step: what to make.
        watch: called with each line of progress (see `progress.report`).
        say: called with each message for the user.
        run: what runs the notebook instead of `execute`.

    Raises:
        StageError: a cell failed or the kernel died. The unfinished stage is kept, so that the next try resumes there.
    """
    start = time.monotonic()
    try:
        with _alone(step, say):
            made_meanwhile = step.why != planning.REBUILD and (step.folder / stages.STAGE_FILE).is_file()
            if not made_meanwhile or store.dangling_link(step.folder):
                disk.check_disk(step.folder.parent)
                _make(step, watch, say, run)
        planning.link_stage(step)
    except OSError as error:
        if not disk.is_full(error):
            raise
        raise StageError(f"{step.stage.name} stopped: {disk.full(step.folder.parent)}") from None
    return time.monotonic() - start


@contextmanager
def _alone(step: Step, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other `thaw run` is making this stage, and keep others from it."""
    lock = FileLock(step.folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another thaw run is making {step.stage.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(step: Step, watch: Watch, say: Callable[[str], None], run: Callable | None) -> None:
    """Make one stage in its partial folder and keep it."""
    start = time.monotonic()
    log, executed = step.partial.with_suffix(".log"), step.partial.with_suffix(".ipynb")
    with open(log, "a", encoding="utf-8") as stream:
        wait_for_orphan(stream, say)
        if step.why == planning.REBUILD or stages.status(step.partial) == "foreign":
            disk.discard(step.partial)
        if not is_executed(step):
            (run or execute)(step, watch, stream)
    if executed.exists():  # else a run that was killed right after had moved it
        executed.replace(step.partial / "notebook.ipynb")
    kept_log = step.partial / "notebook.log"
    log.replace(kept_log) if log.stat().st_size or not kept_log.exists() else log.unlink()
    record = {"stage": step.stage.name, "fingerprint": step.fingerprint, "ingredients": step.ingredients}
    seconds = round(time.monotonic() - start, 1)
    record |= {"shown_by": fingerprints.shown_by(step.stage.notebook)}
    store.keep(step.partial, step.folder, record | {"seconds": seconds, "hardware": machine.hardware()})


def wait_for_orphan(stream: TextIO, say: Callable[[str], None]) -> None:
    """Wait for the kernel of a `thaw run` that was killed: it notices, but still writes for a moment.

    A kernel's output goes to the stage's log, and it inherits the lock on that open file, which ends with its last
    holder.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("the kernel of a run that was killed is still ending; waiting for it")
        fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system without locks
            raise


def is_executed(step: Step) -> bool:
    """Return whether the notebook of an interrupted run ran to its end, so that the stage only needs to be kept."""
    if stages.status(step.partial) != "done":
        return False
    if (step.partial / "notebook.ipynb").is_file():
        return True
    try:
        cells = disk.read_json(step.partial.with_suffix(".ipynb"))["cells"]
    except (OSError, ValueError):  # killed while it was written
        return False
    return all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")


def execute(
    step: Step,
    watch: Watch,
    stream: TextIO,
    *,
    variables: Mapping[str, str] | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
    forks: kernels.Forks | None = None,
) -> None:
    """Run the notebook by papermill into the partial folder; what its kernel prints goes to `stream`.

    Args:
        variables: of the kernel's environment, beside those of this process.
        is_wanted: called every second; the kernel is killed when it returns False.
        forks: where the kernel is forked if they are ready; None for an ordinary process.

    Raises:
        StageError: as `make`.
    """
    jsonschema.correct()
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    # When Ctrl-C ends the kernel, asyncio would complain about a task of papermill that nothing awaits any more.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    executed = step.partial.with_suffix(".ipynb")
    folders = {name: project.display_path(path) for name, path in step.input_folders.items()}
    parameters = step.parameters | folders | {"out": project.display_path(step.partial)}
    # All is written by then, and TensorFlow would take 1.5 s to end. Of several ranks none hurries: one that fails
    # because another died should not be the first to report it.
    shutdown = "graceful" if variables else "immediate"
    with _kernel_environment(step.folder.parent, watch, variables or {}), _killed_unless(is_wanted) as process_groups:
        try:
            papermill.execute_notebook(
                step.stage.notebook,
                executed,
                parameters,
                kernel_name="python3",
                cwd=str(project.ROOT),
                progress_bar=False,
                stdout_file=stream,
                stderr_file=stream,
                start_timeout=180,
                shutdown_kernel=shutdown,
                kernel_manager_class=kernels.manager(stream, process_groups, forks),
            )
        except PapermillExecutionError as error:
            # Its index counts from 0, but also the cell that papermill put in after the parameters cell.
            cell = f"cell {error.cell_index}, {error.ename}: {error.evalue.strip()}"
            cause = f"{cell}\n  {disk.full(step.folder.parent)}" if NO_SPACE.search(error.evalue) else cell
            raise StageError(_failure(step, cause, "\n".join(error.traceback))) from None
        except DeadKernelError:
            if not is_wanted():
                raise StageError("it was stopped with the others") from None
            raise StageError(_failure(step, _why_it_died(step))) from None
    if stages.status(step.partial) != "done":
        raise StageError(_failure(step, "it ended without stages.finish in its last cell"))


def _why_it_died(step: Step) -> str:
    if shutil.disk_usage(step.folder.parent).free < NEARLY_FULL:
        return f"its kernel died: {disk.full(step.folder.parent)}"
    return (
        "its kernel died, most often because memory ran out"
        f" (free now: {machine.free_memory() / 1e9:.1f} GB). A smaller batch_size or image_size needs less."
    )


@contextmanager
def _killed_unless(is_wanted: Callable[[], bool]) -> Iterator[list[int]]:
    """Yield the list to which the kernel's process group is to be added, to be killed when it is no longer wanted."""
    process_groups: list[int] = []
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(1):
            for group in () if is_wanted() else process_groups:
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield process_groups
    finally:
        finished.set()
        watcher.join()


def _failure(step: Step, cause: str, trace: str = "") -> str:
    """Leave the executed copy in the run's folder; return what happened and how to resume."""
    executed, log = step.partial.with_suffix(".ipynb"), step.partial.with_suffix(".log")
    copy = step.link.parent / step.stage.notebook.name
    with suppress(OSError):  # the disk may be full, and the cause must still be reported
        with open(log, "a", encoding="utf-8") as stream:
            stream.write(trace + "\n")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.unlink(missing_ok=True)
        shutil.copy(executed, copy)
    return (
        f"notebooks/{step.stage.notebook.name} failed: {cause}\n"
        f"  executed copy: {project.display_path(copy)}\n"
        f"  log: {project.display_path(log)}\n"
        "  When the cause is fixed, the same command resumes here."
    )


@contextmanager
def _kernel_environment(store_folder: Path, watch: Watch, variables: Mapping[str, str]) -> Iterator[None]:
    """Make "python3" mean this Python, whether or not the machine has other kernels, and follow its progress."""
    from ipykernel.kernelspec import write_kernel_spec

    place = Path(tempfile.mkdtemp(prefix=KERNEL, dir=store_folder))
    # Without the first, log lines of native libraries would stand in the notebook as if they were errors.
    quiet = ["--IPKernelApp.capture_fd_output=False", "--IPKernelApp.log_level=ERROR"]
    write_kernel_spec(place / "kernels" / "python3", extra_arguments=quiet)
    progress_file = place / "progress.jsonl"
    progress_file.touch()
    search = os.pathsep.join(filter(None, [str(place), os.environ.get("JUPYTER_PATH")]))
    changed = {"JUPYTER_PATH": search, progress.PROGRESS_VARIABLE: str(progress_file), "TF_CPP_MIN_LOG_LEVEL": "2"}
    changed |= variables
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    finished = threading.Event()
    follower = threading.Thread(target=_follow, args=(progress_file, watch, finished), daemon=True)
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


def _follow(progress: Path, watch: Watch, finished: threading.Event) -> None:
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
