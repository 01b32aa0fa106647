"""What the making of a stage survives: a kill after its last cell, a full disk, leftovers, read-only folders.

On the toy notebooks of test_store.py, within this process; the real ones are in test_crash.py.
"""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
import time

import papermill
import pytest
from test_store import ALL, Toys, quick, quick_toys, toys  # noqa: F401

from helpers.core import disk, project, stages
from helpers.data import inventory
from helpers.pipeline import execution, planning, store


@pytest.fixture
def toy(quick_toys) -> Toys:  # noqa: F811
    return quick_toys


class Killed(BaseException):
    """What a SIGKILL does to a process, as far as files go: nothing after it happens."""


def dies_in(monkeypatch, module, name: str):
    original = getattr(module, name)

    def dies(*_, **__):
        monkeypatch.setattr(module, name, original)
        raise Killed

    monkeypatch.setattr(module, name, dies)


@pytest.mark.parametrize(
    "where", [(store, "contents"), (disk, "discard"), (planning, "link_stage")], ids=lambda w: w[1]
)
def test_killed_after_the_last_cell_nothing_is_run_again(toy, monkeypatch, where):
    dies_in(monkeypatch, *where)
    with pytest.raises(Killed):
        toy.run()
    assert toy.ran() == ["explore"]
    toy.run()
    assert toy.ran() == ["split", "resize"] and toy.word() == "photos:abc"
    log = (toy.runs / "toy/explore/notebook.log").read_text()
    assert "Written to" in log, "the log of the run that was killed is kept"
    assert not list((toy.runs / ".store").glob("*.log"))


def test_killed_while_the_executed_notebook_was_written_the_stage_is_run_again(toy, monkeypatch):
    dies_in(monkeypatch, store, "contents")
    with pytest.raises(Killed):
        toy.run()
    (partial,) = (toy.runs / ".store").glob("*.partial")
    (partial / "notebook.ipynb").rename(partial.with_suffix(".ipynb"))
    partial.with_suffix(".ipynb").write_text('{"cells": [')
    toy.ran()
    toy.run()
    assert toy.ran() == ALL and toy.word() == "photos:abc"


def test_a_partial_folder_without_a_record_is_begun_anew(toy, monkeypatch):
    dies_in(monkeypatch, store, "contents")
    with pytest.raises(Killed):
        toy.run()
    (partial,) = (toy.runs / ".store").glob("*.partial")
    (partial / "stage.json").write_text("")  # as after a power cut
    toy.run()
    assert toy.word() == "photos:abc"


def test_what_killed_processes_leave_goes_with_the_next_run(toy, monkeypatch):
    dies_in(monkeypatch, store, "contents")
    with pytest.raises(Killed):
        toy.run()
    (partial,) = (toy.runs / ".store").glob("*.partial")
    (partial / ".images.csv.4711.tmp").write_text("half")
    (partial.parent / f"kernel-{os.getpid()}").mkdir()
    run = toy.runs / "toy"
    run.mkdir(exist_ok=True)
    (run / f".explore.{os.getpid()}.tmp").symlink_to("nowhere")  # of a link that was being laid, by our own number
    toy.run()
    assert not list(toy.runs.rglob("*.tmp")) and toy.word() == "photos:abc"


def test_rebuilding_never_leaves_half_of_a_stage_in_its_place(toy, monkeypatch):
    toy.run()
    place = (toy.runs / "toy/resize").resolve()

    def dies(path, ignore_errors=False):
        if not ignore_errors:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(disk.shutil, "rmtree", dies)
        toy.run(rebuild="resize")
    assert not place.exists() and list(place.parent.glob(".resize-*.discarded/word.txt")), "it went whole"
    toy.run()
    assert toy.word() == "photos:abc"


def test_the_kernel_of_a_killed_run_is_waited_for(toy):
    """A kernel writes on for a moment when its `thaw run` was killed; it holds the lock of the log it prints to."""
    log = toy.plan()["explore"].partial.with_suffix(".log")
    with open(log, "a") as orphan:
        fcntl.flock(orphan, fcntl.LOCK_EX)
        ended = []

        def end():
            time.sleep(0.5)
            ended.append(toy.ran())
            fcntl.flock(orphan, fcntl.LOCK_UN)

        thread = threading.Thread(target=end)
        thread.start()
        shown = toy.run()
        thread.join()
    assert ended == [[]], "nothing ran while the kernel was alive"
    assert "the kernel of a run that was killed is still ending; waiting for it" in shown


