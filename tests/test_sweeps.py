"""Sweeps: what a file means, what is refused, that shared stages are made once, and that nothing is lost."""

import io
import os
import signal
import time

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from test_store import FINISH, IMPORTS, NEXT_WORD, OPEN, SPLIT, toys  # noqa: F401

from helpers.cli import sweep as command
from helpers.core import disk, notebooks, project, stages
from helpers.evaluation import members
from helpers.pipeline import recipes
from helpers.pipeline.sweeps import axes, conduct, files, jobs, plans
from helpers.reports import studies

ROOT = project.ROOT
SWEEPS = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    """Write a sweep on elpv.yaml and return its path."""

    def write(text: str):
        path = tmp_path / "study.yaml"
        path.write_text(f"extends: {ROOT / 'recipes' / 'elpv.yaml'}\nname: s\n{text}\n")
        return path

    return write


def names(sweep: files.Sweep) -> list[str]:
    return [member.name for member in sweep.members]


# What a file means


def test_a_grid_is_every_value_with_every_other(write):
    found = files.load(write("grid: {fine_tune.epochs: [1, 2], head.dropout: [0.1, 0.2, 0.3]}"))
    assert names(found)[:2] == ["epochs-1_dropout-0p1", "epochs-1_dropout-0p2"] and len(found.members) == 6
    assert found.members[-1].recipe.resolved("fine_tune")["epochs"] == 2
    assert found.members[-1].recipe.resolved("head")["dropout"] == 0.3
    assert found.members[0].recipe.name == "s/epochs-1_dropout-0p1"


def test_a_zip_goes_side_by_side(write):
    found = files.load(write("zip: {fine_tune.epochs: [1, 2], head.dropout: [0.1, 0.2]}"))
    assert names(found) == ["epochs-1_dropout-0p1", "epochs-2_dropout-0p2"]


def test_members_are_named_sets_of_parameters(write):
    found = files.load(write("members: {plain: {}, deep: {head: {dense: [64], solver: gradient}}}"))
    assert names(found) == ["plain", "deep"] and found.members[1].recipe.resolved("head")["dense"] == [64]


def test_a_range_by_decades_is_that_of_the_study(write):
    found = files.load(write("grid: {fine_tune.learning_rate: {log: [1e-6, 1e-2], per_decade: 4}}"))
    rates = [member.labels["fine_tune.learning_rate"] for member in found.members]
    assert len(rates) == 17 and rates[:5] == [1e-6, 1.78e-6, 3.16e-6, 5.62e-6, 1e-5] and rates[-1] == 1e-2


def test_a_linear_range_of_a_whole_parameter_is_whole(write):
    found = files.load(write("grid: {fine_tune.epochs: {linear: [1, 9], count: 5}}"))
    assert [member.labels["fine_tune.epochs"] for member in found.members] == [1, 3, 5, 7, 9]


def test_a_value_may_have_a_name_and_be_a_key_of_a_dict(write):
    found = files.load(
        write(
            "fine_tune: {optimizer: {name: adamw}}\ngrid: {fine_tune.unfreeze: {PT0: none, PT2: 0.4},"
            " fine_tune.optimizer.weight_decay: [1e-3, 1]}"
        )
    )
    assert names(found)[1] == "unfreeze-PT0_weight_decay-1"
    tune = found.members[2].recipe.resolved("fine_tune")
    assert tune["unfreeze"] == 0.4 and tune["optimizer"] == {"name": "adamw", "weight_decay": 1e-3}


@pytest.mark.parametrize(
    ("which", "split", "training"), [("split", {1, 2}, {7}), ("training", {7}, {1, 2}), ("both", {1, 2}, {1, 2})]
)
def test_seeds_say_which(write, which, split, training):
    found = files.load(write(f"seeds: {{{which}: [1, 2]}}"))
    seeds = [{stage: m.recipe.resolved(stage)["seed"] for stage in ("split", "head", "fine_tune", "evaluate")}
             for m in found.members]  # fmt: skip
    assert {one["split"] for one in seeds} == split
    assert {one["head"] for one in seeds} == {one["fine_tune"] for one in seeds} == training
    assert {one["evaluate"] for one in seeds} == {7}, "what measures keeps its seed"


