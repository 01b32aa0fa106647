"""A training stage made on several hosts together: its notebook runs on each, as the ranks of one training.

Each rank works in a folder of its own beside the stage's, which begins as a copy of what there is, so that all resume
from the same epoch; what the first rank has made is the stage. The ranks continue for as long as `thaw run` touches a
file: when one fails, or the command ends in any way, all end.
"""

import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import urlparse

from helpers.core import disk, notebooks, project
from helpers.core.parallel import START, HostError, connect
from helpers.pipeline import execution, fingerprints, planning
from helpers.pipeline.planning import StageError, Step

if TYPE_CHECKING:
    from distributed import Client

PACKAGES = ("tensorflow", "keras", "jax", "numpy", "opencv-python", "pillow", "distributed")
ALIVE = ".alive"
PATIENCE = 90.0  # seconds without a touch after which ranks end
SECONDS_TO_END = 60  # that ranks get
RESUMES = "When it is back, the same command resumes after the last epoch."


def runner(address: str, stage: str, say: Callable[[str], None]) -> Callable[..., None]:
    """Return what runs a stage's notebook, as `execution.execute` does, with the hosts of a Dask scheduler.

    A stage that trains runs on all of them; of the others, `thaw run` runs the notebook, which spreads its bulk work.
    """
    if notebooks.find_stage(stage).trains:
        return partial(execute, address, say)
    return partial(execution.execute, variables={project.HOSTS_VARIABLE: address})


def execute(address: str, say: Callable[[str], None], step: Step, watch: execution.Watch, stream: TextIO) -> None:
    """Run the notebook of a stage on all hosts together.

    Args:
        address: the Dask scheduler's.
        say: called with each message for the user.
        step, watch, stream: as in `execution.execute`.

    Raises:
        StageError: a rank failed or a host is gone; the unfinished stage is kept.
        HostError: the hosts cannot do it.
    """
    _end(step, say, keep=step.why != planning.REBUILD)
    if execution.is_executed(step):
        return
    with connect(address) as client:
        workers = check(client, step.folder.parent)
        first = _free_address(client, workers[0])
        alive = step.folder.with_name(f"{step.folder.name}.{uuid.uuid4().hex[:8]}{ALIVE}")
        say(f"{len(workers)} hosts train together: {', '.join(workers)}")
        jobs = []
        for number in range(len(workers)):
            if step.partial.is_dir():
                shutil.copytree(step.partial, _rank(step, number).partial)
            jobs.append((_rank(step, number), f"{first}/{len(workers)}/{number}", alive))
        client.subscribe_topic(alive.name, lambda event: watch(event[1]))
        try:
            _together(client, workers, jobs, alive)
        except (StageError, HostError) as error:
            raise StageError(f"{step.stage.name} was stopped on all hosts. {error}") from None
        finally:
            _end(step, say)
    for log in sorted(step.folder.parent.glob(f"{step.folder.name}.rank*.log")):
        stream.write(log.read_text(encoding="utf-8", errors="replace"))
        log.unlink()


def _rank(step: Step, number: int) -> Step:
    return replace(step, folder=step.folder.with_name(f"{step.folder.name}.rank{number}"))


def _end(step: Step, say: Callable[[str], None], keep: bool = True) -> None:
    """End the ranks that a killed `thaw run` left; if `keep`, what the first has done becomes the stage's."""
    beside = step.folder.parent
    for alive in beside.glob(f"{step.folder.name}.*{ALIVE}"):
        alive.unlink(missing_ok=True)
    for log in sorted(beside.glob(f"{step.folder.name}.rank*.log")):
        with open(log, "a", encoding="utf-8") as stream:
            execution.wait_for_orphan(stream, say)
    first = _rank(step, 0).partial
    if keep and first.is_dir():
        disk.discard(step.partial)
        first.rename(step.partial)
        with suppress(FileNotFoundError):
            first.with_suffix(".ipynb").replace(step.partial.with_suffix(".ipynb"))
    for path in beside.glob(f"{step.folder.name}.rank*"):
        if path.is_dir():
            disk.discard(path)
        elif path.suffix != ".log":
            path.unlink()


def run_rank(step: Step, rank: str, alive: Path) -> None:
    """Run the notebook on this host as one of several ranks; called by a worker of Dask.

    Args:
        step: the stage in the rank's own folder.
        rank: see `ranks`.
        alive: the file that is touched as long as the training is wanted.
    """
    from distributed import get_worker

    watch = partial(get_worker().log_event, alive.name) if rank.endswith("/0") else lambda line: None
    variables = {project.RANK_VARIABLE: rank, "KERAS_BACKEND": "jax"}
    with open(step.partial.with_suffix(".log"), "a", encoding="utf-8") as stream:
        execution.wait_for_orphan(stream, lambda text: None)
        execution.execute(step, watch, stream, variables=variables, is_wanted=Alive(alive))