@pytest.mark.parametrize("where", [(papermill, "execute_notebook"), (store, "contents"), (os, "replace")], ids=str)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_nothing_is_lost(toy, monkeypatch, where, code):
    def full(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(*where, full)
        with pytest.raises(planning.StageError, match=r"explore stopped: the disk of .* is full\. `thaw clean`"):
            toy.run()
    toy.run()
    assert toy.word() == "photos:abc"


@pytest.mark.parametrize(
    "text",
    [
        "OSError: [Errno 28] No space left on device: '/x/images.csv'",
        "[Errno 122] Disk quota exceeded",
        "Can't write data (file write failed: errno = 28, error message = 'No space left on device')",
        "/x/y.npy; No space left on device [Op:WriteFile]",
    ],
)
def test_a_full_disk_is_known_by_what_libraries_say(text):
    assert execution.NO_SPACE.search(text)
    assert not execution.NO_SPACE.search("ValueError: errno 2800 is not known, 28 images")


def test_a_folder_that_cannot_be_written_to_can_be_looked_at(toy, monkeypatch):
    toy.run()
    monkeypatch.setattr(disk, "is_writable", lambda folder: False)
    asked = []
    monkeypatch.setattr(inventory, "source_fingerprint", lambda p, cache: asked.append(cache) or "photos:")
    assert set(toy.why().values()) == {"done"} and asked == [None]
    with pytest.raises(PermissionError, match=r"cannot be written to\. Change its permissions, or set THAW_RUNS"):
        toy.run(rebuild="resize")


def test_a_folder_that_cannot_be_made_is_not_writable(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(store.Path, "mkdir", refuse)
    assert not disk.is_writable(tmp_path / "runs")


def test_the_store_may_lie_behind_a_link_on_another_file_system(toy, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("big_disk")
    toy.runs.mkdir()
    (toy.runs / ".store").symlink_to(elsewhere)
    toy.run()
    assert toy.word() == "photos:abc" and list(elsewhere.glob("resize-*/word.txt"))
    toy.ran()
    toy.run(name="other")
    assert toy.ran() == [] and toy.word(run="other") == "photos:abc"


def test_a_clock_that_was_set_back_changes_nothing(toy, monkeypatch):
    later = time.time() + 1e7
    with monkeypatch.context() as patch:
        patch.setattr(stages.time, "time", lambda: later)
        toy.run(last="split")
        dies_in(patch, store, "contents")
        with pytest.raises(Killed):
            toy.run()
    for path in toy.runs.rglob("*"):
        os.utime(path, (later, later), follow_symlinks=False)
    assert toy.ran() == ALL
    toy.run()
    assert toy.ran() == [] and toy.word() == "photos:abc"
    toy.run(rebuild="resize")
    assert all(disk.read_json(toy.runs / "toy" / name / "stage.json")["seconds"] >= 0 for name in ALL)


def test_files_of_a_stage_stay_read_only_when_it_is_kept_again(toy, monkeypatch):
    dies_in(monkeypatch, disk, "discard")
    with pytest.raises(Killed):
        toy.run(last="explore")
    toy.run(last="explore")
    assert not (toy.runs / "toy/explore/word.txt").stat().st_mode & stat.S_IWUSR


WITHOUT_GRAMMAR = """
import sys
from helpers.core.mended import jsonschema

jsonschema.correct()
import nbconvert, nbformat, papermill

assert "rfc3987_syntax" not in sys.modules
try:
    nbformat.validate(nbformat.v4.new_notebook(metadata=3))
except nbformat.ValidationError:
    print("refused")
import rfc3987_syntax  # is there for whoever needs it later
"""


def test_papermill_is_imported_without_a_grammar_that_takes_a_second():
    done = subprocess.run([sys.executable, "-c", WITHOUT_GRAMMAR], cwd=project.ROOT, capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
