"""A sweep on several hosts: two workers of Dask on this machine, one of which is killed at work.

Part of `make cluster`, which installs the extra.
"""

import numpy as np
import pandas as pd
import psutil
import pytest
from test_cluster import Place, compiled_once, recipe, two  # noqa: F401

from helpers.core import disk

pytestmark = pytest.mark.cluster

SWEEP = """
extends: %s
name: s
head: {epochs: 2, views: 2, batch_size: 12}
fine_tune: {epochs: 40, batch_size: 4}
grid: {fine_tune.learning_rate: [1e-5, 1e-4, 1e-3]}
to: fine_tune
"""


def test_when_a_worker_is_killed_at_work_all_members_are_made_all_the_same(two, recipe, tmp_path):  # noqa: F811
    file = tmp_path / "s.yaml"
    file.write_text(SWEEP % recipe)
    alone, together = (Place(tmp_path / name, file) for name in ("alone", "together"))
    alone.thaw("sweep", file)
    process = together.start("sweep", file, "--hosts", two.address)
    while not list(together.folder.glob(".store/fine_tune-*.partial/history.csv")):
        assert process.poll() is None, process.communicate()[0]
    kernel = _one_at_work(two)
    kernel.parent().send_signal(9)
    shown, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "2 hosts make a stage each" in shown, shown
    assert list(pd.read_csv(together.folder / "s" / "sweep.csv")["state"]) == ["done"] * 3
    for member in ("learning_rate-1e-5", "learning_rate-1e-4", "learning_rate-1e-3"):
        one, other = (place.losses("fine_tune", f"s/{member}") for place in (alone, together))
        np.testing.assert_array_equal(one, other)
    made = [disk.read_json(path)["stage"] for path in (together.folder / ".store").glob("*/stage.json")]
    assert sorted(made) == ["explore", "fine_tune", "fine_tune", "fine_tune", "head", "resize", "split", "study"]


def _one_at_work(cluster) -> psutil.Process:
    """A kernel whose parent is a worker."""
    for worker in cluster.workers():
        for child in worker.children():
            if "ipykernel_launcher" in " ".join(child.cmdline()):
                return child
    raise AssertionError("no worker has a kernel")
