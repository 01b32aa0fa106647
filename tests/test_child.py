"""A function that answers in a process of its own."""

import pytest

from helpers.core import child

MODULE = """
import os, signal, sys

from helpers.core import child


def work(kind, **rest):
    print("said on the way")
    print("warned", file=sys.stderr)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "refused":
        raise ValueError("this needs\\ntwo lines")
    if kind == "memory":
        raise MemoryError
    if kind == "defect":
        raise KeyError("a defect")
    if kind == "left":
        os._exit(0)
    return {"kind": kind, "backend": os.environ.get("KERAS_BACKEND")} | rest


child.answer(work)
"""


@pytest.fixture
def ask(tmp_path):
    (tmp_path / "some_module.py").write_text(MODULE)
    where = {"PYTHONPATH": f"{tmp_path}:{child.project.ROOT}"}
    return lambda kind, environment=None, meanwhile=lambda: None, **rest: child.ask(
        "some_module", {"kind": kind} | rest, environment=where | (environment or {}), meanwhile=meanwhile
    )


def test_the_answer_comes_back_with_what_was_said_on_the_way(ask):
    called = []
    found = ask("works", {"KERAS_BACKEND": "jax"}, lambda: called.append("meanwhile"), count=2, name="Bär")
    assert found.value == {"kind": "works", "backend": "jax", "count": 2, "name": "Bär"}
    assert found.log == "said on the way\nwarned\n" and called == ["meanwhile"]


@pytest.mark.parametrize(
    ("kind", "message", "signal"),
    [
        ("refused", "^this needs\ntwo lines$", ""),
        ("memory", "^MemoryError$", ""),
        ("defect", "KeyError: 'a defect'$", ""),
        ("left", "warned", ""),
        ("killed", "^its process was ended by SIGKILL$", "SIGKILL"),
    ],
)
def test_a_process_without_an_answer_says_why(ask, kind, message, signal):
    with pytest.raises(child.ChildError, match=message) as caught:
        ask(kind)
    assert caught.value.signal == signal and "warned" in caught.value.log
