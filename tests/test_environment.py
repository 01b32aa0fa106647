"""What a fresh machine is given: locks that resolve, and a container, a dev container and a conda file that agree.

The slow proof, which builds the image and runs a recipe in it, is tests/docker/build_and_run.sh.
"""

import functools
import http.server
import json
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {"requirements.lock": {"data", "weights", "dev"}, "requirements-gpu.lock": {"data", "weights", "dev", "gpu"}}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = [f"3.{minor}" for minor in range(8, 20) if f"3.{minor}" in SpecifierSet(PROJECT["requires-python"])]


@functools.cache
def machine(python: str, extra: str = "") -> dict[str, str]:
    """What markers are evaluated against: Linux on x86-64 with this Python."""
    linux = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    version = {"python_version": python, "python_full_version": f"{python}.9", "extra": extra}
    return default_environment() | linux | version


@functools.cache
def pins(lock: str, python: str) -> dict[str, Version]:
    """The version of each package that `lock` would install; every line must be one exact version with its hashes."""
    text = (ROOT / lock).read_text().replace("\\\n", "")
    found = {}
    for line in filter(None, (line.split("#")[0].strip() for line in text.splitlines())):
        entry, *hashes = re.split(r"\s+--hash=", line)
        requirement = Requirement(entry)
        (pin,) = requirement.specifier
        assert pin.operator == "==" and hashes, f"{lock}: {entry}"
        if requirement.marker is None or requirement.marker.evaluate(machine(python)):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{lock} has two versions of {name} for Python {python}"
            found[name] = Version(pin.version)
    return found


def unmet(requirements: list[str], found: dict[str, Version], python: str) -> list[str]:
    """Those of `requirements` that hold for this Python and that no version in `found` meets."""
    missing = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate(machine(python)):
            version = found.get(canonicalize_name(requirement.name))
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                missing.append(str(requirement))
    return missing


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_what_the_project_asks_for(lock, python):
    asked = PROJECT["dependencies"] + [
        line for extra in LOCKS[lock] for line in PROJECT["optional-dependencies"][extra]
    ]
    assert unmet(asked, pins(lock, python), python) == []


