"""Nothing is lost: kills at any moment, full disks, read-only folders, on the real notebooks and real weights.

Not part of `make test`; `python -m pytest -m crash -s` takes minutes and prints what it did. The photos and classes
have names that would be code on a web page, which the report of the undisturbed run is looked at for.
"""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from test_store import Toys, toys  # noqa: F401

from helpers.core import disk, progress, project
from helpers.pipeline import execution

pytestmark = pytest.mark.crash

STAGES = ["explore", "split", "resize", "head", "fine_tune", "evaluate"]
AT_ONCE = 2  # runs that are killed, each of which keeps about one core busy
LATEST = 1.3  # of the seconds that a stage took alone: beside another run it takes longer, and its end is hit too
EARLY = 0.5  # for the first kill in a stage, lest it miss it, and in the last stage for all but the last kill
NASTY = {"<script>alert('disc')<": 12, 'square & "more"': 12, "cross": 12}
RECIPE = """
name: tiny
explore: {source: %s}
split: {ratio: [0.5, 0.25, 0.25]}
resize: {image_size: 32}
head: {epochs: 8, views: 2, batch_size: 8}
fine_tune: {unfreeze: block7, epochs: 3, views: 2, batch_size: 8}
"""
ALMOST_FULL = "from helpers.cli import main; from helpers.core import disk; disk.LEAST_FREE_BYTES = 0; main.entry()"
SECRET = "s3cr3t-of-the-environment"


class Place:
    """A folder of runs, and the command that works in it."""

    def __init__(self, folder: Path, recipe: Path):
        self.folder, self.recipe, self.run, self.store = folder, recipe, folder / "tiny", folder / ".store"
        self.environment = os.environ | {"THAW_RUNS": str(folder), "COLUMNS": "200", "MY_TOKEN": SECRET}
        self.environment.pop(progress.PROGRESS_VARIABLE, None)

    def start(self, *arguments, code=("-m", "helpers.cli.main"), before=(), **options) -> subprocess.Popen:
        command = [*before, sys.executable, *code, *map(str, arguments)]
        given = {"cwd": project.ROOT, "env": self.environment, "start_new_session": True, "text": True} | options
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **given)

    def thaw(self, *arguments, expect=0, **options) -> str:
        process = self.start(*arguments, **options)
        shown, _ = process.communicate(timeout=1200)
        assert process.returncode == expect, shown
        assert "Traceback" not in shown
        return shown

    def predictions(self) -> bytes:
        return (self.run / "evaluate" / "predictions.csv").read_bytes()

    def at_work(self) -> str:
        """The stage that is being made, or was when the run was killed; "" between two."""
        return next((log.name.rpartition("-")[0] for log in self.store.glob("*.log")), "")

    def kernels(self) -> set[Path]:
        """The folders that serve kernels; those of kernels that were killed stay."""
        return set(self.store.glob(f"{execution.KERNEL}*"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, image_folder) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    photos = image_folder(folder / "photos", NASTY, size=48)
    first = sorted(photos.rglob("*.png"))[0]
    first.rename(first.with_name("<img src=x onerror=alert(1)>.png"))
    path = folder / "tiny.yaml"
    path.write_text(RECIPE % photos)
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, recipe) -> Place:
    place = Place(tmp_path_factory.mktemp("undisturbed"), recipe)
    place.thaw("run", recipe)
    return place


@pytest.fixture(scope="module")
def seconds(undisturbed) -> dict[str, float]:
    """How long each stage takes here."""
    return {stage: disk.read_json(undisturbed.run / stage / "stage.json")["seconds"] for stage in STAGES}


# Kills


def kill(place: Place, stage: str, after: float) -> str:
    """Start `thaw run`, kill its process group so many seconds into `stage` or at its end; return where that was.

    Where a kill before came so late that the stage is done, it is killed in the next; "" if there is none and it ended.
    """
    before, reached = place.kernels(), STAGES[STAGES.index(stage) :]
    process = place.start("run", place.recipe)
    while process.poll() is None and not (place.kernels() - before and place.at_work() in reached):
        time.sleep(0.01)
    stage, end = place.at_work(), time.monotonic() + after
    while process.poll() is None and place.at_work() == stage and time.monotonic() < end:
        time.sleep(0.01)
    hit = place.at_work() or f"after {stage}"
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    shown, _ = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), shown
    return hit if process.returncode else ""


def complete(place: Place, undisturbed: Place) -> None:
    """Run what was killed to its end, compare it with the undisturbed run, and remove it."""
    place.thaw("run", place.recipe)
    assert place.predictions() == undisturbed.predictions()
    left = [path.name for path in place.store.rglob("*") if path.suffix in (".partial", ".tmp", ".log", ".discarded")]
    assert [name for name in left if name != "notebook.log"] == []
    for stage in ("head", "fine_tune"):
        whole, resumed = (pd.read_csv(one.run / stage / "history.csv") for one in (undisturbed, place))
        pd.testing.assert_frame_equal(whole.drop(columns="seconds"), resumed.drop(columns="seconds"))
    assert place.thaw("verify", place.run).count("as it was made") == len(STAGES) + 2
    shutil.rmtree(place.folder)


