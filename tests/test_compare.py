"""Runs side by side: the same images, paired intervals against theory, and refusals of what cannot be compared."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from helpers.core import disk, notebooks
from helpers.evaluation import comparison, entries, tables

NAMES = ["cat", "dog"]


def predictions(right, labels, sure=0.8):
    picked = np.where(right, labels, 1 - labels)
    paths = [f"{number:04}.png" for number in range(len(labels))]
    return tables.predictions_table(paths, labels, np.where(np.eye(2)[picked] == 1, sure, 1 - sure), NAMES)


def a_run(name, right, labels=None, parameters=None, seed=7, part="test"):
    labels = np.arange(len(right)) % 2 if labels is None else labels
    table = predictions(np.asarray(right), labels)
    settings = {"head": {"epochs": 3, "seed": seed, **(parameters or {})}}
    history = pd.DataFrame({"val_accuracy": [0.5, 0.6], "val_loss": [0.7, 0.6]})
    groups = {path: path for path in table["path"]}
    return entries.Run(name, part, NAMES, table, table, {p: p for p in groups}, groups, settings, history, 60.0, 14.0)


def rights(n, share, seed):
    return np.random.default_rng(seed).random(n) < share


def compared(*runs):
    found = entries.grouped(runs)
    return comparison.against_the_first(found, entries.same_images(found), n_bootstrap=500), found


def test_runs_that_differ_in_seeds_only_are_one_entry_with_its_spread():
    runs = [a_run(f"a{seed}", rights(200, 0.8, seed), seed=seed) for seed in range(3)]
    found = entries.grouped([*runs, a_run("b", rights(200, 0.9, 9), parameters={"epochs": 5})])
    assert [entry.name for entry in found] == ["a0 (3 seeds)", "b"]
    board = entries.leaderboard(found)
    assert board["entry"][0] == "b" and board["runs"].tolist() == [1, 3]
    accuracies = [rights(200, 0.8, seed).mean() for seed in range(3)]
    assert board["spread"][1] == pytest.approx(max(accuracies) - min(accuracies))
    assert board["accuracy"][1] == pytest.approx(np.mean(accuracies))


def test_two_seeds_of_one_recipe_alone_are_compared_and_no_difference_is_shown():
    table, found = compared(a_run("a", rights(400, 0.85, 1), seed=1), a_run("b", rights(400, 0.85, 2), seed=2))
    assert len(found) == 2 and set(table["verdict"]) == {"no difference shown"}
    assert table["p_value"][0] > 0.05
    assert "no difference shown" in comparison.headline(table, "a")


def test_a_clear_gain_is_shown_with_its_interval():
    base = rights(400, 0.8, 1)
    table, _ = compared(a_run("a", base), a_run("b", base | rights(400, 0.5, 2), parameters={"epochs": 9}))
    accuracy = table.set_index("metric").loc["accuracy"]
    assert accuracy["verdict"] == "better" and accuracy["low"] > 0 and accuracy["p_value"] < 1e-6
    assert table.set_index("metric")["verdict"]["log_loss"] == "better"  # a lower one
    same = comparison.compare(predictions(base, np.arange(400) % 2), predictions(base, np.arange(400) % 2), NAMES)
    assert same["difference"]["value"] == 0


def test_the_paired_interval_is_as_wide_as_theory_says():
    base, flip = rights(2000, 0.8, 1), rights(2000, 0.05, 2)
    table, _ = compared(a_run("a", base), a_run("b", base ^ flip, parameters={"epochs": 9}))
    row = table.iloc[0]
    gain = (base ^ flip).astype(float) - base
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * gain.std() / np.sqrt(2000), rel=0.15)


def test_p_values_of_several_entries_are_adjusted_by_holm():
    adjusted = comparison._holm(np.array([0.01, np.nan, 0.04, 0.03]))
    np.testing.assert_allclose(adjusted, [0.03, np.nan, 0.06, 0.06])


def test_among_several_entries_the_intervals_are_wider_and_a_verdict_needs_the_test_too():
    """A gain that is "better" as one pair may be chance when it is the best of five."""
    base, gained = rights(400, 0.8, 1), np.zeros(400, bool)
    gained[np.flatnonzero(~base)[:7]] = True
    gained[np.flatnonzero(base)[:1]] = True
    second = a_run("b", base ^ gained, parameters={"epochs": 9})
    others = [a_run(f"c{n}", rights(400, 0.8, n), parameters={"epochs": 10 + n}) for n in range(2, 6)]
    (alone, _), (among, _) = compared(a_run("a", base), second), compared(a_run("a", base), second, *others)
    pick = lambda table: table[(table["entry"] == "b") & (table["metric"] == "accuracy")].iloc[0]  # noqa: E731
    one, many = pick(alone), pick(among)
    assert one["difference"] == many["difference"] > 0 and many["low"] < one["low"] and many["high"] > one["high"]
    assert many["p_value"] > 0.05 and many["verdict"] == "no difference shown"


def test_several_seeds_have_no_mcnemar_test_and_their_mean_is_compared():
    runs = [a_run(f"a{seed}", rights(300, 0.7, seed), seed=seed) for seed in range(2)]
    table, _ = compared(*runs, a_run("b", rights(300, 0.95, 9), parameters={"epochs": 5}))
    assert np.isnan(table["p_value"]).all() and table["verdict"][0] == "better"
    expected = rights(300, 0.95, 9).mean() - np.mean([rights(300, 0.7, seed).mean() for seed in range(2)])
    assert table["difference"][0] == pytest.approx(expected)


def test_images_of_one_group_are_resampled_together():
    base = np.repeat(rights(40, 0.8, 1), 10)
    better = base | np.repeat(rights(40, 0.3, 2), 10)
    first, second = a_run("a", base, np.repeat(np.arange(40) % 2, 10)), a_run(
        "b", better, np.repeat(np.arange(40) % 2, 10), parameters={"epochs": 9}
    )  # fmt: skip
    alone, _ = compared(first, second)
    groups = {path: str(number // 10) for number, path in enumerate(first.groups)}
    together, _ = compared(replace(first, groups=groups), second)
    assert together["high"][0] - together["low"][0] > 2 * (alone["high"][0] - alone["low"][0])


def test_other_test_images_are_refused_unless_those_in_common_are_asked_for():
    first, second = a_run("a", rights(100, 0.8, 1)), a_run("b", rights(100, 0.8, 2), parameters={"epochs": 9})
    second = replace(second, predictions=second.predictions.iloc[:60])
    found = entries.grouped([first, second])
    with pytest.raises(ValueError, match=r"100 images, b on 60; 60 are the same.*--common"):
        entries.same_images(found)
    assert len(entries.same_images(found, common=True)) == 60
    none = replace(second, predictions=second.predictions.assign(path=[f"x{n}" for n in range(60)]))
    with pytest.raises(ValueError, match="no measured image in common"):
        entries.same_images(entries.grouped([first, none]), common=True)


def test_other_classes_labels_or_parts_are_refused():
    first, second = a_run("a", rights(20, 0.8, 1)), a_run("b", rights(20, 0.8, 2), parameters={"epochs": 9})
    for other, said in (
        (replace(second, class_names=["cat", "cow"]), "other classes"),
        (replace(second, part="val"), "measured on test, b on val"),
        (a_run("b", rights(20, 0.8, 2), 1 - np.arange(20) % 2, parameters={"epochs": 9}), "other labels"),
    ):
        with pytest.raises(ValueError, match=said):
            entries.same_images(entries.grouped([first, other]))


def test_only_parameters_that_differ_are_shown():
    found = entries.grouped([a_run("a", [1, 1], parameters={"l2": 0.1}), a_run("b", [1, 1], parameters={"epochs": 9})])
    table = entries.differing(found)
    assert table.to_dict() == {"a": {"head.epochs": 3, "head.l2": 0.1}, "b": {"head.epochs": 9, "head.l2": "–"}}


def test_images_that_changed_sides_are_the_surest_of_either_kind():
    first, second = a_run("a", [1, 1, 0, 0]), a_run("b", [1, 0, 1, 0], parameters={"epochs": 9})
    changed = comparison.changed_sides(first, second, sorted(first.groups), n=4)
    assert changed["why"].tolist() == ["only a is right", "only b is right"]
    assert list(changed["file"]) == ["0001.png", "0002.png"]


def test_one_run_or_one_that_is_not_measured_is_refused(runs_folder):
    with pytest.raises(ValueError, match="at least two"):
        entries.read(["a"])
    with pytest.raises(FileNotFoundError, match="neither a run with a finished evaluate"):
        entries.read(["a", "b"])


def test_the_notebook_is_a_study_and_no_stage_of_a_run():
    assert "compare" in notebooks.studies() and "compare" not in notebooks.stages()
    for called in ("compare", "06", "6", "06_compare"):
        assert notebooks.find_notebook(called).name == "compare"


def test_nothing_but_05_reads_the_test_part_of_the_images():
    """Validation chooses; 06 reads the predictions that 05 has left."""
    for path in notebooks.NOTEBOOKS.glob("*.ipynb"):
        source = "\n".join(
            "".join(cell["source"]) for cell in disk.read_json(path)["cells"] if cell["cell_type"] == "code"
        )
        opens = '"test"' in source or "'test'" in source or "read(source, part)" in source
        assert opens == (path.stem == "05_evaluate"), path.name
