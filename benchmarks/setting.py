"""What the benchmarks share: the machine in words, PyTorch, real images in any number, and timed runs of Thaw."""

import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from sklearn.model_selection import train_test_split

from helpers.core import notebooks, project
from helpers.data import sources
from helpers.pipeline import execution, planning, recipes

SECONDS_BETWEEN_LOOKS = 0.1
TORCH_PACKAGES = ("torch==2.13.*", "efficientnet-lite-pytorch", "numpy", "pillow")
TORCH_PLACE = project.ROOT / "runs" / ".torch"


def machine() -> str:
    """Return the processor, its cores, the memory and the versions that decide a timing."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    memory = psutil.virtual_memory().total / 2**30
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("tensorflow", "keras"))
    busy = f"load {os.getloadavg()[0]:.1f} at the start"
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, {versions}, {busy}"


def torch_python(path: str = "") -> str:
    """Return a Python that has PyTorch, and print its version.

    Args:
        path: of a Python; "" for that of the benchmarks' own environment, which is made if it is not there.

    Raises:
        SystemExit: it lacks a package.
    """
    if not path and not (TORCH_PLACE / "ready").is_file():
        print(f"Installing PyTorch into {project.display_path(TORCH_PLACE)} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(TORCH_PLACE)], check=True)
        subprocess.run([str(TORCH_PLACE / "bin/python"), "-m", "pip", "install", "-q", *TORCH_PACKAGES], check=True)
        (TORCH_PLACE / "ready").touch()
    python = path or str(TORCH_PLACE / "bin/python")
    command = [python, "-c", "import torch, efficientnet_lite_pytorch, numpy, PIL; print('torch', torch.__version__)"]
    try:
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip(), flush=True)
    except (OSError, subprocess.CalledProcessError) as error:
        cause = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
        raise SystemExit(
            f"--torch {python}: {cause}. Expected a Python with {', '.join(TORCH_PACKAGES)}. Install them there, or"
            " leave --torch out: then the benchmark makes an environment of its own."
        ) from None
    return python


def cells(folder: Path, count: int, seed: int = 0) -> Path:
    """Make a folder of links to `count` solar cells of ELPV, a sub-folder a class, the classes in their own mix.

    Raises:
        ValueError: ELPV has fewer.
    """
    defaults = {name: p.default for name, p in notebooks.find_stage("explore").settings.items()}
    data = sources.read(defaults | {"source": "elpv"})
    table = data.table
    if count > len(table):
        raise ValueError(f"ELPV has {len(table):,} images; {count:,} are requested.")
    if count < len(table):
        kinds = table["label"] + table["type"]
        table, _ = train_test_split(table, train_size=count, random_state=seed, stratify=kinds)
    for row in table.itertuples():
        link = folder / row.label / Path(row.path).name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(data.root / row.path)
    return folder


def recipe(folder: Path, content: dict[str, Any]) -> recipes.Recipe:
    """Write a recipe and load it, checked."""
    path = folder / f"{content['name']}.yaml"
    path.write_text(json.dumps(content))  # YAML, too
    return recipes.load(path)


def s1(folder: Path, source: Path, name: str, *, parts: tuple[int, int, int], epochs: int, views: int, seed: int):
    """Return system S1's recipe on other images, with EfficientNet-Lite0 at 224 pixels.

    Args:
        folder: where the recipe is written.
        source: the images.
        name: of the run.
        parts: images of train, val and test.
        epochs: of each phase; 50 in S1.
        views: augmented versions of each image.
        seed: of the split and of both phases.
    """
    ratio = [part / sum(parts) for part in parts]
    head = {"backbone": "efficientnet_lite0", "next_unfreeze": "block7", "flip": "both"}
    content = {"name": name, "extends": str(project.ROOT / "recipes" / "s1_campus.yaml")}
    content |= {"explore": {"source": str(source)}, "split": {"ratio": ratio, "seed": seed}}
    content |= {"resize": {"image_size": 224}, "head": head | {"epochs": epochs, "views": views, "seed": seed}}
    content |= {"fine_tune": {"unfreeze": "block7", "epochs": epochs, "views": views, "seed": seed}}
    return recipe(folder, content)


def run(
    loaded: recipes.Recipe, until: str = "", watch: Callable[[str, dict], None] = lambda *_: None
) -> dict[str, dict[str, float]]:
    """Run the stages of a recipe that are not done, and return what each took.

    seconds by the clock, processor (seconds of all cores together), and memory_mb (the most of any one process).

    Args:
        loaded: the recipe.
        until: the last stage; all by default.
        watch: called with the stage and each line of its progress.
    """
    measured = {}
    for step in planning.plan(loaded):
        name = step.stage.name
        if step.state == "to do":
            with peak_memory() as peak:
                begin, before = time.time(), processor_seconds()
                execution.make(step, lambda line, name=name: watch(name, line), print)
                measured[name] = {"seconds": time.time() - begin, "processor": processor_seconds() - before}
            measured[name]["memory_mb"] = peak["mb"]
        else:
            planning.link_stage(step)
        if name == until:
            break
    return measured


def processor_seconds() -> float:
    """Return the processor time that this process and all that it started and saw end have taken so far."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Measure the most memory that any one process started from here has held: {"mb": ...} when the block ends."""
    peak, done = {"mb": 0.0}, threading.Event()

    def look() -> None:
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            for process in psutil.Process().children(recursive=True):
                peak["mb"] = max(peak["mb"], peak_of(process.pid))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def peak_of(pid: int) -> float:
    """Return the most memory that a process has held, in MB; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1.024e-3 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # it has ended
        return 0.0
