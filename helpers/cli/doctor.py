"""`thaw doctor`: checks everything that a run needs on this machine, and says how to fix what is missing.

TensorFlow is loaded in a process of its own, since it may crash where the processor or a driver does not fit.
"""

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console

from helpers.core import child, disk, machine, notebooks, project, stages
from helpers.models import backbones
from helpers.models.families import family
from helpers.pipeline import housekeeping, store

CUDA_WHEELS = "install requirements-gpu.lock (`make env LOCK=requirements-gpu.lock`), which brings CUDA and cuDNN"
LIBRARIES = ("libcudart.so.{cuda}", "libcublas.so.{cuda}", "libcusparse.so.{cuda}", "libcudnn.so.{cudnn}")
ERROR_NO_DEVICE, ERROR_MISMATCH = 100, 803  # of cuInit
LEAST_MEMORY = 2_000_000_000  # bytes: TensorFlow, a small network and a batch
UNKNOWN = "driver and libraries are there, and TensorFlow still sees no GPU"
SHOWN = 4


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` says what to do and is empty where nothing is wrong."""

    topic: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class GpuFacts:
    """What decides whether TensorFlow can see an NVIDIA GPU.

    Attributes:
        system: as `platform.system` names it.
        on_bus: a device of NVIDIA is on the PCI bus.
        driver: the kernel's driver: its version, or "".
        nodes: the devices' files are in /dev.
        usable: this user may open them.
        in_container: this process runs in a container.
        hidden: $CUDA_VISIBLE_DEVICES hides every GPU.
        libcuda: the driver's library can be loaded.
        init: what its cuInit returned; 0 is success.
        built_for_cuda: TensorFlow was built for CUDA.
        missing: libraries of CUDA and cuDNN that TensorFlow needs and that are missing.
    """

    system: str = "Linux"
    on_bus: bool = True
    driver: str = "570.00"
    nodes: bool = True
    usable: bool = True
    in_container: bool = False
    hidden: bool = False
    libcuda: bool = True
    init: int = 0
    built_for_cuda: bool = True
    missing: tuple[str, ...] = ()


def show(console: Console) -> int:
    """Print what `examine` finds, and return the number of problems."""
    wrong = 0
    for finding in examine():
        wrong += bool(finding.fix)
        console.print(f"{'WRONG' if finding.fix else 'ok':<6}{finding.topic:<12}{finding.text}", markup=False)
        if finding.fix:
            console.print(f"{'':<18}fix: {finding.fix}", style="yellow", markup=False)
    console.print(f"{wrong} to fix." if wrong else "No problems found.", style="bold")
    return wrong


def examine() -> Iterator[Finding]:
    """Check one thing after another."""
    yield Finding("python", f"{platform.python_version()} in {sys.prefix}; Thaw in {project.ROOT}")
    yield _packages()
    yield from _tensorflow()
    yield _memory()
    yield from _disk()
    yield _weights()
    yield _kernel()
    yield from _store()


def _packages() -> Finding:
    """Compare what is installed with the lock file."""
    locked = dict(_locked(project.ROOT / "requirements.lock"))
    installed = {canonicalize_name(name): version for name, version in machine.packages().items()}
    needed = {canonicalize_name(requirement.name) for requirement in _requirements()}
    others = [f"{name} {installed[name]} ({version})" for name, version in locked.items()
              if name in installed and installed[name] != version]  # fmt: skip
    if absent := sorted(needed - installed.keys()):
        return Finding("packages", f"not installed: {', '.join(absent)}", "pip install --requirement requirements.lock")
    if not locked:
        return Finding("packages", "there is no requirements.lock here to compare with")
    if others:
        listed = ", ".join(others[:SHOWN]) + (f" and {len(others) - SHOWN} more" if len(others) > SHOWN else "")
        return Finding("packages", f"other versions than in requirements.lock (in brackets): {listed}")
    count = len(locked.keys() & installed.keys())
    return Finding("packages", f"{count} installed in the versions of requirements.lock")


def _locked(lock: Path) -> Iterator[tuple[str, str]]:
    """Yield name and version of each package of a lock file that is meant for this Python and system."""
    lines = lock.read_text(encoding="utf-8").splitlines() if lock.is_file() else []
    for line in lines:
        if re.match(r"[\w.-]+==", line):
            requirement = Requirement(line.rstrip(" \\"))
            if requirement.marker is None or requirement.marker.evaluate():
                yield canonicalize_name(requirement.name), next(iter(requirement.specifier)).version


def _requirements() -> list[Requirement]:
    """Return the requirements in pyproject.toml, without the extras."""
    import tomllib

    with open(project.ROOT / "pyproject.toml", "rb") as stream:
        return [Requirement(text) for text in tomllib.load(stream)["project"]["dependencies"]]


# TensorFlow and the devices


def _tensorflow() -> Iterator[Finding]:
    try:
        answer = child.ask("helpers.cli.doctor", {}, environment={"TF_CPP_MIN_LOG_LEVEL": "0"})
    except child.ChildError as error:
        last = (str(error).splitlines() or ["no message"])[-1]
        no_avx = "it ended with SIGILL: the processor has no AVX, which TensorFlow needs"
        fix = no_avx if error.signal == "SIGILL" else "install the packages of the lock again"
        yield Finding("tensorflow", f"cannot be loaded: {last[:300]}", fix)
        yield _gpu_not_seen(gpu_facts())
        return
    report = answer.value
    yield Finding("tensorflow", f"{report['tensorflow']} with Keras {report['keras']} on {report['backend']}")
    for device in report["devices"]:
        name, error = device["name"], device["error"]
        if error:
            fix = f"cuDNN does not work: {CUDA_WHEELS}" if re.search("cudnn|DNN library", error, re.I) else error
            yield Finding(name, f"a convolution fails: {error.splitlines()[0][:200]}", fix)
        else:
            yield Finding(name, f"{device['detail']}a convolution is correct and takes {device['milliseconds']:.2f} ms")
    gpus = sum(device["name"].startswith("GPU") for device in report["devices"])
    if gpus > 1:
        yield Finding("gpus", f"03 and 04 train on all {gpus} together with devices: auto, on one with devices: gpu")
    if not gpus:
        yield _gpu_not_seen(gpu_facts(report), answer.log)


def _gpu_not_seen(facts: GpuFacts, log: str = "") -> Finding:
    text, fix = why_no_gpu(facts)
    reasons = [line.split("] ", 1)[-1] for line in log.splitlines() if "CUDA" in line or "dlopen" in line]
    return Finding("gpu", f"{text}. It reports: {reasons[-1][:300]}" if text == UNKNOWN and reasons else text, fix)


def why_no_gpu(facts: GpuFacts) -> tuple[str, str]:
    """Return why TensorFlow sees no GPU, and how to fix it; the fix is empty where there is no GPU."""
    on_host = " on the host (not in this container)" if facts.in_container else ""
    toolkit = (
        "install the NVIDIA Container Toolkit on the host, then start the container with `--gpus all` (compose: a"
        " reservation of the device)"
    )
    if facts.system != "Linux":
        return f"TensorFlow computes on the CPU on {facts.system}; on Windows, WSL2 can use an NVIDIA GPU", ""
    if not (facts.on_bus or facts.driver or facts.nodes):
        return "no NVIDIA GPU is in this machine, or none is shown to it: everything runs on the CPU", ""
    if facts.hidden:
        return "CUDA_VISIBLE_DEVICES hides every GPU", "`unset CUDA_VISIBLE_DEVICES`, or name the GPU: 0"
    if not facts.driver:
        return (
            "there is a GPU, but no driver is loaded",
            f"install the NVIDIA driver{on_host}, then restart the machine",
        )
    if not facts.nodes and facts.in_container:
        return "the host has a GPU, but the container was started without it", toolkit
    if not facts.nodes:
        return "the driver is loaded, but /dev/nvidia0 is missing", "run `sudo nvidia-modprobe -u -c=0`, or restart"
    if not facts.usable:
        return "this user may not open /dev/nvidia0", f"add the user to the group that owns it{on_host}"
    if not facts.libcuda and facts.in_container:
        return "the container lacks the driver's library libcuda.so.1", (
            f"set NVIDIA_DRIVER_CAPABILITIES=compute,utility; if that does not help, {toolkit}"
        )
    if not facts.libcuda:
        return "the driver's library libcuda.so.1 is missing", "install the driver's CUDA part (Debian: libcuda1)"
    if facts.init == ERROR_MISMATCH:
        return "the driver in the kernel and its library are of different versions", f"restart the machine{on_host}"
    if facts.init == ERROR_NO_DEVICE:
        return "the driver finds no GPU that it can use", f"see what `nvidia-smi` says{on_host}"
    if facts.init:
        return (
            f"the driver cannot start (CUDA error {facts.init})",
            f"restart the machine{on_host}; else a newer driver",
        )
    if not facts.built_for_cuda:
        return "this TensorFlow was built without CUDA", CUDA_WHEELS
    if facts.missing:
        return f"libraries are missing: {', '.join(facts.missing)}", CUDA_WHEELS
    return UNKNOWN, f"install a driver of 2024 or later{on_host}; if it is one: {CUDA_WHEELS}"


def gpu_facts(report: dict[str, Any] | None = None) -> GpuFacts:
    """Return the facts that `why_no_gpu` needs; `report` is what TensorFlow reports about itself."""
    driver = Path("/proc/driver/nvidia/version")
    nodes = [path for path in (Path("/dev/nvidia0"), Path("/dev/dxg")) if path.exists()]  # the second is WSL2's
    vendors = (path.read_text().strip() for path in Path("/sys/bus/pci/devices").glob("*/vendor"))
    build = (report or {}).get("build", {})
    libcuda, init = _cuda()
    versions = {"cuda": build.get("cuda_version", "12").split(".")[0], "cudnn": build.get("cudnn_version", "9")}
    return GpuFacts(
        system=platform.system(),
        on_bus="0x10de" in vendors,
        driver=_version(driver.read_text()) if driver.is_file() else "WSL2" if Path("/dev/dxg").exists() else "",
        nodes=bool(nodes),
        usable=all(os.access(path, os.R_OK | os.W_OK) for path in nodes),
        in_container=Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"),
        libcuda=libcuda,
        init=init,
        built_for_cuda=build.get("is_cuda_build", True),
        missing=tuple(name for name in (text.format(**versions) for text in LIBRARIES) if not _is_there(name)),
    )


def _version(text: str) -> str:
    match = re.search(r"\d+\.\d+(\.\d+)?", text)
    return match.group() if match else "?"


def _cuda() -> tuple[bool, int]:
    """Load the driver's library and start it; return whether it exists, and its error code."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False, 0
    return True, int(library.cuInit(0))


def _is_there(library: str) -> bool:
    """Return whether a library is in one of NVIDIA's wheels or on the system's path."""
    wheels = importlib.util.find_spec("nvidia")
    places = wheels.submodule_search_locations if wheels and wheels.submodule_search_locations else []
    if any(path for place in places for path in Path(place).glob(f"*/lib/{library}*")):
        return True
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _probe() -> dict[str, Any]:
    """Load TensorFlow and compute a convolution on each device; runs in a process of its own."""
    import keras
    import tensorflow as tf

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    devices = [device.name.removeprefix("/device:") for device in tf.config.list_logical_devices()]
    return {
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
        "build": dict(tf.sysconfig.get_build_info()),
        "devices": [_convolve(name) for name in devices],
    }


def _convolve(name: str) -> dict[str, Any]:
    """Compute a convolution of whole numbers on a device and compare it with NumPy's."""
    import numpy as np
    import tensorflow as tf

    rng = np.random.default_rng(0)
    images, kernel = rng.integers(0, 5, (4, 18, 18, 3)), rng.integers(0, 5, (3, 3, 3, 8))
    patches = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(1, 2))  # (n, y, x, channel, dy, dx)
    expected = np.einsum("nyxcij,ijco->nyxo", patches, kernel)
    result = {"name": name, "detail": _detail(name), "milliseconds": 0.0, "error": ""}
    try:
        with tf.device(name):
            operands = tf.constant(images, tf.float32), tf.constant(kernel, tf.float32)
            computed = tf.nn.conv2d(*operands, strides=1, padding="VALID").numpy()
            start = time.perf_counter()
            tf.nn.conv2d(*operands, strides=1, padding="VALID").numpy()
            result["milliseconds"] = 1000 * (time.perf_counter() - start)
        if not np.array_equal(computed, expected):
            result["error"] = f"its result is wrong by {np.abs(computed - expected).max():g}"
    except Exception as error:  # a driver or a library may raise anything
        result["error"] = f"{type(error).__name__}: {error}"
    return result


def _detail(name: str) -> str:
    import tensorflow as tf

    gpus = {gpu.name.removeprefix("/physical_device:"): gpu for gpu in tf.config.list_physical_devices("GPU")}
    if name not in gpus:
        return ""
    facts = tf.config.experimental.get_device_details(gpus[name])
    capability = ".".join(map(str, facts.get("compute_capability", ())))
    return f"{facts.get('device_name', 'GPU')}, compute capability {capability or 'unknown'}, "


# Memory, disk, weights, kernel, store


def _memory() -> Finding:
    free, total = machine.free_memory(), machine.total_memory()
    text = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free; {machine.cores()} cores"
    return Finding("memory", text, "end other programs, or take a smaller batch_size" if free < LEAST_MEMORY else "")


def _disk() -> Iterator[Finding]:
    folder = project.runs_folder()
    runs_name = project.display_path(folder)
    if not disk.is_writable(folder):
        yield Finding("disk", f"{runs_name} cannot be written to", "give yourself the right to write, or set THAW_RUNS")
        return
    free = shutil.disk_usage(folder).free
    little = free < disk.LEAST_FREE_BYTES
    fix = "free some space (`thaw clean` lists what no run needs), or set THAW_RUNS to a folder on another disk"
    yield Finding("disk", f"{free / 1e9:,.1f} GB are free on the disk of {runs_name}", fix if little else "")
    link = folder / f".link.{os.getpid()}{disk.TEMPORARY}"
    try:
        store.link(link, folder / "nothing")
        link.unlink()
    except OSError as error:
        yield Finding(
            "links", f"{runs_name} cannot hold links: {error.strerror}", "set THAW_RUNS to a folder on another disk"
        )


def _weights() -> Finding:
    installed = backbones.weights_here()
    stages_with_one = (stage for stage in notebooks.stages().values() if "backbone" in stage.settings)
    default = next(stages_with_one).settings["backbone"].default
    text = f"ImageNet weights here: {', '.join(installed) or 'none'}; Keras keeps downloads in {family.keras_home()}"
    return Finding("weights", text, "" if default in installed else f"`thaw prefetch {default}` fetches or explains")


def _kernel() -> Finding:
    """Start the kernel that a notebook opened by hand would get."""
    from jupyter_client.manager import start_new_kernel

    fix = f"{sys.executable} -m ipykernel install --sys-prefix"
    try:
        manager, client = start_new_kernel(startup_timeout=60, kernel_name="python3", stderr=subprocess.DEVNULL)
    except Exception as error:  # jupyter_client raises many kinds
        return Finding("kernel", f"python3 does not start: {error}", fix)
    try:
        answer = client.execute_interactive(
            "", user_expressions={"it": "__import__('sys').executable"}, store_history=False, timeout=60
        )
        python = answer["content"]["user_expressions"]["it"]["data"]["text/plain"].strip("'")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    if Path(python).parent != Path(sys.executable).parent:
        return Finding("kernel", f"python3 in Jupyter is another Python: {python}", fix)
    return Finding("kernel", "python3 in Jupyter is this Python")


def _store() -> Iterator[Finding]:
    folder = project.runs_folder()
    runs, busy = housekeeping.runs_in(folder), housekeeping.busy(folder)
    doing = f"; a thaw run is making {', '.join(busy)}" if busy else "; nothing is locked"
    yield Finding("runs", f"{len(runs)} in {project.display_path(folder)}{doing}")
    if not busy and (items := housekeeping.leftovers(folder)):
        size = sum(item.size for item in items)
        yield Finding("store", f"{len(items)} things that no run needs, {size / 1e6:,.0f} MB: `thaw clean` lists them")
    records = [path.stat().st_mtime for path in (folder / housekeeping.STORE).glob(f"*/{stages.STAGE_FILE}")]
    if records and max(records) > time.time() + 60:
        yield Finding("clock", "results are dated in the future, so the clock was set back; this does no harm")


if __name__ == "__main__":
    child.answer(_probe)
