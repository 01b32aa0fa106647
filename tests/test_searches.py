"""Searches and successive halving: what is refused, drawn and stopped, and that interruptions change nothing."""

import io
import math

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from test_store import FINISH, FIRST_WORD, IMPORTS, NEXT_WORD, NOTE, OPEN, toys  # noqa: F401

from helpers.cli import sweep as command
from helpers.core import disk, project, stages
from helpers.evaluation import members
from helpers.pipeline import planning, recipes
from helpers.pipeline.sweeps import conduct, files, halving, pauses, search
from helpers.reports import studies

RANGES = "{fine_tune.learning_rate: {log: [1e-6, 1e-2]}, fine_tune.unfreeze: [block6, none]}"
HISTORY = "epoch,phase,loss,accuracy,val_loss,val_accuracy,seconds\n"


@pytest.fixture
def write(tmp_path, image_folder, runs_folder):
    """Write a sweep of a few images and return its path."""
    photos = image_folder(tmp_path / "photos", {"cat": 2, "dog": 2}, size=32)

    def write(text: str, name: str = "s"):
        path = tmp_path / f"{name}.yaml"
        last = "" if "\nto:" in text else "to: fine_tune\n"
        path.write_text(f"name: {name}\nexplore: {{source: {photos}}}\n{last}{text}\n")
        return path

    return write


class Pretended:
    """Makes units without any work: trainings are given a history whose loss has its minimum at a rate of 1e-4."""

    def __init__(self, monkeypatch, ends_after: int = -1, fails=lambda parameters: False):
        self.names, self.left, self.fails = [], ends_after, fails
        runs = project.runs_folder()
        monkeypatch.setattr(
            conduct, "finish", lambda member, last: (runs / member.recipe.name).mkdir(parents=True, exist_ok=True)
        )

    def __call__(self, unit, place):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.names.append((unit.step.stage.name, unit.until))
        given, step = unit.step.parameters, unit.step
        if self.fails(given):
            raise planning.StageError("no such luck")
        folder = step.partial if unit.until else step.folder
        folder.mkdir(parents=True, exist_ok=True)
        if step.stage.trains:
            best = (math.log10(given["learning_rate"]) + 4) ** 2 + 0.5 * (given.get("unfreeze") == "none")
            count = unit.until or given["epochs"]
            rows = [f"{n},fit,1,0.5,{best + 1 / n},0.5,1\n" for n in range(1, count + 1)]
            (folder / pauses.HISTORY).write_text(HISTORY + "".join(rows))
        if not unit.until:
            disk.write_json(folder / stages.STAGE_FILE, {"status": "done", "headline": "made", "files": {}})
        return 0.0


def score(path, epochs=None) -> float:
    return members.scores(pd.read_csv(path).head(epochs))["val_loss"] if path.is_file() else float("nan")


