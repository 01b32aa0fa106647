"""Several hosts: two workers of Dask on this machine train as one process does, and stop, go on and share as promised.

What needs the extra `cluster` is not part of `make test`: `make cluster`, minutes.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import keras
import numpy as np
import pandas as pd
import psutil
import pytest
from test_store import Toys, toys  # noqa: F401

from helpers.compute import ranks
from helpers.core import disk, notebooks, parallel, project
from helpers.data import inventory, links, resizing, sources
from helpers.pipeline import execution, hosts
from helpers.training import profiling

RECIPE = """
name: tiny
explore: {source: %s}
split: {ratio: [0.5, 0.25, 0.25]}
resize: {image_size: 32}
head: {epochs: 8, views: 2, batch_size: 12, dropout: 0.3, imbalance: class_weight}
fine_tune: {unfreeze: block7, epochs: 4, views: 2, batch_size: 12, learning_rate: 1e-4}
"""
LOSSES = ["loss", "accuracy", "val_loss", "val_accuracy"]
WHOLE = ("--name", "whole", "--to", "head", "--set", "head.views=0", "--set", "head.augmentation=none")


# What needs neither Dask nor JAX


def test_ranks_share_whole_batches_and_leave_out_a_remainder(monkeypatch):
    rows, parts = np.arange(100, 122), []
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "replicas", lambda: 4)
    for number in range(2):
        monkeypatch.setattr(ranks, "number", lambda number=number: number)
        parts.append((ranks.of_batches(rows, 8).reshape(-1, 4), ranks.of_all(11)))
    np.testing.assert_array_equal(np.concatenate([parts[0][0], parts[1][0]], axis=1), rows[:16].reshape(2, 8))
    assert sorted([*parts[0][1], *parts[1][1]]) == list(range(8)) and len(parts[0][1]) == len(parts[1][1])


def test_alone_nothing_is_shared():
    np.testing.assert_array_equal(ranks.of_batches(np.arange(7), 4), np.arange(7))
    np.testing.assert_array_equal(ranks.of_all(7), np.arange(7))
    assert (ranks.count(), ranks.number(), ranks.replicas(), ranks.agreed(3)) == (1, 0, 1, 3)


def test_hosts_need_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[cluster\]'"), parallel.connect("tcp://127.0.0.1:1"):
        pass


def test_the_profiler_is_refused_where_jax_trains(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match="profile_steps needs TensorFlow; Keras runs on jax"):
        profiling.check([1, 2])


def test_a_rank_ends_when_its_file_is_gone_or_stands_still(tmp_path):
    file = tmp_path / "it.alive"
    file.touch()
    wanted = hosts.Alive(file, patience=0.2)
    assert wanted()
    time.sleep(0.3)
    assert not wanted()
    os.utime(file, (1, 1))  # by a host with another clock
    assert wanted()
    file.unlink()
    assert not wanted()


def test_a_kernel_that_is_not_wanted_is_killed(toys):  # noqa: F811
    toys.trouble.write_text("import time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)")
    step, begun = toys.plan()["explore"], time.monotonic()

    def run(step, watch, stream):
        execution.execute(step, watch, stream, is_wanted=lambda: time.monotonic() - begun < 4)

    with pytest.raises(execution.StageError, match="it was stopped with the others"):
        execution.make(step, print, print, run)
    assert time.monotonic() - begun < 30


def test_what_a_killed_group_of_ranks_left_is_taken_over(toys):  # noqa: F811
    step = toys.plan()["explore"]
    for name in ("partial", "rank0.partial", "rank1.partial"):
        folder = step.folder.with_name(f"{step.folder.name}.{name}")
        folder.mkdir(parents=True)
        (folder / "which").write_text(name)
    alive = step.folder.with_name(f"{step.folder.name}.0abc{hosts.ALIVE}")
    alive.touch()
    hosts._end(step, print)
    assert (step.partial / "which").read_text() == "rank0.partial"
    assert not alive.exists() and not list(step.folder.parent.glob("*.rank*"))


# What does


class Place:
    """A folder of runs, and the command that works in it."""

    def __init__(self, folder: Path, recipe: Path):
        self.folder, self.recipe, self.run = folder, recipe, folder / "tiny"

    def start(self, *arguments, **environment) -> subprocess.Popen:
        command = [sys.executable, "-m", "helpers.cli.main", *map(str, arguments)]
        settings = os.environ | {"THAW_RUNS": str(self.folder), "COLUMNS": "200"} | environment
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=project.ROOT, env=settings, **streams)

    def thaw(self, *arguments, expect=0, **environment) -> str:
        process = self.start(*arguments, **environment)
        shown, _ = process.communicate(timeout=900)
        assert process.returncode == expect, shown
        assert "Traceback" not in shown
        return shown

    def losses(self, stage: str, name: str = "tiny") -> pd.DataFrame:
        return pd.read_csv(self.folder / name / stage / "history.csv")[LOSSES]

    def epochs(self, stage: str) -> int:
        """How many epochs the first rank has written of a stage that is being made."""
        rows = [
            file.read_text().count("\n") - 1 for file in self.folder.glob(f".store/{stage}-*.rank0.partial/hi*.csv")
        ]
        return max(rows, default=0)

    def wait_for_epochs(self, stage: str, epochs: int, process: subprocess.Popen) -> None:
        while self.epochs(stage) < epochs:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Let the processes of these tests share what XLA compiles: most of their minutes."""
    place = str(tmp_path_factory.mktemp("compiled"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", place)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, image_folder) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    photos = image_folder(folder / "photos", {"disc": 24, "square": 24, "cross": 24})
    (photos / "disc" / "broken.png").write_bytes((photos / "disc" / "disc-00.png").read_bytes()[:200])
    path = folder / "tiny.yaml"
    path.write_text(RECIPE % photos)
    return path


class Cluster:
    """A scheduler on loopback and two workers, as the README says to start them."""

    def __init__(self, folder: Path):
        pytest.importorskip("jax", reason="needs the extra: pip install -e '.[cluster]'")
        pytest.importorskip("distributed", reason="needs the extra: pip install -e '.[cluster]'")
        self.folder, self.processes = folder, []
        file = folder / "scheduler.json"
        self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", file)
        while not file.is_file():
            time.sleep(0.1)
        self.address = disk.read_json(file)["address"]
        for number in range(2):
            self._start(
                "worker", self.address, "--nthreads", "1", "--nworkers", "1", "--local-directory", folder / str(number)
            )
        with parallel.connect(self.address) as client:
            client.wait_for_workers(2, timeout=60)

    def _start(self, *arguments) -> None:
        command = [sys.executable, "-m", "distributed.cli.dask_" + arguments[0], *map(str, arguments[1:])]
        command += ["--dashboard-address", "127.0.0.1:0"]
        with open(self.folder / f"{len(self.processes)}.log", "w") as log:
            self.processes.append(subprocess.Popen(command, cwd=project.ROOT, stdout=log, stderr=log))

    def workers(self) -> list[psutil.Process]:
        """The workers' processes, in the order of the ranks."""
        with parallel.connect(self.address) as client:
            client.wait_for_workers(2, timeout=60)
            return [psutil.Process(pid) for _, pid in sorted(client.run(os.getpid).items())]

    def kill_one_at_work(self) -> tuple[psutil.Process, threading.Event]:
        """Kill the second worker as soon as it has been given a piece of work; return it and what is set when it is."""
        victim, ready, killed = self.workers()[1], threading.Event(), threading.Event()

        def kill() -> None:
            with parallel.connect(self.address) as client:
                (address,) = (name for name, pid in client.run(os.getpid).items() if pid == victim.pid)
                ready.set()
                while not client.processing().get(address):
                    time.sleep(0.002)
                victim.kill()
                killed.set()

        threading.Thread(target=kill, daemon=True).start()
        assert ready.wait(60)
        return victim, killed

    def kernels(self) -> list[psutil.Process]:
        below = [worker.children(recursive=True) for worker in self.workers()]
        return [next(p for p in found if "ipykernel_launcher" in " ".join(p.cmdline())) for found in below]

    def stop(self) -> None:
        for process in reversed(self.processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def two(tmp_path_factory, compiled_once):
    found = Cluster(tmp_path_factory.mktemp("dask"))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, recipe) -> Place:
    """A place where one process on JAX has made the run."""
    place = Place(tmp_path_factory.mktemp("alone"), recipe)
    place.thaw("run", recipe, KERAS_BACKEND="jax")
    return place


@pytest.fixture(scope="module")
def together(tmp_path_factory, recipe, two) -> Place:
    """A place where two ranks have made it."""
    place = Place(tmp_path_factory.mktemp("together"), recipe)
    place.shown = place.thaw("run", recipe, "--hosts", two.address)
    return place


@pytest.mark.cluster
@pytest.mark.parametrize("stage", ["head", "fine_tune"])
def test_two_ranks_train_as_one_process_does(alone, together, stage):
    one, both = (place.losses(stage) for place in (alone, together))
    np.testing.assert_allclose(both, one, atol=2e-4)
    assert one["loss"].iloc[-1] < one["loss"].iloc[0] - 0.01, "or equal losses would prove nothing"
    notebook = (together.run / stage / "notebook.ipynb").read_text()
    assert "2 x the CPU on 2 hosts together" in notebook and "2 views of 36 training images" in notebook


@pytest.mark.cluster
def test_so_they_do_without_a_cache(alone, together, two, recipe):
    alone.thaw("run", recipe, *WHOLE, KERAS_BACKEND="jax")
    together.thaw("run", recipe, *WHOLE, "--hosts", two.address)
    losses = [place.losses("head", "whole") for place in (alone, together)]
    np.testing.assert_allclose(*losses, atol=2e-4)
    assert (
        "There are no banks: the suffix is the whole model."
        in (together.folder / "whole/head/notebook.ipynb").read_text()
    )


@pytest.mark.cluster
def test_the_run_ends_as_any_other(alone, together):
    assert "2 hosts train together" in together.shown and "6/6 evaluate" in together.shown
    first, second = (pd.read_csv(p.run / "evaluate" / "predictions.csv") for p in (alone, together))
    assert list(first["predicted"]) == list(second["predicted"])
    left = [path.name for path in (together.folder / ".store").iterdir()]
    assert not [name for name in left if "rank" in name or name.endswith((".partial", ".alive", ".log", ".ipynb"))]


@pytest.mark.cluster
def test_bulk_stages_give_the_same_files(alone, together):
    for stage in ("explore", "resize"):
        names = [sorted(disk.read_json(p.run / stage / "stage.json")["files"]) for p in (alone, together)]
        assert names[0] == names[1] and len(names[0]) > 3
        for name in names[0]:
            if not name.startswith("notebook"):
                assert (alone.run / stage / name).read_bytes() == (together.run / stage / name).read_bytes(), name


@pytest.mark.cluster
def test_when_a_rank_or_a_worker_is_killed_all_stop_and_the_same_command_goes_on(two, together, recipe, tmp_path):
    place = Place(tmp_path, recipe)
    for stage, epochs, victims, said in [
        ("head", 3, two.kernels, "its kernel died"),
        ("fine_tune", 1, two.workers, "is gone: its worker or its host has ended"),
    ]:
        process = place.start("run", recipe, "--hosts", two.address)
        place.wait_for_epochs(stage, epochs, process)
        kernels, victim, begun = two.kernels(), victims()[1], time.monotonic()
        victim.send_signal(signal.SIGKILL)
        shown, _ = process.communicate(timeout=120)
        seconds = time.monotonic() - begun
        assert process.returncode == 1 and seconds < 30, (seconds, shown)
        assert f"{stage} was stopped on all hosts" in shown and said in shown and "resumes" in shown, shown
        assert not any(kernel.is_running() for kernel in kernels)
        (partial,) = place.folder.glob(f".store/{stage}-*.partial")
        assert len(pd.read_csv(partial / "history.csv")) >= epochs
        print(f"{stage}: stopped {seconds:.1f} s after the kill")
    place.thaw("run", recipe, "--hosts", two.address)
    for stage in ("head", "fine_tune"):
        np.testing.assert_allclose(place.losses(stage), together.losses(stage), atol=1e-6)


@pytest.mark.cluster
def test_when_thaw_run_is_killed_its_ranks_end_and_the_next_goes_on(two, together, recipe, tmp_path):
    place = Place(tmp_path, recipe)
    process = place.start("run", recipe, "--hosts", two.address, "--to", "head")
    place.wait_for_epochs("head", 2, process)
    kernels = two.kernels()
    process.kill()
    process.communicate()
    place.thaw("run", recipe, "--hosts", two.address, "--to", "head")
    assert not any(kernel.is_running() for kernel in kernels)
    np.testing.assert_allclose(place.losses("head"), together.losses("head"), atol=1e-6)


@pytest.mark.cluster
def test_a_killed_worker_costs_bulk_work_nothing(two, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for number in range(120):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), cv2.resize(rng.integers(0, 255, (40, 40, 3), np.uint8), (1600, 1200)))
    monkeypatch.setattr(parallel, "PIECE", 4)
    given = {name: p.default for name, p in notebooks.find_notebook("explore").parameters.items()}
    source = sources.read(given | {"source": str(tmp_path / "photos")})
    table, _ = inventory.take(source)
    split = table.assign(part="train")
    links.write_split(tmp_path / "split", split, source.root)
    how = {"image_size": 224, "fit": "crop"}
    (tmp_path / "local").mkdir()
    resizing.write_images(tmp_path / "local", tmp_path / "split", **how)

    monkeypatch.setenv(project.HOSTS_VARIABLE, two.address)
    for work, target in [
        (lambda: inventory.take(source)[0], None),
        (lambda: resizing.write_images(tmp_path / "shared", tmp_path / "split", **how), tmp_path / "shared"),
    ]:
        if target:
            target.mkdir()
        victim, killed = two.kill_one_at_work()
        result = work()
        assert killed.is_set(), "or a kill after the work would prove nothing"
        victim.wait(60)  # until its nanny has noticed
        if target is None:
            pd.testing.assert_frame_equal(result, table)
    files = sorted(p.relative_to(tmp_path / "local") for p in (tmp_path / "local").rglob("*") if p.is_file())
    assert len(files) > 120
    for file in files:
        assert (tmp_path / "shared" / file).read_bytes() == (tmp_path / "local" / file).read_bytes(), file


@pytest.mark.cluster
def test_prediction_is_shared_too(two, together, recipe, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(recipe.parent / "photos", photos)
    for number in range(12):  # more than one piece
        shutil.copytree(recipe.parent / "photos", photos / str(number))
    written = []
    for name, options in {"local": (), "shared": ("--hosts", two.address)}.items():
        file = tmp_path / f"{name}.csv"
        shown = together.thaw("predict", together.run, photos, "--csv", file, *options, expect=1)
        assert shown.count("broken.png  not read: truncated") == 13
        written.append(file.read_bytes())
    assert written[0] == written[1] and written[0].count(b"\n") == 73 * 13 + 1


@pytest.mark.cluster
def test_what_cannot_be_is_said(two, recipe, tmp_path, monkeypatch):
    place = Place(tmp_path, recipe)
    shown = place.thaw("run", recipe, "--hosts", "tcp://127.0.0.1:1", expect=1)
    assert "No Dask scheduler answers at tcp://127.0.0.1:1" in shown and "dask worker" in shown
    shown = place.thaw("run", recipe, "--hosts", two.address, "--set", "head.profile_steps=[1,2]", expect=1)
    assert "profile_steps needs TensorFlow" in shown
    with parallel.connect(two.address) as client:
        monkeypatch.setattr(hosts, "_version", lambda package: "0.1")
        with pytest.raises(parallel.HostError, match=r"differs from this host: tensorflow \(2\..* there, 0\.1 here\)"):
            hosts.check(client, tmp_path)
    monkeypatch.setattr(os.path, "exists", lambda path: True)  # here
    with pytest.raises(parallel.HostError, match="does not see /nowhere"):
        list(parallel.spread(len, ["piece"], address=two.address, reads=["/nowhere"]))