def test_letters_are_group_set_and_experiment(write):
    found = files.load(write("names: {letters: C}\ngrid: {resize.image_size: [64, 96], fine_tune.epochs: [1, 2, 3]}"))
    assert names(found) == ["CAA", "CAB", "CAC", "CBA", "CBB", "CBC"]


def test_a_pattern_names_the_members(write):
    assert names(files.load(write('names: "e{epochs}"\ngrid: {fine_tune.epochs: [1, 2]}'))) == ["e1", "e2"]


@pytest.mark.parametrize(
    ("label", "text"), [(1e-4, "1e-4"), (3.16e-4, "3.16e-4"), (0.4, "0.4"), (1.0, "1"), (5, "5"), ("all", "all")]
)
def test_labels_are_written_as_people_write_them(label, text):
    assert axes.as_text(label) == text


# What is refused


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "nothing varies: give grid, zip, members or seeds"),
        ("gird: {}", "gird: a sweep has no such key. Did you mean grid"),
        ("grid: {fine_tune.epoch: [1]}", "fine_tune.epoch: there is no such parameter. Did you mean epochs?"),
        ("grid: {finetune.epochs: [1]}", "finetune.epochs: there is no such stage. Did you mean fine_tune?"),
        ("grid: {fine_tune.epochs: [1, many]}", "fine_tune.epochs: expected int in [1, 10000], got 'many'"),
        ("grid: {fine_tune.learning_rate: [1, 20]}", "expected float in (0, 10], got 20"),
        ("grid: {fine_tune.epochs: 3}", "grid.fine_tune.epochs: expected a list of values"),
        ("grid: {fine_tune.epochs: []}", "there is no value"),
        ("grid: {fine_tune.learning_rate: {log: [0, 1], per_decade: 4}}", "log above 0"),
        ("grid: {fine_tune.learning_rate: {log: [1e-3, 1]}}", "expected {log: [1e-6, 1e-2], per_decade: 4}"),
        ("grid: {fine_tune.optimizer.epsilon: [1]}", "fine_tune.optimizer must be a dict in the recipe"),
        ("zip: {fine_tune.epochs: [1, 2], head.dropout: [0.1]}", "fine_tune.epochs has 2, head.dropout has 1"),
        ("seeds: [1, 2]", "seeds: say which"),
        ("grid: {fine_tune.epochs: [1, 1]}", "two members would be called epochs-1"),
        ("members: {a: {}, b: {}}", "a and b are the same run"),
        ('names: "x{rate}"\ngrid: {fine_tune.epochs: [1]}', "has a field that is none of epochs"),
        ("names: study\nseeds: {both: [1]}", "'study' cannot name a member"),
        ("to: haed\nseeds: {both: [1]}", "There is no stage 'haed'. Did you mean head?"),
        ("seeds: {both: [1]}\nhead: {epoch: 3}", "head.epoch: there is no such parameter"),
        ("names: letters\ngrid: {fine_tune.epochs: {linear: [1, 40], count: 40}}", "up to 26 experiments"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(refuse, text, expected):
    assert expected in refuse(text)


def test_thaw_run_says_that_a_sweep_is_none_of_its_files(write):
    with pytest.raises(notebooks.RecipeError, match="grid: this belongs to a sweep, which `thaw sweep` runs"):
        recipes.load(write("grid: {fine_tune.epochs: [1]}"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_in_the_suite_expands_and_says_how_to_run_it(path):
    sweep = files.load(path)
    assert len(sweep.members) > 1 or sweep.search.trials > 1
    text = path.read_text(encoding="utf-8")
    assert f"# Run: thaw sweep {path.relative_to(ROOT)}" in text and path.stem.startswith(("elpv_", "s4_", "s5_"))


# What is made


@pytest.fixture
def small(toys, monkeypatch):  # noqa: F811
    """A sweep of toys: two letters of split times two of resize over one explore; the study is left out."""
    path = toys.folder / "sweep.yaml"
    path.write_text(f"extends: {toys.recipe}\nname: s\ngrid: {{split.letter: [x, y], resize.letter: [p, q]}}\n")
    monkeypatch.setattr(command, "_study", lambda *arguments: None)
    return path


def run(path, **options) -> tuple[int, str]:
    shown = io.StringIO()
    failed = command.run(files.load(path), Console(file=shown, width=200), **options)
    return failed, shown.getvalue()


def words_of(sweep: files.Sweep) -> dict[str, str]:
    return {m.name: (sweep.folder / m.name / "resize" / "word.txt").read_text() for m in sweep.members}


@pytest.fixture
def named(small):
    """The same with names of their own, since both parameters are called letter."""
    members = {f"{a}{b}": f"{{split: {{letter: {a}}}, resize: {{letter: {b}}}}}" for a in "xy" for b in "pq"}
    text = (
        small.read_text().split("grid:")[0] + "members: {" + ", ".join(f"{k}: {v}" for k, v in members.items()) + "}\n"
    )
    small.write_text(text)
    return small


def test_parameters_of_the_same_name_are_told_apart_by_their_stage(small):
    assert names(files.load(small))[0] == "split_letter-x_resize_letter-p"


def test_shared_stages_are_made_once_and_members_are_ordinary_runs(named, toys):  # noqa: F811
    failed, shown = run(named)
    assert not failed and sorted(toys.ran()) == ["explore"] + ["resize"] * 4 + ["split"] * 2
    assert "7 stages instead of 12" in shown
    sweep = files.load(named)
    assert words_of(sweep) == {"xp": "photos:axp", "xq": "photos:axq", "yp": "photos:ayp", "yq": "photos:ayq"}
    for member in sweep.members:
        again = recipes.load(sweep.folder / member.name / "recipe.yaml")
        assert again.name == f"s/{member.name}" and (sweep.folder / member.name / "manifest.json").is_file()
    table = pd.read_csv(sweep.folder / "sweep.csv")
    assert list(table["state"]) == ["done"] * 4 and list(table["set"]) == ["xp", "xq", "yp", "yq"]
    assert not run(named)[0] and toys.ran() == [], "nothing is made twice"


def test_a_dry_run_makes_nothing_and_estimates_from_what_was_made(named, toys):  # noqa: F811
    failed, shown = run(named, dry_run=True)
    assert not failed and toys.ran() == [] and "of which none was made here yet" in shown
    toys.run()
    shown = run(named, dry_run=True)[1]
    assert "explore       1 different, 0 to do" in shown and "none was made" not in shown


def test_a_failed_member_is_a_row_and_the_others_go_on(named, toys):  # noqa: F811
    toys.write(
        "01_split",
        SPLIT,
        IMPORTS,
        OPEN,
        'if letter == "y": raise ValueError("no y")',
        NEXT_WORD.format("explore"),
        FINISH,
    )
    failed, shown = run(named)
    assert failed == 2 and "no y" in shown
    table = pd.read_csv(project.runs_folder() / "s" / "sweep.csv").set_index("member")
    assert list(table["state"]) == ["done", "done", "failed", "failed"] and "no y" in table.loc["yp", "error"]


TOY_STUDY = """
sweep: str = "runs/demo_sweep"  # folder whose runs are compared
out: str = "runs/demo/study"  # folder this notebook writes
"""
TELL = """
words = {path.parent.parent.name: path.read_text() for path in sorted(project.resolve(sweep).glob("*/resize/word.txt"))}
(folder / "leaderboard.txt").write_text(str(words))
stages.finish(folder, files=["leaderboard.txt"], headline=str(len(words)))
"""


@pytest.fixture
def whole(named, toys):  # noqa: F811
    """The same sweep with a toy study at its end."""
    toys.write("study", TOY_STUDY, IMPORTS, "folder = stages.open(out, {})", TELL)
    return named


def test_a_sweep_that_was_killed_goes_on_and_ends_with_the_same(whole, toys, tmp_path):  # noqa: F811
    toys.trouble.write_text("")
    process, store = toys.command("sweep", str(whole)), project.runs_folder() / ".store"
    limit = time.monotonic() + 60
    while len(list(store.glob("split-*/stage.json"))) < 1 and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    made = set(toys.ran())
    again = toys.command("sweep", str(whole))
    shown, _ = again.communicate(timeout=120)
    assert again.returncode == 0, shown
    assert "explore" in made and "explore" not in toys.ran(), "what was done is not done again"
    sweep = files.load(whole)
    assert words_of(sweep) == {"xp": "photos:axp", "xq": "photos:axq", "yp": "photos:ayp", "yq": "photos:ayq"}
    assert disk.read_json(sweep.folder / "study" / stages.STAGE_FILE)["headline"] == "4"


def test_jobs_share_the_cores_out():
    here = os.sched_getaffinity(0)
    assert set().union(*jobs.assign_cores(2)) == here
    if len(here) > 1:
        assert not set.intersection(*jobs.assign_cores(2))
    assert len(jobs.assign_cores(len(here) + 3)) == len(here) + 3 and all(jobs.assign_cores(len(here) + 3))


class Counted:
    """Makes units without doing anything, and notes how many are under way at a time."""

    def __init__(self):
        self.names, self.now, self.most = [], 0, 0

    def __call__(self, unit, place):
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.05)
        for needed in unit.needs:
            assert (needed / stages.STAGE_FILE).is_file(), "what it reads is made before it"
        unit.step.folder.mkdir(parents=True)
        disk.write_json(unit.step.folder / stages.STAGE_FILE, {"status": "done", "headline": "made"})
        self.names.append(unit.step.folder.name)
        self.now -= 1
        return 0.05


def test_side_by_side_no_stage_is_made_twice_and_each_after_what_it_reads(named, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(conduct, "finish", lambda member, last: None)
    planned, make = plans.plan(files.load(named)), Counted()
    with ThreadPoolExecutor(3) as pool:
        events = list(conduct.run(planned, make, pool, 3))
    assert len(make.names) == len(set(make.names)) == 7 and make.most > 1
    assert sum(isinstance(event, conduct.Complete) for event in events) == 4


def test_a_job_in_a_process_of_its_own_tells_the_error_of_its_stage(tmp_path, image_folder, monkeypatch):
    monkeypatch.setenv("THAW_RUNS", str(tmp_path / "runs"))
    photos = image_folder(tmp_path / "photos", {"cat": 4, "dog": 4}, size=32)
    path = tmp_path / "s.yaml"
    path.write_text(f"name: s\nexplore: {{source: {photos}}}\ngrid: {{split.rare: [error, drop]}}\nto: split\n")
    sweep = files.load(path)
    planned = plans.plan(sweep)
    children = jobs.Jobs(1)
    explore = next(unit for unit in planned.units.values() if unit.step.stage.name == "explore")
    assert children.make(explore, "1/3") > 0 and (explore.step.folder / stages.STAGE_FILE).is_file()
    (photos / "cat" / "cat-00.png").unlink()
    split = next(unit for unit in planned.units.values() if unit.step.stage.name == "split")
    with pytest.raises(RuntimeError, match="changed since the sweep began"):
        children.make(split, "2/3")


# What the members tell together


def history(member: str, losses: list[float], train: list[float]) -> pd.DataFrame:
    count = len(losses)
    table = {"epoch": range(1, count + 1), "phase": "fine_tune", "loss": train, "accuracy": 0.9, "val_loss": losses}
    return pd.DataFrame(table | {"val_accuracy": 0.8, "learning_rate": 1e-3, "seconds": 1.0})


@pytest.fixture
def folder(tmp_path):
    """A sweep of two rates and two seeds, whose losses are known, and one member that failed."""
    place, rows = tmp_path / "sweep", []
    for name, rate, seed, low in (
        ("a1", 1e-4, 1, 0.50),
        ("a2", 1e-4, 2, 0.54),
        ("b1", 1e-2, 1, 0.9),
        ("b2", 1e-2, 2, 0.8),
    ):
        (place / name / "fine_tune").mkdir(parents=True)
        (place / name / "recipe.yaml").write_text(
            f"name: s/{name}\nfine_tune: {{learning_rate: {rate}, seed: {seed}}}\n"
        )
        table = history(name, [low + 0.2, low, low + 0.1], [low, low / 2, low / 4])
        table.to_csv(place / name / "fine_tune" / "history.csv", index=False)
        rows.append([name, rate, seed, "done", ""])
    rows.append(["c1", 1.0, 1, "failed", "the loss is no number"])
    columns = ["member", "fine_tune.learning_rate", "seed", "state", "error"]
    pd.DataFrame(rows, columns=columns).to_csv(place / "sweep.csv", index=False)
    return place


def test_the_scores_of_a_member_are_those_of_its_lowest_loss():
    found = members.scores(history("m", [0.6, 0.4, 0.5], [0.6, 0.2, 0.125]))
    assert found["val_loss"] == 0.4 and found["best_epoch"] == 2 and np.isclose(found["loss_area"], 0.5)
    assert np.isclose(found["gap"], 0.1) and np.isclose(found["overfitting"], 1.5)  # through 1, 2, 4


def test_a_loss_that_is_no_number_is_no_score():
    found = members.scores(history("m", [np.nan, np.nan], [np.nan, np.nan]))
    assert "val_loss" not in found and found["epochs"] == 2


def test_the_leaderboard_has_means_and_intervals_over_seeds(folder):
    table, _, varies = members.read(folder)
    assert varies == ["fine_tune.learning_rate", "seed"] and table.loc[4, "error"] == "the loss is no number"
    board = members.leaderboard(table, varies)
    assert list(board["fine_tune.learning_rate"]) == [1e-4, 1e-2] and list(board["seeds"]) == [2, 2]
    half = 12.706 * np.std([0.50, 0.54], ddof=1) / np.sqrt(2)
    assert np.isclose(board.loc[0, "val_loss"], 0.52) and np.isclose(board.loc[0, "high"], 0.52 + half, atol=1e-4)
    assert "overlaps that of the second" in members.sentence(board, varies)


def test_without_a_sweeps_table_what_varies_is_read_from_the_recipes(folder):
    (folder / "sweep.csv").unlink()
    table, _, varies = members.read(folder)
    assert set(varies) == {"fine_tune.learning_rate", "fine_tune.seed"} and len(table) == 4


def test_a_folder_without_histories_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run with a history"):
        members.read(tmp_path)


def test_main_effects_and_two_way_tables_are_means_over_members():
    rows = [(size, part, 0.1 * size + (0.05 if part == "all" else 0)) for size in (1, 2, 3) for part in ("none", "all")]
    table = pd.DataFrame(rows, columns=["head.size", "part", "val_loss"]).assign(
        val_accuracy=lambda t: 1 - t["val_loss"]
    )
    found = members.effects(table, ["head.size", "part"]).set_index(["factor", "value"])["effect"]
    assert np.isclose(found["part", "all"], 0.025) and np.isclose(found["head.size", 1], -0.1)
    cells = members.two_way(table, ["head.size", "part"])
    assert np.isclose(cells.loc[2, "all"], 0.75) and members.two_way(table, ["part"]) is None


def test_figures_are_drawn_where_they_apply_and_say_why_where_not(folder, capsys):
    table, histories, varies = members.read(folder)
    ax = studies.many_curves(histories, ["a1"])
    assert len(ax.get_lines()) == 4 and [t.get_text() for t in ax.get_legend().get_texts()] == ["a1"]
    axes_ = studies.against(table.assign(**{"fine_tune.learning_rate": [1e-4, 1e-3, 1e-2, 1e-1, 1.0]}), varies)
    assert axes_[0].get_xscale() == "log" and len(axes_) == 3
    assert studies.heat(None) is None and studies.parallel(table, varies) is None
    assert studies.effects(members.effects(table, varies)) is None
    assert capsys.readouterr().out.count("\n") == 3


def test_the_page_escapes_what_comes_from_the_data(tmp_path):
    page = studies.write_page(
        tmp_path / "p.html", "<s>", "a & b", {"T": (pd.DataFrame({"x": ["<b>"]}), "n"), "N": (None, "")}
    )
    text = page.read_text()
    assert (
        "&lt;s&gt;" in text
        and "<td>&lt;b&gt;</td>" in text
        and ">N<" not in text
        and "http" not in text.split("<main>")[1]
    )


def test_the_notebook_writes_its_tables_and_its_page(folder, tmp_path, by_hand):
    left = by_hand("study", sweep=str(folder), out=str(tmp_path / "study"))
    assert (tmp_path / "study" / "study.html").is_file() and len(pd.read_csv(tmp_path / "study" / "members.csv")) == 5
    assert left["headline"].startswith("Best of 2 settings by val_loss: learning_rate 0.0001: 0.5200")
