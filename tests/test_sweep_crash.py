"""A sweep, a halving and a search that are killed twice end with the same tables as undisturbed ones.

On the real notebooks and real weights: `python -m pytest -m crash tests/test_sweep_crash.py -s`, minutes.
"""

import random
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
from test_crash import Place

pytestmark = pytest.mark.crash

BASE = """
extends: %s
name: s
fine_tune: {epochs: 12, batch_size: 4}
to: fine_tune
"""
TINY = """
name: tiny
explore: {source: %s}
split: {ratio: [0.5, 0.25, 0.25]}
resize: {image_size: 32}
head: {epochs: 2, views: 2, batch_size: 8}
fine_tune: {unfreeze: block7, views: 2}
"""
SWEEPS = {
    "grid": "grid: {fine_tune.learning_rate: [1e-5, 1e-4, 1e-3]}",
    "halving": "grid: {fine_tune.learning_rate: [1e-5, 1e-4, 1e-3]}\nhalving: {from_epochs: 2}",
    "search": "grid: {fine_tune.learning_rate: {log: [1e-5, 1e-3]}}\nsearch: {trials: 3}",
}
OWN_TIME = ["seconds"]  # the only column that may differ


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, image_folder) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    path = folder / "tiny.yaml"
    path.write_text(TINY % image_folder(folder / "photos", {"disc": 24, "square": 24, "cross": 24}))
    return path


def tables(place: Place) -> list[pd.DataFrame]:
    study = place.folder / "s" / "study"
    found = [pd.read_csv(study / f"{name}.csv") for name in ("members", "leaderboard")]
    return [pd.read_csv(place.folder / "s" / "sweep.csv"), *(table.drop(columns=OWN_TIME) for table in found)]


@pytest.mark.parametrize("kind", SWEEPS)
def test_killed_twice_at_random_a_sweep_ends_with_the_same_tables(kind, recipe, tmp_path, capsys):
    if kind == "search":
        pytest.importorskip("optuna", reason="needs the extra: pip install -e '.[search]'")
    file = tmp_path / "sweep.yaml"
    file.write_text(BASE % recipe + SWEEPS[kind])
    whole, broken = (Place(tmp_path / name, file) for name in ("whole", "broken"))
    begun = time.monotonic()
    whole.thaw("sweep", file)
    seconds, moments = time.monotonic() - begun, []
    for part in (0.5, 0.4):
        process = broken.start("sweep", file)
        moments.append(random.uniform(3, part * seconds))
        time.sleep(moments[-1])
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    broken.thaw("sweep", file)
    for one, other in zip(tables(whole), tables(broken), strict=True):
        pd.testing.assert_frame_equal(one, other)
    if kind == "halving":
        (survivor,) = (whole.folder / "s").glob("*/fine_tune")
        alone = Place(tmp_path / "alone", file)
        alone.thaw("run", survivor.parent / "recipe.yaml", "--to", "fine_tune")
        history = survivor.relative_to(whole.folder) / "history.csv"
        one, other = (pd.read_csv(place.folder / history).drop(columns=OWN_TIME) for place in (whole, alone))
        pd.testing.assert_frame_equal(one, other)
    told = " and ".join(f"{moment:.0f} s" for moment in moments)
    with capsys.disabled():
        print(f"\n{kind}: {seconds:.0f} s undisturbed; killed after {told}, the same tables")