def fifteen_kills(undisturbed: Place, seconds: dict[str, float], folder: Path, number: int) -> Counter:
    """Kill one run two or three times in each stage; return where it was hit."""
    rng, hits, place = random.Random(number), Counter(), Place(folder / "0", undisturbed.recipe)
    stages = sorted(STAGES * 2 + STAGES[number::2], key=STAGES.index)
    for kills, (before, stage) in enumerate(pairwise(["", *stages]), 1):
        is_early = stage != before or (stage == STAGES[-1] and kills < len(stages))
        after = rng.uniform(0, EARLY if is_early else LATEST) * seconds[stage]
        while not (hit := kill(place, stage, after)):  # it ended: the kill before came too late to leave anything to do
            complete(place, undisturbed)
            place = Place(folder / str(sum(hits.values())), undisturbed.recipe)
        hits[hit] += 1
    complete(place, undisturbed)
    return hits


def test_thirty_kills_change_nothing(undisturbed, seconds, tmp_path_factory, capsys):
    folders, begun = [tmp_path_factory.mktemp("killed") for _ in range(AT_ONCE)], time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(partial(fifteen_kills, undisturbed, seconds), folders, range(AT_ONCE)))
    hits = sum(found, Counter())
    assert sum(hits.values()) == 30 and set(STAGES) <= set(hits)
    with capsys.disabled():
        print(f"\n30 kills of {dict(hits)} in {time.monotonic() - begun:.0f} s: 0 differences")


def test_a_kernel_that_outlives_its_run_is_waited_for(toys):  # noqa: F811
    """It usually ends within a second. Here it does not notice, and writes on while the next run begins."""
    mark, written = toys.folder / "mark", toys.folder / "written"
    toys.trouble.write_text(
        "import os, time; from pathlib import Path; os._exit = lambda code: None\n"
        f"Path({str(mark)!r}).write_text('x'); time.sleep(8); Path({str(written)!r}).write_text('x')\n"
        "os.kill(os.getpid(), 9)"
    )
    process = toys.command("run", str(toys.recipe), start_new_session=True)
    while not mark.exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    toys.trouble.write_text(f"assert Path({str(written)!r}).exists()")
    again = toys.command("run", str(toys.recipe))
    shown, _ = again.communicate(timeout=300)
    assert again.returncode == 0, shown
    assert "the kernel of a run that was killed is still ending; waiting for it" in shown
    assert toys.word() == "photos:abc"


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A function that leaves so many bytes for each file or for all, and what gives the space back."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", disk], capture_output=True, check=False
    )
    yield disk if mounted.returncode == 0 else None
    subprocess.run(["umount", "-l", disk], capture_output=True, check=False)


