"""What a file from elsewhere could do: run code, fill the memory, reach out of its folder, open a port."""

import ast
import json
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.core import notebooks, project, stages
from helpers.data import links, sources
from helpers.models import torch_weights
from helpers.pipeline import recipes

CODE = sorted((project.ROOT / "helpers").rglob("*.py"))
NOTEBOOKS = sorted((project.ROOT / "notebooks").glob("*.ipynb"))


def test_the_code_is_found():
    assert len(CODE) > 60 and len(NOTEBOOKS) >= 8


# What the code may not do


def calls(path: Path):
    """Yield (dotted name, call) of each call in a module or notebook."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    else:
        source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


FORBIDDEN = re.compile(
    r"(^|\.)(pickle|cPickle|dill|cloudpickle|shelve|marshal|joblib|torch)\.(load|loads|open|Unpickler)$"
    r"|\.read_pickle$|(^|\.)yaml\.(load|unsafe_load|full_load)$|enable_unsafe_deserialization$|^(exec|eval|compile|__import__)$"
    r"|^os\.(system|popen)$|(^|\.)extractall$"
)
ADMITTED = {("notebooks.py", "eval")}  # of a type annotation in a notebook of this project, without builtins


@pytest.mark.parametrize("path", [*CODE, *NOTEBOOKS], ids=lambda path: path.name)
def test_nothing_that_could_run_a_files_code_is_called(path):
    for name, call in calls(path):
        found = FORBIDDEN.search(name)
        assert not found or (path.name, name) in ADMITTED, f"{path.name}:{call.lineno}: {ast.unparse(call)[:80]}"
        for keyword in call.keywords:
            is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            assert not (keyword.arg in ("shell", "allow_pickle") and not is_false), ast.unparse(call)
            assert not (keyword.arg == "safe_mode" and not is_true), ast.unparse(call)


def test_only_the_reader_of_weights_unpickles():
    users = [path.name for path in CODE if re.search(r"^\s*(import|from) pickle", path.read_text(), re.M)]
    assert users == ["torch_weights.py"]


@pytest.mark.parametrize("text", ["__import__('os').system('touch harm')", "open('harm', 'w')"])
def test_an_annotation_is_no_code(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(notebooks.RecipeError):
        notebooks.read_parameters(f"value: {text} = 1  # what")
    assert not list(tmp_path.iterdir())


# The reader of PyTorch's files


def _text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def _number(value) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def weights_file(shape=(2, 2), strides=(2, 1), size=4, values=None, before=b"") -> bytes:
    """A legacy file of PyTorch with one tensor, written by hand."""
    values = np.arange(4, dtype="<f4").tobytes() if values is None else values
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + _number(size) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _number(0) + _number(shape) + _number(strides) + b"tR"
    state = b"\x80\x02" + before + b"}" + _text("w") + tensor + b"s."
    parts = [pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {})]
    return b"".join([*parts, state, pickle.dumps(["0"], protocol=2), size.to_bytes(8, "little"), values])


def read(data: bytes, folder: Path):
    (folder / "w.pth").write_bytes(data)
    return torch_weights.read(folder / "w.pth")


def test_a_sound_file_is_read(tmp_path):
    np.testing.assert_array_equal(read(weights_file(), tmp_path)["w"], [[0, 1], [2, 3]])


HUGE_PLACE = b"r" + (2**31 - 1).to_bytes(4, "little")  # LONG_BINPUT: the list of places would take 16 GB


@pytest.mark.parametrize(
    ("data", "reason"),
    {
        "a tensor of a million million numbers in four": (weights_file((10**12,), (0,)), "more numbers than the file"),
        "and one of fewer than none, to make up for it": (weights_file((-(10**12), 2), (0, 0)), "other than tensors"),
        "a shape that is a tensor's factor": (weights_file((2**30, (1,)), (0, 0)), "other than tensors"),
        "beyond its numbers": (weights_file((3, 2), (1, 1), size=4), "more numbers|incompatible"),
        "before its numbers": (weights_file((2, 2), (-2, 1)), "other than tensors"),
        "a storage longer than the file": (weights_file(size=2**40), "cut short"),
        "a place far away": (weights_file(before=b"N" + HUGE_PLACE + b"0"), "LONG_BINPUT"),
        "a function's name on the stack": (weights_file(before=_text("os") + _text("system") + b"\x930"), "STACK_G"),
        "an instruction of protocol 0": (weights_file(before=b"(S'true'\nios\nsystem\n0"), "MARK|STRING|INST|POP"),
        "a function of ours": (weights_file(before=b"chelpers.core.disk\nwrite_text\n0"), "POP|only tensors"),
    }.values(),
    ids=lambda value: None,
)  # fmt: skip
def test_a_hostile_file_is_refused_without_time_or_memory(data, reason, tmp_path):
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"is not a PyTorch weights file.*({reason})"):
        read(data, tmp_path)
    assert time.monotonic() - start < 20


def test_nested_doubling_is_not_written_out(tmp_path):
    """[[[x, x], [x, x]] ...] a hundred deep takes little memory, and more than there is as text."""
    deep: list = []
    for _ in range(100):
        deep = [deep, deep]
    data = pickle.dumps(deep, protocol=2) + weights_file()
    with pytest.raises(ValueError, match="first bytes are not those of such a file"):
        read(data, tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6), cut=st.integers(0, 400))
def test_changed_bytes_give_arrays_or_a_clear_refusal(changes, cut, tmp_path):
    data, loaded = bytearray(weights_file()), set(sys.modules)
    for place, value in changes:
        data[place % len(data)] = value
    try:
        arrays = read(bytes(data[: len(data) - cut % len(data)] if cut % 3 == 0 else data), tmp_path)
    except ValueError as error:
        assert "is not a PyTorch weights file" in str(error)
    else:
        assert sum(array.size for array in arrays.values()) <= len(data)
    assert not {name for name in set(sys.modules) - loaded if name.split(".")[0] in ("os", "torch", "subprocess")}


NAMES = (
    "os.system posix.system builtins.eval builtins.exec builtins.getattr subprocess.Popen functools.partial"
    " operator.attrgetter collections.Counter torch.load torch._utils._rebuild_x helpers.core.disk.discard"
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES.split()), argument=st.text(max_size=20), protocol=st.sampled_from([2, 4]))
def test_no_other_name_is_looked_up(name, argument, protocol, tmp_path):
    module, _, attribute = name.rpartition(".")
    call = f"c{module}\n{attribute}\n".encode() + b"(" + _text(argument) + b"tR0"
    if protocol == 4:
        call = _text(module) + _text(attribute) + b"\x93(" + _text(argument) + b"tR0"
    with pytest.raises(ValueError, match="is not a PyTorch weights file"):
        read(weights_file(before=call), tmp_path)


# Models, recipes, names


def test_a_model_that_holds_code_is_not_opened(tmp_path, monkeypatch):
    import keras

    from helpers.compute import hardware
    from helpers.models import backbones

    monkeypatch.chdir(tmp_path)
    code = keras.layers.Lambda(lambda x: [__import__("pathlib").Path("harm").touch(), x][1])
    inputs = keras.Input((32, 32, 3))
    keras.Model(inputs, code(inputs), name="backbone").save("bad.keras")
    (tmp_path / "harm").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="safe_mode"):
        hardware.load("bad.keras")
    with pytest.raises(ValueError):
        backbones.build("efficientnet_lite0", 32, str(tmp_path / "bad.keras"))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['touch harm']", "!!python/name:os.system", "!!python/object/new:os.system [x]"],
)
def test_a_recipe_runs_no_code(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(f"name: bad\nhead: {text}\n")
    with pytest.raises(notebooks.RecipeError, match="is not valid YAML"):
        recipes.load("bad.yaml")
    assert not Path("harm").exists()


@pytest.mark.parametrize("label", ["../../up", "/etc", "..", ".", "a/../../b", "C:\\x", "\x00", "~", "-rf", "a\nb"])
def test_a_class_gets_a_folder_within_its_part(label, tmp_path):
    folder = links.class_folder(label)
    assert (tmp_path / folder).parent == tmp_path and folder not in ("", ".", "..") and "/" not in folder


@pytest.mark.parametrize("path", ["../secret.png", "/{root}/../secret.png", "a/../../secret.png"])
def test_a_labels_file_cannot_name_what_lies_outside_its_folder(path, tmp_path):
    from PIL import Image

    root = tmp_path / "photos"
    (root / "a").mkdir(parents=True)
    for file in (tmp_path / "secret.png", root / "1.png", root / "2.png", root / "a" / "3.png"):
        Image.new("RGB", (32, 32)).save(file)
    path = path.replace("/{root}", str(root))
    (tmp_path / "labels.csv").write_text(f"path,label\n1.png,x\n2.png,y\n{path},x\n")
    given = {name: p.default for name, p in notebooks.find_stage("explore").settings.items()}
    found = sources.read(given | {"source": str(root), "labels": str(tmp_path / "labels.csv")})
    for name in found.table["path"]:
        assert (root / name).resolve().is_relative_to(root.resolve()), name
    assert len(found.table) == 2 and len(found.rejected) == 1


def test_a_run_cannot_be_named_out_of_its_folder():
    for name in ("../x", "/x", "a/b/c", "a/../b", "a/.store", "..", "", ".store", "a\nb"):
        assert recipes.check({"name": name}), name


# The network


def listening(process) -> list[str]:
    import psutil

    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    found = [one for part in tree for one in part.net_connections(kind="inet")]
    return [one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN or one.type == socket.SOCK_DGRAM]


def test_the_board_listens_on_this_machine_alone(runs_folder):
    (runs_folder / "one" / "head" / "logs").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "helpers.cli.main", "board", "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=project.ROOT, start_new_session=True, **quiet)
    try:
        end = time.monotonic() + 120
        while not (places := listening(process)) and time.monotonic() < end:
            assert process.poll() is None
            time.sleep(0.2)
        assert places and set(places) <= {"127.0.0.1", "::1"}
    finally:
        stages.os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_no_command_of_the_project_opens_a_port_to_others():
    files = [*CODE, *NOTEBOOKS, project.ROOT / "Makefile"]
    for file in files:
        assert not re.search(
            r"--bind_all|--ip[= ]\S*0\.0\.0\.0|host=['\"]?0\.0\.0\.0|--allow-root", file.read_text()
        ), file


def test_recipes_and_json_hold_no_secrets_of_ours():
    for file in [*project.ROOT.glob("recipes/**/*.yaml"), *NOTEBOOKS]:
        assert not re.search(r"(?i)(password|api_key|secret|token)\s*[:=]\s*['\"]?\w{8,}", file.read_text()), file
    assert json.loads(NOTEBOOKS[0].read_text())["nbformat"] == 4
