"""What the benchmarks say of their measurements, and whom they refuse to time."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def speed(monkeypatch):
    """benchmarks/recipe_speed.py, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recipe_speed

    return recipe_speed


def test_the_table_of_speeds_has_both_ratios_and_the_accuracies(speed, capsys):
    def side(seconds: float) -> dict[str, float]:
        return {"seconds": seconds, "epochs": seconds / 2, "processor": 2 * seconds}

    times = [{"Thaw": side(one), "plain Keras": side(9 * one), "plain PyTorch": side(3 * one)} for one in (10.0, 30.0)]
    right = {"Thaw": np.ones(8), "plain Keras": np.repeat([0.0, 1.0], 4), "plain PyTorch": np.ones(8)}
    speed.conclude(times, [right, right])
    said = capsys.readouterr().out
    assert said.splitlines()[1].split() == ["Thaw", "plain", "Keras", "ratio", "plain", "PyTorch", "ratio"]
    assert said.splitlines()[2].split()[-5:] == ["20.0", "180.0", "9.0", "60.0", "3.0"]
    assert said.splitlines()[5].split()[-6:] == ["100.00", "%", "50.00", "%", "100.00", "%"]
    assert "9.0 times as fast as plain Keras (wanted: 15)" in said and "by +50.00 points" in said
    assert "3.0 times as fast as plain PyTorch (wanted: 5)" in said


def test_one_rival_alone_is_a_table_too(speed, capsys):
    sides = {name: dict.fromkeys(speed.MEASURED, 4.0) for name in ("Thaw", "plain PyTorch")}
    speed.conclude([sides], [dict.fromkeys(sides, np.ones(3))])
    assert "Keras" not in capsys.readouterr().out


@pytest.mark.parametrize("other", [0.5, np.nan])
def test_two_networks_that_differ_are_not_timed(speed, tmp_path, monkeypatch, other):
    given = iter([np.zeros((2, 3)), np.full((2, 3), other), np.zeros((2, 3)), np.full((2, 3), 1e-5)])
    monkeypatch.setattr(speed, "plain_task", lambda recipe: {})
    monkeypatch.setattr(speed, "ask", lambda started_by, task: np.save(task["logits"], next(given)))
    commands = {"plain Keras": ["python"], "plain PyTorch": ["python"]}
    with pytest.raises(ValueError, match=r"differ by (0\.5|nan), expected 0\.001 at most"):
        speed.difference(SimpleNamespace(), commands, tmp_path)
    assert speed.difference(SimpleNamespace(), commands, tmp_path) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("python", "said"), [("/no/python", "No such file"), (sys.executable, "No module named 'torch'")]
)
def test_a_python_without_pytorch_is_refused_before_anything_runs(speed, python, said):
    with pytest.raises(SystemExit, match=rf"--torch {python}: .*{said}.*Expected a Python with torch==") as raised:
        speed.command("torch", python)
    assert "leave --torch out" in str(raised.value)


def test_a_script_that_fails_shows_its_last_words(speed):
    with pytest.raises(RuntimeError, match="no number"):
        speed.ask([sys.executable, "-c", "raise ValueError('no number')"], {})