def test_the_lock_resolves_every_package_has_what_it_needs_in_it():
    """Read from the packages themselves, as far as they are installed in the version of the lock."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = pins("requirements.lock", python)
    installed = {canonicalize_name(d.name): d for d in metadata.distributions()}
    checked = [d for name, d in installed.items() if name in found and Version(d.version) == found[name]]
    assert len(checked) > len(found) / 2
    assert {d.name: missing for d in checked if (missing := unmet(d.requires or [], found, python))} == {}


def test_the_conda_environment_names_python_pip_and_the_lock():
    environment = YAML(typ="safe").load(ROOT / "environment.yml")
    python, pip, from_lock = environment["dependencies"]
    assert environment["name"] == "thaw" and environment["channels"] == ["conda-forge"] and pip == "pip"
    assert python.removeprefix("python=") in PYTHONS
    assert from_lock == {"pip": ["-r requirements.lock"]}


@pytest.mark.parametrize("path", ["Dockerfile", "compose.yaml", ".devcontainer/devcontainer.json", "environment.yml"])
def test_no_version_stands_anywhere_but_in_the_lock(path):
    text = re.sub(r"^\s*(#|//).*$", "", (ROOT / path).read_text(), flags=re.MULTILINE)
    named = {name for lock in LOCKS for name in pins(lock, PYTHONS[0])}
    versions = re.findall(r"([A-Za-z][\w.-]*)\s*(?:[=~<>!]=|=)\s*v?\d", text)
    assert [name for name in versions if canonicalize_name(name) in named] == []


# The image


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (INSTRUCTION, arguments), without comments and with continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


def arguments() -> dict[str, str]:
    """The build arguments of the Dockerfile and their defaults."""
    return dict(text.replace('"', "").split("=") for name, text in instructions() if name == "ARG")


def only(name: str) -> str:
    """The arguments of the instruction that stands once in the Dockerfile."""
    (found,) = [text for instruction, text in instructions() if instruction == name]
    return found


def test_the_image_is_built_from_arguments_with_defaults_that_exist():
    assert set(arguments()) == {"BASE", "LOCK", "PREFETCH"}
    assert arguments()["LOCK"] in LOCKS and arguments()["PREFETCH"] == ""
    assert only("FROM") == "${BASE}"


def test_layers_stand_in_the_order_in_which_they_change():
    text = "\n".join(" ".join(instruction) for instruction in instructions())
    order = "apt-get install|COPY ${LOCK}|--require-hashes|COPY helpers|prefetch|COPY pyproject|COPY notebooks"
    places = [text.index(mark) for mark in order.split("|")]
    assert places == sorted(places)


def test_the_builder_gets_what_is_copied_and_nothing_else():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    copied = {path for name, text in instructions() if name == "COPY" for path in text.split()[:-1]} - {"${LOCK}"}
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied | set(LOCKS)
    assert all((ROOT / path).exists() for path in copied)
    assert PROJECT["readme"] in copied and set(PROJECT["license-files"]) <= copied


def test_the_image_runs_lab_with_a_token_and_not_as_root():
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", only("USER")) and instructions()[-1][0] == "CMD"
    command = json.loads(only("CMD"))
    assert command[:2] == ["jupyter", "lab"] and f"--ServerApp.port={only('EXPOSE')}" in command
    assert not [part for part in command if "root" in part or "token" in part or "password" in part]


def test_the_health_check_tells_lab_from_no_lab():
    """Its own command, against a server that answers as Lab does and against none."""

    class Lab(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/api" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    command = json.loads(only("HEALTHCHECK").split(" CMD ")[1])
    assert command[0] == "python"
    with http.server.HTTPServer(("127.0.0.1", 0), Lab) as server:
        code = command[2].replace(only("EXPOSE"), str(server.server_port))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        check = [sys.executable, "-S", command[1], code]
        assert subprocess.run(check, check=False).returncode == 0
        server.shutdown()
    assert subprocess.run(check, check=False, stderr=subprocess.DEVNULL).returncode == 1


# Compose and the dev container


def test_compose_offers_lab_and_batch_with_and_without_gpu():
    services = YAML(typ="safe").load(ROOT / "compose.yaml")["services"]
    assert set(services) == {"lab", "batch", "lab-cpu", "batch-cpu"}
    for name, service in services.items():
        gpu = not name.endswith("-cpu")
        build = service["build"] if isinstance(service["build"], dict) else {"context": service["build"]}
        assert build["context"] == "." and set(build.get("args", {})) <= set(arguments())
        lock = build.get("args", {}).get("LOCK", arguments()["LOCK"])
        assert lock == ("requirements-gpu.lock" if gpu else "requirements.lock")
        assert ("deploy" in service) == gpu
        assert service["user"].startswith("${THAW_USER:-") and service["init"] is True
    reserved = services["lab"]["deploy"]["resources"]["reservations"]["devices"]
    assert reserved == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert [name for name, service in services.items() if not service.get("profiles")] == ["lab"]


def test_compose_publishes_lab_on_loopback_and_gives_batch_data_and_runs():
    services = YAML(typ="safe").load(ROOT / "compose.yaml")["services"]
    for name in ("lab", "lab-cpu"):
        port = only("EXPOSE")
        assert services[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
        assert services[name]["volumes"] == [f".:{only('WORKDIR')}"]
    for name in ("batch", "batch-cpu"):
        places = {(volume["source"], volume["target"]) for volume in services[name]["volumes"]}
        assert places == {("./data", "/thaw/data"), ("./runs", "/thaw/runs")}
        assert services[name]["entrypoint"] == ["thaw"] and services[name]["healthcheck"] == {"disable": True}
        assert "ports" not in services[name]


KEYS = {  # of https://containers.dev/implementors/json_reference/, those in use
    "name": str,
    "build": dict,
    "hostRequirements": dict,
    "features": dict,
    "init": bool,
    "remoteUser": str,
    "workspaceMount": str,
    "workspaceFolder": str,
    "postCreateCommand": str,
    "forwardPorts": list,
    "portsAttributes": dict,
    "customizations": dict,
}


def test_the_dev_container_is_the_image_with_the_checkout_in_it():
    folder = ROOT / ".devcontainer"
    text = re.sub(r"^\s*//.*$", "", (folder / "devcontainer.json").read_text(), flags=re.MULTILINE)
    settings = json.loads(text)
    assert {key: type(value) for key, value in settings.items()} == {key: KEYS.get(key) for key in settings}
    build = settings["build"]
    assert (folder / build["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert (folder / build["context"]).resolve() == ROOT
    assert set(build) == {"dockerfile", "context", "args"} and set(build["args"]) <= set(arguments())
    assert re.fullmatch(r"\$\{localEnv:\w+:(.+)\}", build["args"]["LOCK"])[1] in LOCKS
    assert settings["hostRequirements"] == {"gpu": "optional"}
    assert settings["workspaceFolder"] == only("WORKDIR")
    assert f"target={only('WORKDIR')}," in settings["workspaceMount"]
    runs = " ".join(text for name, text in instructions() if name == "RUN")
    assert f"--create-home {settings['remoteUser']} " in runs
    python = settings["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert f"-m venv {Path(python).parent.parent} " in runs
    assert str(Path(python).parent / "pip") in shlex.split(settings["postCreateCommand"])


def test_the_proof_script_is_a_script():
    assert subprocess.run(["bash", "-n", ROOT / "tests" / "docker" / "build_and_run.sh"], check=False).returncode == 0
