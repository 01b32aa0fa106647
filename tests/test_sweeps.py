"""Sweeps: what a file means, what is refused, that shared stages are made once, and that nothing is lost."""

import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from test_store import COMMAND, Toys, toys  # noqa: F401

from helpers.cli import sweep as command
from helpers.core import disk, notebooks, project, stages
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


@pytest.fixture
def refuse(write):
    def refuse(text: str) -> str:
        with pytest.raises(notebooks.RecipeError) as error:
            files.load(write(text))
        return str(error.value)

    return refuse


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
    found = files.load(
        write("names: {letters: C}\ngrid: {resize.image_size: [64, 96], fine_tune.epochs: [1, 2, 3]}")
    )
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
    assert len(sweep.members) > 1
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


EXPECTED = {"letter-p": "p", "letter-q": "q"}


@pytest.fixture
def named(small):
    """The same with names of their own, since both parameters are called letter."""
    members = {f"{a}{b}": f"{{split: {{letter: {a}}}, resize: {{letter: {b}}}}}" for a in "xy" for b in "pq"}
    text = small.read_text().split("grid:")[0] + "members: {" + ", ".join(f"{k}: {v}" for k, v in members.items()) + "}\n"
    small.write_text(text)
    return small


def test_parameters_of_the_same_name_need_names_for_the_members(small):
    with pytest.raises(notebooks.RecipeError, match="two members would be called"):
        files.load(small)


def test_shared_stages_are_made_once_and_members_are_ordinary_runs(named, toys):  # noqa: F811
    failed, shown = run(named)
    assert not failed and sorted(toys.ran()) == ["explore"] + ["resize"] * 4 + ["split"] * 2
    assert "7 stages in place of 12" in shown
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
        (toys.notebooks / "01_split.ipynb").read_text() and __import__("test_store").SPLIT,
        __import__("test_store").IMPORTS,
        __import__("test_store").OPEN,
        'if letter == "y": raise ValueError("no y")',
        __import__("test_store").NEXT_WORD.format("explore"),
        __import__("test_store").FINISH,
    )
    failed, shown = run(named)
    assert failed == 2 and "no y" in shown
    table = pd.read_csv(project.runs_folder() / "s" / "sweep.csv").set_index("member")
    assert list(table["state"]) == ["done", "done", "failed", "failed"] and "no y" in table.loc["yp", "error"]