class Alive:
    """Answers a rank: is the training still wanted?

    The file's time is compared with that of an earlier look, never with this host's own clock.
    """

    def __init__(self, path: Path, patience: float = PATIENCE):
        self.path, self.patience, self.touched, self.since = path, patience, 0, time.monotonic()

    def __call__(self) -> bool:
        try:
            touched = self.path.stat().st_mtime_ns
        except OSError:
            return False
        if touched != self.touched:
            self.touched, self.since = touched, time.monotonic()
        return time.monotonic() - self.since < self.patience


def _together(client: "Client", workers: Sequence[str], jobs: Sequence[tuple], alive: Path) -> None:
    """Call run_rank(*jobs[k]) on the k-th worker, all at the same time; when one fails, end all.

    Raises:
        HostError: a worker or the scheduler is gone.
        StageError: the first failure of a rank.
    """
    alive.touch()
    options = {"allow_other_workers": False, "retries": 0, "pure": False}
    tasks = {w: client.submit(run_rank, *job, workers=[w], **options) for w, job in zip(workers, jobs, strict=True)}
    try:
        while not _all_ended(client, tasks):
            time.sleep(1)
            os.utime(alive)
    finally:
        alive.unlink(missing_ok=True)
        connected, end = _workers(client), time.monotonic() + SECONDS_TO_END
        remaining_tasks = [task for worker, task in tasks.items() if worker in connected]
        while time.monotonic() < end and any(task.status == "pending" for task in remaining_tasks):
            time.sleep(0.5)
        client.cancel(list(tasks.values()))


def _all_ended(client: "Client", tasks: Mapping[str, Any]) -> bool:
    """Return whether all ranks have ended without an error."""
    states = {worker: task.status for worker, task in tasks.items()}
    for worker, state in states.items():
        if state == "error":
            error = tasks[worker].exception()
            raise error if isinstance(error, StageError) else HostError(f"{worker}: {type(error).__name__}: {error}")
        if state in ("cancelled", "lost"):
            raise HostError(f"The Dask scheduler is gone. {RESUMES}")
    connected = _workers(client)
    if lost_workers := [worker for worker, state in states.items() if state == "pending" and worker not in connected]:
        raise HostError(f"{lost_workers[0]} is gone: its worker or its host has ended. {RESUMES}")
    return "pending" not in states.values()


def _workers(client: "Client") -> dict[str, Any]:
    try:
        return client.scheduler_info()["workers"]
    except OSError:  # the scheduler has ended
        return {}


def check(client: "Client", folder: Path) -> list[str]:
    """Check that all workers can do the same work, and return their addresses, one a host.

    Args:
        client: of `connect`.
        folder: the folder of all runs, in which a file is written for a moment.

    Raises:
        HostError: there is none, or one has other code, packages or folders, or several threads.
    """
    address = client.scheduler.address
    workers = _workers(client)
    if not workers:
        raise HostError(f"The scheduler {address} has no workers. On every host: `{START.format(address=address)}`.")
    if many := [name for name, about in workers.items() if about["nthreads"] != 1]:
        raise HostError(f"{many[0]} has {workers[many[0]]['nthreads']} threads: `{START.format(address=address)}`.")
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".{socket.gethostname()}.{os.getpid()}{disk.TEMPORARY}"
    mark.touch()
    try:
        facts = client.run(about, str(mark))
    except Exception as error:  # a worker without this project may raise anything
        raise HostError(
            f"A worker does not know this project ({type(error).__name__}: {str(error).splitlines()[0]}). Start it from"
            f" the project's folder, in its environment with the extra cluster: `{START.format(address=address)}`."
        ) from None
    finally:
        mark.unlink()
    own_facts = about(str(mark)) | {"the runs' folder": True}
    for name, worker_facts in sorted(facts.items()):
        if wrong := [key for key in own_facts if own_facts[key] != worker_facts[key]]:
            detail = ", ".join(f"{key} ({worker_facts[key]} there, {own_facts[key]} here)" for key in wrong)
            raise HostError(f"{name} differs from this host: {detail}. All hosts need the same, under the same paths.")
    return sorted(facts)


def about(mark: str) -> dict[str, Any]:
    """Return what must be the same on every host: the project's place and code, packages, whether it sees `mark`."""
    files = sorted([*project.ROOT.glob("helpers/**/*.py"), *project.ROOT.glob("notebooks/*.ipynb")])
    code = fingerprints.fingerprint([(path.name, disk.sha256_of(path)) for path in files])
    facts = {"the project's folder": str(project.ROOT), "the code": code, "the runs' folder": os.path.exists(mark)}
    return facts | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _free_address(client: "Client", worker: str) -> str:
    """Return host:port, free at the moment, of a worker's host."""
    port = client.submit(_free_port, workers=[worker], allow_other_workers=False, pure=False).result(timeout=60)
    return f"{urlparse(worker).hostname}:{port}"


def _free_port() -> int:
    with socket.socket() as free_socket:
        free_socket.bind(("", 0))
        return free_socket.getsockname()[1]
