"""`thaw two-stage`: the classes that a run confuses become groups, each with a model of its own (S5's group E)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from helpers.cli import compare, terminal
from helpers.core import disk, notebooks, project, words
from helpers.evaluation import entries, tables
from helpers.evaluation.joining import confused
from helpers.pipeline import manifest, recipes

WHOLE, FIRST = "whole", "first"
LEFT_OUT = ("export", "published", "description")  # of the run's recipe
BRIEF = {"promise": {}, "subgroups": [], "cheat_test": False}  # what 05 need not measure for each stage


def run(text: str, grouping: str, console: Console, *, overrides: Sequence[str] = ()) -> Path:
    """Train both stages as ordinary runs over the run's split, join them, and compare with the run.

    Args:
        text: a finished run of one model for all classes.
        grouping: "auto", by the run's confusions on validation, or groups in YAML, as in [[a, b], [c, d]].
        console: where progress and results are printed.
        overrides: `stage.parameter=value`, for the runs of both stages.

    Returns:
        The page of the comparison.

    Raises:
        FileNotFoundError: there is no such run, or it is not measured.
        ValueError: nothing can be grouped, or a group is wrong.
    """
    folder = project.run_folder(text)
    groups = named(proposed(folder) if grouping == "auto" else parsed(grouping, folder))
    for name, classes in groups.items():
        console.print(f"{name}: {', '.join(classes)}", markup=False)
    stage_recipes = members(folder, groups, overrides)
    for recipe in stage_recipes.values():
        terminal.run(recipe, console)
    places = {stage: project.runs_folder() / recipe.name for stage, recipe in stage_recipes.items()}
    page = compare.run([str(folder), str(places[WHOLE])], console)
    console.print(accuracies(folder, places).to_string(index=False), markup=False)
    return page


def proposed(folder: Path) -> list[list[str]]:
    """Return the groups that a run's confusions on validation suggest.

    Raises:
        ValueError: no two classes are confused enough.
    """
    names, counts = _validation(folder)
    groups = confused.groups(counts, names)
    if not groups:
        raise ValueError(
            f"{folder.name} confuses no two classes in {words.percent(confused.LEAST)} of their validation"
            " images, so there is nothing for a second stage. Name groups yourself: --groups '[[a, b], [c, d]]'."
        )
    return groups


def parsed(text: str, folder: Path) -> list[list[str]]:
    """Return groups written in YAML.

    Raises:
        ValueError: that is not a list of lists of the run's classes.
    """
    content = notebooks.yaml().load(text)
    if not isinstance(content, list) or not all(isinstance(group, list) for group in content):
        raise ValueError(f"--groups: expected auto or lists of classes, as in [[a, b], [c, d]]; got {text!r}.")
    groups = [[str(name) for name in group] for group in content]
    confused.check(groups, _validation(folder)[0])
    return groups


def named(groups: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Return the groups by names that also name runs: group_1, group_2 and so on."""
    return {f"group_{number}": list(group) for number, group in enumerate(groups, 1)}


def members(
    folder: Path, groups: Mapping[str, Sequence[str]], overrides: Sequence[str] = ()
) -> dict[str, recipes.Recipe]:
    """Return the recipes of both stages and of the whole, in the order in which they are to run."""
    before = manifest.read(folder)
    parent = f"{folder.name}-two-stage"
    if clash := sorted(set(groups) & set(_validation(folder)[0])):
        raise ValueError(f"The class {clash[0]} has the name of a group. Rename it in the source.")
    merged = {name: list(classes) for name, classes in groups.items()}
    parts = {FIRST: {"merge": merged}} | {name: {"keep": list(classes)} for name, classes in groups.items()}
    stage_recipes = {
        part: _recipe(before, f"{parent}/{part}", {"resize": resize, "evaluate": BRIEF}, overrides)
        for part, resize in parts.items()
    }
    whole = {"join": {"runs": [recipe.name for recipe in stage_recipes.values()]}, "evaluate": {"phase": "fine_tune"}}
    return stage_recipes | {WHOLE: _recipe(before, f"{parent}/{WHOLE}", whole, ())}


def accuracies(folder: Path, places: Mapping[str, Path]) -> pd.DataFrame:
    """Return the accuracy of each stage on its test images, of the whole, and of the single model."""
    rows = {"one model": folder} | dict(places)
    metrics = {name: disk.read_json(place / "evaluate" / "metrics.json") for name, place in rows.items()}
    classes = {name: len(disk.read_json(place / "evaluate" / "class_names.json")) for name, place in rows.items()}
    accuracy = {name: words.percent(stage_metrics["accuracy"]["value"]) for name, stage_metrics in metrics.items()}
    return pd.DataFrame(
        [
            {"model": name, "classes": classes[name], "images": metrics[name]["n"], "accuracy": accuracy[name]}
            for name in rows
        ]
    )


def _recipe(
    before: Mapping[str, Any], name: str, sections: Mapping[str, Mapping], overrides: Sequence[str]
) -> recipes.Recipe:
    """Return a run's recipe under another name, with more parameters, and write it beside the new run."""
    content = {key: value for key, value in before["recipe"].items() if key not in LEFT_OUT} | {"name": name}
    content |= {stage: {**content.get(stage, {}), **section} for stage, section in sections.items()}
    file = (project.runs_folder() / name).with_suffix(".yaml")
    return manifest.recipe_of({"recipe": content}, file, list(overrides))


def _validation(folder: Path) -> tuple[list[str], np.ndarray]:
    """Return the classes of a run, and how it confuses them on validation."""
    names = disk.read_json(entries.measured(str(folder)) / "class_names.json")
    predictions = tables.read_predictions(folder / "evaluate" / "val_predictions.csv")
    return names, tables.confusion_matrix(predictions, names)
