"""What this machine has: processor, memory, GPUs, packages. The system reports it, without TensorFlow."""

import os
import platform
import shutil
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")  # holds a container's limits
GPU_QUERY = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]


@cache
def hardware() -> dict[str, Any]:
    """Return what influences the speed and the last digits of a result: platform, cpu, cores, memory_gb, gpus."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gb": round(total_memory() / 1e9, 1),
        "gpus": gpus(),
    }


@cache
def packages() -> dict[str, str]:
    """Return the version of each installed package, by its name as it writes it."""
    known = [distribution.metadata for distribution in metadata.distributions()]  # each access reads the file again
    return dict(sorted((about["Name"], about["Version"]) for about in known if about["Name"]))


def cores() -> int:
    """Return the number of cores that this process may use, within the limit of its container."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [text.split() for folder in _cgroups() if (text := _read(folder / "cpu.max"))]
    allowed = [max(1, int(quota) // int(period)) for quota, period in quotas if quota != "max"]
    return min([usable, *allowed])


def total_memory() -> int:
    """Return the memory in bytes that this process may use, within the limit of its container; 0 when unknown."""
    return min([_meminfo("MemTotal"), *(limit for limit, _ in _memory_limits())])


def free_memory() -> int:
    """Return the memory in bytes that is available without swapping, 0 where the system does not report it."""
    return max(0, min([_meminfo("MemAvailable"), *(limit - used for limit, used in _memory_limits())]))


def multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions that multiply bfloat16, and TensorFlow may use them."""
    flags = next((line for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith("flags")), "").split()
    return bool({"avx512_bf16", "amx_bf16"} & {*flags}) and os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0"


def gpus() -> list[str]:
    """Return a line for each NVIDIA GPU that the driver shows here: name, memory, version of the driver."""
    if shutil.which(GPU_QUERY[0]) is None:
        return []
    try:
        query = subprocess.run(GPU_QUERY, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return query.stdout.strip().splitlines() if query.returncode == 0 else []


def _cpu() -> str:
    models = (
        line.split(":", 1)[1].strip() for line in _read(Path("/proc/cpuinfo")).splitlines() if "model name" in line
    )
    return next(models, platform.processor())


def _meminfo(entry: str) -> int:
    lines = _read(Path("/proc/meminfo")).splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:")), 0)


def _memory_limits() -> list[tuple[int, int]]:
    """Return (limit, bytes used that cannot be reclaimed) of each control group that limits this process's memory."""
    limits = []
    for folder in _cgroups():
        limit, used = _read(folder / "memory.max").strip(), _read(folder / "memory.current").strip()
        if limit.isdecimal() and used.isdecimal():
            stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
            limits.append((int(limit), int(used) - int(stat.get("inactive_file", 0))))
    return limits


def _cgroups() -> list[Path]:
    """Return the folder of this process's control group (version 2) and of those above it."""
    lines = _read(Path("/proc/self/cgroup")).splitlines()
    own = CGROUPS / next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    return [folder for folder in (own, *own.parents) if folder.is_relative_to(CGROUPS)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
