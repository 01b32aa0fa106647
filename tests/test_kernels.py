"""Kernels that are forks of one process: the same as ordinary ones, and gone when the command is gone."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest

from helpers.core import project
from helpers.pipeline import kernels


def ready(modules) -> kernels.Forks:
    forks = kernels.Forks(["ipykernel.kernelapp", "numpy", *modules])
    for _ in range(300):
        if forks.is_ready():
            return forks
        time.sleep(0.1)
    raise TimeoutError("the fork server did not import in 30 s")


@pytest.fixture(scope="module")
def forks() -> kernels.Forks:
    return ready(["no_such_module", "colorsys", "colorsys.rgb_to_hsv"])


@pytest.fixture
def run(notebook, tmp_path, monkeypatch):
    """A function (forks, *code) that runs cells by papermill and returns what they print and what the kernel logs."""
    kernels_of = []

    def run(forks, *code):
        path = notebook(tmp_path / "cells.ipynb", "value = 1", *code)
        with open(tmp_path / "log", "w+") as log:
            manager = kernels.manager(log, kernels_of, forks)
            settings = {"kernel_name": "python3", "progress_bar": False, "kernel_manager_class": manager}
            papermill.execute_notebook(path, tmp_path / "out.ipynb", {"value": 2}, **settings)
            log.seek(0)
            logged = log.read()
        cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
        return "".join(o.text for cell in cells for o in cell.get("outputs", []) if o.output_type == "stream"), logged

    run.process_groups = kernels_of
    return run


def test_a_fork_is_a_kernel_like_any_other(run, forks, monkeypatch):
    monkeypatch.setenv("THAW_TEST", "ä")
    code = "import os, sys, signal\n"
    code += "print(value, os.environ['THAW_TEST'], os.getcwd(), os.getppid(), 'colorsys' in sys.modules)"
    code += "\nos.system('echo from the kernel itself')\nprint(signal.getsignal(signal.SIGCHLD).name)"
    printed, logged = run(forks, code)
    value, variable, folder, parent, imported, handler = printed.split()
    assert (value, variable, folder, imported, handler) == ("2", "ä", os.getcwd(), "True", "SIG_DFL")
    assert int(parent) != os.getpid() and "from the kernel itself" in logged
    assert "forking" in " ".join(psutil.Process(int(parent)).cmdline())
    assert not psutil.pid_exists(run.process_groups[-1]), "it ended with its notebook"


def test_it_has_the_paths_of_an_ordinary_kernel_and_none_of_the_projects_code(run, forks):
    code = "import json, sys\nours = [name for name in sys.modules if name.startswith('helpers')]\n"
    code += "print(json.dumps([sys.path, ours, __name__]))"
    forked, ordinary = (json.loads(run(which, code)[0]) for which in (forks, None))
    assert forked[2] == ordinary[2] == "__main__"
    assert [path for path in forked[0] if path != str(project.ROOT)] == [
        path for path in ordinary[0] if path != str(project.ROOT)
    ]
    assert set(forked[1]) == {"helpers", "helpers.pipeline"} and ordinary[1] == []


def test_forks_draw_different_numbers(run, forks):
    code = "import random, numpy\nprint(random.random(), numpy.random.rand())"
    first, second = (run(forks, code)[0].split() for _ in range(2))
    assert first[0] != second[0] and first[1] != second[1]


def test_a_figure_is_shown(run, tmp_path):
    run(ready(["matplotlib.pyplot"]), "from matplotlib import pyplot\npyplot.plot([1, 2]);")
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    assert any("image/png" in output.get("data", {}) for output in cells[-1].outputs)


def test_an_error_and_a_death_are_reported(run, forks):
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        run(forks, "1 / 0")
    with pytest.raises(Exception, match=r"[Kk]ernel died"):
        run(forks, "import os; os._exit(3)")
    assert run(forks, "print('another')")[0] == "another\n"


def test_a_time_limit_for_all_sockets_does_not_end_the_server(run):
    limit = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)
    try:
        forks = ready([])
    finally:
        socket.setdefaulttimeout(limit)
    assert int(run(forks, "import os; print(os.getppid())")[0]) == forks._process.pid


def test_without_its_server_a_kernel_starts_in_the_ordinary_way(run):
    forks = ready([])
    code = "import os; print(os.getppid())"
    server = psutil.Process(forks._process.pid)
    assert int(run(forks, code)[0]) == server.pid  # not this process, which the next line would kill
    server.kill()
    psutil.wait_procs([server], timeout=5)
    assert int(run(forks, code)[0]) == os.getpid()


def test_nothing_is_left_when_the_command_ends(tmp_path):
    code = "from helpers.pipeline import kernels\nforks = kernels.Forks(['numpy'])\nprint(forks._process.pid)"
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=project.ROOT)
    assert not psutil.pid_exists(int(answer.stdout))


def test_a_kernel_ends_with_the_command_that_started_it(tmp_path):
    code = f"""
import time
from helpers.pipeline import kernels
forks = kernels.Forks(["ipykernel.kernelapp", "numpy"])
while not forks.is_ready():
    time.sleep(0.1)
from jupyter_client.connect import write_connection_file
file, _ = write_connection_file({str(tmp_path / "connection.json")!r}, ip="127.0.0.1", key=b"secret")
with open({str(tmp_path / "log")!r}, "w") as log:
    kernel = forks.start(["-f", file], dict(__import__("os").environ), ".", log)
print(kernel.pid, flush=True)
time.sleep(60)
"""
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=project.ROOT)
    kernel = psutil.Process(int(command.stdout.readline()))
    server = kernel.parent()
    time.sleep(1.5)  # it watches its parent as soon as it has started
    assert kernel.is_running()
    command.kill()
    command.communicate()
    assert not psutil.wait_procs([kernel, server], timeout=10)[1]


# Where forks are used


@pytest.fixture
def pages(notebook, tmp_path) -> list[Path]:
    """Two notebooks that import nothing slow, and one that does."""
    light = [notebook(tmp_path / f"{name}.ipynb", "x = 1", "import json") for name in ("a", "b")]
    return [*light, notebook(tmp_path / "c.ipynb", "x = 1", "from helpers.training import saving")]


@pytest.fixture
def started(monkeypatch) -> list:
    modules = []
    monkeypatch.setattr(kernels, "_server", lambda names: modules.append(names) or "a server")
    return modules


def test_one_server_imports_what_the_notebooks_import(pages, started):
    assert kernels.forks_for(pages) == "a server"
    assert {"keras", "numpy", "json", "ipykernel.kernelapp"} <= started[0]
    assert not [name for name in started[0] if name.startswith("helpers")]


@pytest.mark.parametrize("which", [[], [0, 1], [2], [2, 0]], ids=["none", "light", "one", "the first alone"])
def test_where_nothing_is_gained_none_is_started(pages, started, which):
    assert kernels.forks_for([pages[number] for number in which]) is None and not started


def test_it_can_be_switched_off_and_needs_linux(pages, started, monkeypatch):
    monkeypatch.setenv("THAW_FORK", "no")
    assert kernels.forks_for(pages) is None
    monkeypatch.setenv("THAW_FORK", "yes")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert kernels.forks_for(pages) is None and not started


@pytest.mark.slow
def test_importing_tensorflow_starts_no_thread():
    """What makes its forks whole. OpenBLAS starts threads, and looks after them in a fork itself."""
    code = "import tensorflow, os\nfrom tensorflow.python.eager import context\n"
    code += "print(len(os.listdir('/proc/self/task')), context.context()._initialized)"
    variables = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    assert answer.split() == ["1", "False"]