def test_a_full_disk_in_each_stage_loses_nothing(small_disk, undisturbed, recipe, tmp_path, capsys):
    """On a tmpfs that a ballast fills; where none can be mounted, by a limit to the size of files."""
    place, free = Place((small_disk or tmp_path) / "runs", recipe), dict.fromkeys(STAGES, 150_000)
    free |= {"split": 40_000} | dict.fromkeys(STAGES[3:], 3_000_000)
    place.folder.mkdir()
    ballast = place.folder.parent / "ballast"
    for stage in STAGES:
        options = {"code": ("-c", ALMOST_FULL)}
        if small_disk:
            left = shutil.disk_usage(small_disk).free - free[stage]
            with open(ballast, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, left)
        else:
            limit = (free[stage] // 3, free[stage] // 3)
            options["preexec_fn"] = lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        shown = place.thaw("run", recipe, "--to", stage, expect=1, **options)
        ballast.unlink(missing_ok=True)
        assert "is full. `thaw clean` lists what can be deleted" in shown and stage in shown, shown
        assert not re.search(rf"/\d {stage} +[\d.]+ s", shown), f"it was full only after {stage}: {shown}"
        with capsys.disabled():
            print(f"\n{'full disk' if small_disk else 'file size'} in {stage}: {shown.splitlines()[1][:150]}")
        place.thaw("run", recipe, "--to", stage)
    assert place.predictions() == undisturbed.predictions()
    assert place.thaw("verify", place.run).count("as it was made") == len(STAGES) + 2


# Folders that cannot be written to


def bound() -> list[str]:
    """What makes even root obey the permissions of folders."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root obeys no permissions, and setpriv (util-linux) is not here")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]


@pytest.fixture
def read_only():
    """A function that takes the right to write from a folder and all below it, for the test."""
    changed = []

    def protect(folder: Path) -> Path:
        for path in [*folder.rglob("*"), folder]:
            if not path.is_symlink():
                changed.append((path, path.stat().st_mode))
                path.chmod(path.stat().st_mode & ~0o222)
        return folder

    yield protect
    for path, mode in reversed(changed):
        path.chmod(mode)


def test_a_run_that_is_read_only_can_be_looked_at_and_used(undisturbed, recipe, read_only):
    read_only(undisturbed.folder)
    photo = sorted((recipe.parent / "photos").rglob("*.png"))[0]
    before = bound()
    assert "nothing to do" not in undisturbed.thaw("run", recipe, "--dry-run", before=before)
    assert undisturbed.thaw("show", recipe, before=before).count(" done") >= len(STAGES)
    assert "tiny" in undisturbed.thaw("ls", before=before)
    assert undisturbed.thaw("verify", undisturbed.run, before=before).count("as it was made") == len(STAGES) + 2
    assert str(photo) in undisturbed.thaw("predict", undisturbed.run, photo, before=before)
    shown = undisturbed.thaw("run", recipe, "--name", "new", "--set", "split.seed=9", before=before, expect=1)
    assert "cannot be written to. Change its permissions, or set THAW_RUNS to a folder of your own." in shown


def test_project_photos_and_home_may_be_read_only(undisturbed, recipe, read_only, tmp_path):
    """As in a container whose user is not the owner of the project."""
    checkout, home = tmp_path / "project", tmp_path / "home"
    for name in ("helpers", "notebooks", "recipes"):
        shutil.copytree(project.ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(project.ROOT / "pyproject.toml", checkout)
    home.mkdir()
    for folder in (checkout, home, recipe.parent):
        read_only(folder)
    place = Place(tmp_path / "runs", recipe)
    place.environment |= {"HOME": str(home), "PYTHONPATH": str(checkout)}
    place.environment.pop("KERAS_HOME", None)
    place.thaw("run", recipe, before=bound(), cwd=checkout)
    first, second = (pd.read_csv(one.run / "evaluate" / "predictions.csv") for one in (undisturbed, place))
    pd.testing.assert_frame_equal(first, second)


# Places and clocks


def test_the_store_on_another_file_system_and_a_clock_set_back(undisturbed, recipe, tmp_path):
    """The store lies behind a link in /dev/shm; the first three stages are dated next year."""
    other = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    elsewhere = other / f"thaw-test-{os.getpid()}"
    elsewhere.mkdir()
    place = Place(tmp_path / "runs", recipe)
    place.folder.mkdir()
    place.store.symlink_to(elsewhere)
    try:
        place.thaw("run", recipe, "--to", "resize")
        later = time.time() + 365 * 86400
        for path in [*elsewhere.rglob("*"), *place.run.rglob("*")]:
            os.utime(path, (later, later), follow_symlinks=False)
        shown = place.thaw("run", recipe)
        assert "3/6 resize" not in shown and "4/6 head" in shown
        assert place.predictions() == undisturbed.predictions()
        assert place.thaw("verify", "tiny").count("as it was made") == len(STAGES) + 2
    finally:
        shutil.rmtree(elsewhere)


def test_a_file_edited_by_hand_is_found_and_made_again(undisturbed, recipe, tmp_path):
    place = Place(tmp_path / "runs", recipe)
    shutil.copytree(undisturbed.folder, place.folder, symlinks=True)
    file = place.run / "split" / "split.csv"
    before = file.stat()
    file.chmod(0o644)
    file.write_bytes(file.read_bytes().replace(b"test", b"tset", 1))
    shown = place.thaw("verify", place.run, expect=1)
    assert "split.csv was changed" in shown and shown.count("as it was made") == len(STAGES) + 1
    shown = place.thaw("run", recipe, expect=1)
    assert "was changed since it was made (split.csv)" in shown and "--rebuild split" in shown
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "split.csv was changed" in place.thaw("verify", place.run, expect=1), "whatever its date"


# The undisturbed run


def test_names_that_are_code_stay_text(undisturbed):
    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.found, self.handlers = Counter(), []

        def handle_starttag(self, tag, attributes):
            self.found[tag] += 1
            self.handlers += [name for name, _ in attributes if name.startswith("on")]

    tags, text = Tags(), (undisturbed.run / "report.html").read_text(encoding="utf-8")
    tags.feed(text)
    assert tags.found["script"] == 1 and tags.handlers == [], "the report's own script, and none of the photos'"
    assert "&lt;script&gt;alert(" in text


def test_nothing_of_the_environment_is_kept(undisturbed):
    files = [path for path in undisturbed.folder.rglob("*") if path.is_file()]
    assert len(files) > 50 and not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_the_run_is_made_again_elsewhere_and_agrees(undisturbed, tmp_path):
    shown = undisturbed.thaw("reproduce", undisturbed.run, "--runs", tmp_path / "again")
    assert "The predictions are equal, byte for byte." in shown and "Differs: nothing" in shown
