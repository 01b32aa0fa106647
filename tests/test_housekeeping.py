"""`thaw ls` and `thaw clean`: what is there, and that nothing goes that a run needs."""

import io
import os
import sys

import pytest
from filelock import FileLock
from test_manifest import thaw  # noqa: F401
from test_store import ALL, Toys, quick, quick_toys, toys  # noqa: F401

from helpers.core import disk
from helpers.pipeline import housekeeping


@pytest.fixture
def toy(quick_toys) -> Toys:  # noqa: F811
    return quick_toys


def kinds(toy) -> list[str]:
    return [leftover.kind for leftover in housekeeping.leftovers(toy.runs)]


def test_runs_are_listed_with_date_size_and_headline(toy, thaw):  # noqa: F811
    assert thaw("ls")[0] == 0
    toy.run(name="one", last="split")
    toy.run(name="two")
    (toy.runs / "sweep").mkdir()
    (toy.runs / "one").rename(toy.runs / "sweep" / "one")
    for link in (toy.runs / "sweep" / "one").iterdir():
        if link.is_symlink() and link.name in ALL:
            target = os.path.relpath((toy.runs / "two" / link.name).resolve(), link.parent)
            link.unlink()
            link.symlink_to(target)
    code, shown = thaw("ls")
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert code == 0 and {"sweep/one", "two"} <= set(lines)
    assert "photos:abc" in lines["two"] and " 3 " in lines["two"]
    assert "photos:ab" in lines["sweep/one"] and " 2 " in lines["sweep/one"]
    made = disk.read_json(toy.runs / "two/resize/stage.json")["created"]
    assert made[:16].replace("T", " ") in lines["two"]
    two = next(run for run in housekeeping.runs_in(toy.runs) if run.name == "two")
    assert two.size == sum(housekeeping.size_of(toy.runs / "two" / stage) for stage in ALL) > 0


def test_nothing_goes_that_a_run_needs(toy, thaw):  # noqa: F811
    toy.run()
    toy.run(name="other")
    code, shown = thaw("clean", "--yes")
    assert code == 0 and shown == "Every file belongs to a run.\n"
    toy.ran()
    toy.run()
    assert toy.ran() == []


def test_what_no_run_needs_is_told_and_goes_only_on_yes(toy, thaw, monkeypatch):  # noqa: F811
    toy.run("resize.letter=x", name="old")
    toy.run()
    old = (toy.runs / "old" / "resize").resolve()
    for link in (toy.runs / "old").iterdir():
        link.unlink()
    (toy.runs / "old").rmdir()
    bank = toy.runs / ".store" / "cache" / "0123"
    bank.mkdir(parents=True)
    (bank / "activations.npy").write_bytes(bytes(3_000_000))
    partial = toy.runs / ".store" / "split-0000.partial"
    partial.mkdir()
    partial.with_suffix(".log").write_text("half")
    (toy.runs / ".store" / "kernel-abc").mkdir()
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code, shown = thaw("clean")
    assert code == 1 and old.is_dir(), "no answer is no yes"
    assert f"{old.name}  (stage that no run links to)" in shown and "3.0 MB  0123  (cached activations" in shown
    assert "split-0000.partial  (interrupted stage" in shown and "kernel-abc  (left by a process" in shown
    assert thaw("clean", "--yes")[0] == 0
    assert {path.name for path in (toy.runs / ".store").iterdir() if path.is_dir()} == {
        "cache", *((toy.runs / "toy" / stage).resolve().name for stage in ALL)
    }  # fmt: skip
    assert kinds(toy) == [] and not list((toy.runs / ".store").glob("split-0000*"))
    assert toy.word() == "photos:abc"
    toy.ran()
    toy.run()
    assert toy.ran() == []


def test_a_run_that_is_at_work_is_left_alone(toy, thaw):  # noqa: F811
    toy.run()
    with FileLock((toy.runs / "toy" / "split").resolve().with_suffix(".lock")):
        code, shown = thaw("clean", "--yes")
        assert code == 1 and "A `thaw run` is making split. Clean when it has ended" in shown


def test_what_is_taken_up_meanwhile_stays(toy):
    toy.run("resize.letter=x", name="old")
    (toy.runs / "old" / "resize").unlink()
    (toy.runs / "old" / "02_resize.ipynb").unlink()
    found = housekeeping.leftovers(toy.runs)
    assert len(found) == 1
    toy.run("resize.letter=x", name="new")
    assert housekeeping.remove(toy.runs, found) == 0 and toy.word(run="new") == "photos:abx"


def test_a_stage_that_a_stage_by_hand_links_into_stays(toy):
    """A run's link may lie deep in a folder of one's own."""
    toy.run(name="one", last="explore")
    stored = (toy.runs / "one" / "explore").resolve()
    deep = toy.runs / "mine" / "split" / "train"
    deep.mkdir(parents=True)
    (deep / "word.txt").symlink_to(stored / "word.txt")
    for link in (toy.runs / "one").iterdir():
        link.unlink()
    assert kinds(toy) == []
    (deep / "word.txt").unlink()
    assert kinds(toy) == ["stage that no run links to"]


def test_sizes_count_blocks_once(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10_000))
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    assert housekeeping.size_of(tmp_path) <= 20_480 and housekeeping.size_of(tmp_path / "a") >= 10_000