# What a file means, and what is refused


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("search: {trials: 0}\ngrid: " + RANGES, "search.trials: Input should be greater than or equal to 1. Got 0."),
        ("search: {trails: 9, trials: 9}\ngrid: " + RANGES, "Did you mean trials?"),
        ("search: {metric: val_loss}\ngrid: " + RANGES, "search.trials: Field required."),
        ("search: {trials: 9, metric: test_loss}\ngrid: " + RANGES, "'val_loss' or 'val_accuracy'. Got 'test_loss'."),
        ("search: 40\ngrid: " + RANGES, "search: expected {metric: ..., trials: ..., sampler: ..., seed: ...}, got 40"),
        ("search: {trials: 9}\ngrid: {head.dropout: [0, 0.5]}", "search.trials: 9 of the 2 members that there are"),
        (
            "search: {trials: 9}\ngrid: {fine_tune.epochs: {log: [1, 8]}}",
            "search.trials: 9 of the 8 members",
        ),
        ("search: {trials: 9}\ngrid: {fine_tune.epochs: {log: [1.5, 8]}}", "fine_tune.epochs takes whole numbers"),
        (
            "search: {trials: 2}\ngrid: {fine_tune.layer_decay: [0.5001, 0.5002]}",
            "two values read alike: 0.5, 0.5. Give",
        ),
        ("search: {trials: 9}\nseeds: {both: [1, 2]}\ngrid: " + RANGES, "would keep the lucky seeds"),
        ("search: {trials: 9}\nnames: letters\ngrid: " + RANGES, "names: a search names its members itself"),
        ("search: {trials: 9}\nhalving: {from_epochs: 10}\ngrid: " + RANGES, "fine_tune.epochs is 10"),
        (
            "search: {trials: 9, metric: val_accuracy}\nhalving: {from_epochs: 1}\ngrid: " + RANGES,
            "halving.metric: val_loss, but search.metric: val_accuracy. Give both the same.",
        ),
        ("search: {trials: 9}\ngrid: {fine_tune.learning_rate: {log: [0, 1]}}", "the ends of a log range are above 0"),
        ("search: {trials: 9}\ngrid: {head.dropout: {linear: [1, 0]}}", "grid.head.dropout: expected the ends of a"),
        (
            "search: {trials: 9}\ngrid: {head.dropout: {linear: [0, 5]}}",
            "head.dropout: expected float in [0, 1)",
        ),
        ("search: {trials: 9}\nto: split\ngrid: {split.seed: {linear: [1, 99]}}", "nothing is trained up to split"),
        ("grid: {fine_tune.learning_rate: {log: [1e-6, 1e-2]}}", "expected {log: [1e-6, 1e-2], per_decade: 4}"),
        ("halving: {from_epochs: 10}\ngrid: {fine_tune.layer_decay: [0.5, 1]}", "fine_tune.epochs is 10"),
        ("halving: {from_epochs: 2, eta: 1}\ngrid: {fine_tune.epochs: [5, 9]}", "halving.eta: Input should be greater"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(refuse, text, expected):
    assert expected in refuse(text)


def test_the_examples_of_a_search_cover_each_value_and_both_ends(write):
    found = search.examples(files.load(write(f"search: {{trials: 8}}\ngrid: {RANGES}")))
    rates = sorted(member.labels["fine_tune.learning_rate"] for member in found.members)
    assert rates[0] == 1e-6 and rates[-1] == 1e-2 and len(set(rates)) == 8
    assert sorted(member.labels["fine_tune.unfreeze"] for member in found.members) == ["block6"] * 4 + ["none"] * 4


def test_comparisons_come_eta_times_as_late_each_time(write):
    text = "halving: {from_epochs: 2, eta: 3}\ngrid: {fine_tune.layer_decay: [0.5, 1]}\nfine_tune: {epochs: %d}"
    assert [halving.rungs(files.load(write(text % epochs))) for epochs in (6, 7, 20)] == [[2], [2, 6], [2, 6, 18]]


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[search\]'"):
        search.check()


# A search


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna", reason="needs the extra: pip install -e '.[search]'")


def found(sweep: files.Sweep, make) -> list[tuple]:
    """Run a search to its end, or to an interruption; return what was drawn and what it was worth."""
    events = []
    try:
        events.extend(search.run(sweep, make, conduct.Inline(), 1, score))
    except KeyboardInterrupt:
        return []
    return [(e.member.name, e.member.labels, round(e.value, 6)) for e in events if isinstance(e, search.Scored)]


def everything(sweep: files.Sweep) -> list[tuple]:
    with search._opened(sweep) as study:
        return [
            (m.name, m.labels, trial.value)
            for trial in search._members(sweep, study)
            for m in [search._member(sweep, study, trial.number)]
        ]


def test_a_search_ends_near_the_best_and_best_yaml_can_be_run(write, optuna, monkeypatch):
    sweep = files.load(write(f"search: {{trials: 12}}\ngrid: {RANGES}"))
    told = found(sweep, Pretended(monkeypatch))
    assert [name for name, _, _ in told] == [f"trial-{number:03d}" for number in range(1, 13)]
    best = min(told, key=lambda one: one[2])
    recipe = recipes.load(sweep.folder / search.BEST)
    assert recipe.name == "s_best" and f"{best[0]}, the best of 12 by val_loss" in recipe.description
    assert recipe.resolved("fine_tune")["learning_rate"] == best[1]["fine_tune.learning_rate"]
    assert recipe.resolved("fine_tune")["keep_cache"] is False, "which only the sweep needs"
    shares = members.importance(sweep.folder)
    assert np.isclose(shares["importance"].sum(), 1, atol=1e-3) and shares.loc[0, "parameter"].endswith("learning_rate")
    assert len(studies.importance(shares).patches) == 2


def test_a_search_that_was_killed_twice_draws_and_finds_the_same(write, optuna, monkeypatch):
    text = f"search: {{trials: 12, sampler: tpe}}\ngrid: {RANGES}"
    whole = files.load(write(text, "whole"))
    found(whole, Pretended(monkeypatch))
    broken = files.load(write(text, "broken"))
    for units in (7, 6):
        found(broken, Pretended(monkeypatch, ends_after=units))
    found(broken, Pretended(monkeypatch))
    assert everything(broken) == everything(whole) and len(everything(whole)) == 12
    assert found(broken, Pretended(monkeypatch, ends_after=0)) == [], "and nothing is left to do"


def test_with_more_trials_a_search_goes_on_and_with_other_ranges_it_is_refused(write, optuna, monkeypatch):
    found(files.load(write(f"search: {{trials: 3}}\ngrid: {RANGES}")), Pretended(monkeypatch))
    more = files.load(write(f"search: {{trials: 5}}\ngrid: {RANGES}"))
    assert len(found(more, Pretended(monkeypatch))) == 2 and len(everything(more)) == 5
    other = files.load(write("search: {trials: 5}\ngrid: {fine_tune.learning_rate: {log: [1e-5, 1e-2]}}"))
    with pytest.raises(ValueError, match=r"search\.db holds a search of another recipe, metric or other ranges"):
        found(other, Pretended(monkeypatch))


def test_no_member_is_drawn_twice(write, optuna, monkeypatch):
    text = "search: {trials: 4}\ngrid: {fine_tune.unfreeze: [block6, none], fine_tune.learning_rate: [1e-5, 1e-4]}"
    sweep = files.load(write(text))
    told = found(sweep, Pretended(monkeypatch))
    assert len({str(labels) for _, labels, _ in told}) == 4


def test_a_failed_member_is_tried_again_by_the_same_search(write, optuna, monkeypatch):
    sweep = files.load(write(f"search: {{trials: 6}}\ngrid: {RANGES}"))
    make = Pretended(monkeypatch, fails=lambda given: given.get("unfreeze") == "none")
    told = found(sweep, make)
    assert 0 < len(told) < 6 and all(labels["fine_tune.unfreeze"] == "block6" for _, labels, _ in told)
    again = found(sweep, Pretended(monkeypatch))
    assert len(told) + len(again) == 6 and all(labels["fine_tune.unfreeze"] == "none" for _, labels, _ in again)


def test_a_search_stops_where_a_stage_before_the_training_fails(write, optuna, monkeypatch):
    sweep = files.load(write(f"search: {{trials: 6}}\ngrid: {RANGES}"))
    make = Pretended(monkeypatch, fails=lambda given: "source" in given)
    with pytest.raises(planning.StageError, match="explore of trial-001 failed, before any training"):
        found(sweep, make)
    assert len(everything(sweep)) == 1
    assert search.examples(sweep).members[0].labels == everything(sweep)[0][1], "what is drawn is planned as it is"
    assert len(search.examples(sweep).members) == 6 and len(found(sweep, Pretended(monkeypatch))) == 6


def test_a_search_that_halves_stops_the_hopeless_and_finds_the_same_after_kills(write, optuna, monkeypatch):
    text = f"search: {{trials: 12}}\nhalving: {{from_epochs: 2, eta: 3}}\nfine_tune: {{epochs: 8}}\ngrid: {RANGES}"
    whole, make = files.load(write(text, "whole")), Pretended(monkeypatch)
    events = list(search.run(whole, make, conduct.Inline(), 1, score))
    stopped = [event for event in events if isinstance(event, halving.Stopped)]
    scored = [event for event in events if isinstance(event, search.Scored)]
    assert len(stopped) + len(scored) == 12 and len(stopped) >= 4 and scored[0].member.name == "trial-001"
    assert {event.epochs for event in stopped} <= {2, 6} and all(1 < event.rank <= event.compared for event in stopped)
    assert scored[-1].best == min(event.value for event in scored), "one that was stopped is not the best"
    assert (whole.folder / stopped[0].member / halving.STOPPED.format(stage="fine_tune")).is_file()
    epochs = sum(until or 8 for stage, until in make.names if stage == "fine_tune")
    assert epochs < 12 * 8
    broken = files.load(write(text, "broken"))
    for units in (7, 5):
        found(broken, Pretended(monkeypatch, ends_after=units))
    again = list(search.run(broken, Pretended(monkeypatch), conduct.Inline(), 1, score))
    assert everything(broken) == everything(whole) and len(everything(whole)) == 12
    assert [event for event in again if isinstance(event, halving.Stopped)] == stopped
    with pytest.raises(ValueError, match="holds a search of another recipe"):
        found(files.load(write(text.replace("eta: 3", "eta: 2"), "whole")), Pretended(monkeypatch))


def test_a_failed_member_of_a_search_that_halves_is_not_tried_at_each_comparison(write, optuna, monkeypatch):
    text = f"search: {{trials: 4}}\nhalving: {{from_epochs: 2, eta: 2}}\nfine_tune: {{epochs: 9}}\ngrid: {RANGES}"
    sweep = files.load(write(text))
    make = Pretended(monkeypatch, fails=lambda given: "unfreeze" in given)
    events = list(search.run(sweep, make, conduct.Inline(), 1, score))
    assert [name for name, _ in make.names].count("fine_tune") == 4
    assert sum(isinstance(event, conduct.Failed) for event in events) == 4


def test_two_processes_do_not_search_the_same(write, optuna, monkeypatch):
    sweep = files.load(write(f"search: {{trials: 2}}\ngrid: {RANGES}"))
    with search._opened(sweep), pytest.raises(RuntimeError, match="Another thaw sweep is working on"):
        found(sweep, Pretended(monkeypatch))


def test_what_a_search_draws_anew_each_time_has_no_main_effects():
    rows = [(10.0**-n, ("block6", "none")[n % 2], 16 * (n % 3), n / 8) for n in range(1, 9)]
    table = pd.DataFrame(rows, columns=["rate", "part", "size", "val_loss"])
    assert set(members.effects(table, ["rate", "part", "size"])["factor"]) == {"part", "size"}
    assert members.effects(table, ["rate", "part"]).empty


# Halving

RATES = "grid: {fine_tune.learning_rate: {log: [1e-6, 1e-2], per_decade: 2}}\nfine_tune: {epochs: 20}\n"


def test_only_the_best_go_on_and_only_the_last_train_to_the_end(write, monkeypatch):
    sweep = files.load(write(RATES + "halving: {from_epochs: 2, eta: 3}"))
    make = Pretended(monkeypatch)
    events = list(halving.run(sweep, make, conduct.Inline(), 1, score))
    stopped = [event for event in events if isinstance(event, halving.Stopped)]
    assert [event.epochs for event in stopped] == [2] * 6 + [6] * 2 and [event.rank for event in stopped[-2:]] == [2, 3]
    assert [event.member for event in events if isinstance(event, conduct.Complete)] == ["learning_rate-1e-4"]
    trained = [until for stage, until in make.names if stage == "fine_tune"]
    assert trained == [2] * 9 + [6] * 3 + [18, 0][1:], "after 18 epochs there is nothing left to compare"
    cut = pd.read_csv(sweep.folder / stopped[0].member / halving.STOPPED.format(stage="fine_tune"))
    assert len(cut) == 2


def test_a_halving_that_was_interrupted_decides_the_same(write, monkeypatch):
    text = RATES + "halving: {from_epochs: 2, eta: 3}"
    sweep, events = files.load(write(text)), []
    for units in (6, 5, -1):
        try:
            events = list(halving.run(sweep, Pretended(monkeypatch, ends_after=units), conduct.Inline(), 1, score))
        except KeyboardInterrupt:
            continue
    assert [event.epochs for event in events if isinstance(event, halving.Stopped)] == [2] * 6 + [6] * 2
    assert [event.member for event in events if isinstance(event, conduct.Complete)] == ["learning_rate-1e-4"]
    make = Pretended(monkeypatch)
    list(halving.run(sweep, make, conduct.Inline(), 1, score))
    assert make.names == [], "what is known is not trained again"


def test_members_that_fail_are_not_compared(write, monkeypatch):
    sweep = files.load(write(RATES + "halving: {from_epochs: 2, eta: 3}"))
    make = Pretended(monkeypatch, fails=lambda given: given.get("learning_rate") == 1e-4)
    events = list(halving.run(sweep, make, conduct.Inline(), 1, score))
    assert next(event.compared for event in events if isinstance(event, halving.Stopped)) == 8
    done = [event.member for event in events if isinstance(event, conduct.Complete)]
    assert done and "learning_rate-1e-4" not in done


TRAIN = """
split: str = "runs/demo/split"  # folder written by 01_split
letter: str = "c"  # what this stage adds
loss: float = 1.0  # loss of its last epoch [0, 9]
epochs: int = 8  # rows of its history [1, 99]
out: str = "runs/demo/resize"  # folder this notebook writes
"""
FIT = """
import time

history = folder / "history.csv"
if not history.exists():
    history.write_text("epoch,phase,loss,accuracy,val_loss,val_accuracy,seconds\\n")
for epoch in range(history.read_text().count("\\n"), epochs + 1):
    time.sleep(0.4)
    with open(history, "a") as rows:
        rows.write(f"{epoch},fit,1,0.5,{loss + 1 / epoch},0.5,{os.getpid()}\\n")
"""


def test_a_paused_training_goes_on_where_it_stood_in_another_kernel(toys, monkeypatch):  # noqa: F811
    fit = (FIT, NEXT_WORD.format("split"), FINISH)
    toys.write("02_resize", TRAIN, IMPORTS, OPEN, NOTE, *fit)
    monkeypatch.setattr(command, "_study", lambda *arguments: None)
    path = toys.folder / "sweep.yaml"
    path.write_text(
        f"extends: {toys.recipe}\nname: s\ngrid: {{resize.loss: [0.3, 0.1, 0.2]}}\nhalving: {{from_epochs: 2}}\n"
    )
    shown = io.StringIO()
    assert command.run(files.load(path), Console(file=shown, width=200)) == 0
    assert (
        sorted(toys.ran()) == ["explore"] + ["resize"] * 4 + ["split"] and "paused after 2 epochs" in shown.getvalue()
    )
    folder = project.runs_folder() / "s"
    states = pd.read_csv(folder / "sweep.csv").set_index("member")["state"]
    assert states.to_dict() == {"loss-0p3": "stopped after 2 epochs", "loss-0p1": "done",
                                "loss-0p2": "stopped after 2 epochs"}  # fmt: skip
    survivor = pd.read_csv(folder / "loss-0p1" / "resize" / "history.csv")
    assert list(survivor["epoch"]) == list(range(1, 9)) and survivor["seconds"].nunique() == 2, "two kernels"
    table, histories, varies = members.read(folder)
    said = members.headline(table, members.leaderboard(table, varies), varies)
    assert said.endswith("2 of 3 were stopped early: their numbers are of fewer epochs.")
    assert histories.groupby("member").size().to_dict() == {"loss-0p1": 8, "loss-0p2": 2, "loss-0p3": 2}
    assert np.isclose(table.set_index("member").loc["loss-0p2", "val_loss"], 0.7)
    assert command.run(files.load(path), Console(file=shown)) == 0 and toys.ran() == []
