"""A sweep's file: a recipe, and what varies in it (see `axes`); checked as a whole before anything is made.

extends: ../elpv.yaml
name: rates
fine_tune: {unfreeze: block6, epochs: 10}
grid: {fine_tune.learning_rate: {log: [1e-6, 1e-2], per_decade: 4}}
to: fine_tune             # the last stage to make; test stays closed
names: "rate-{learning_rate}"   # or letters, or {letters: B}; without it, names show what varies
search: {trials: 40}      # or halving: {from_epochs: 2}, or both; see `options`
"""

import copy
import itertools
import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.core import notebooks, project, words
from helpers.pipeline import recipes
from helpers.pipeline.sweeps import axes, options

MOST = 2000  # members; more is a mistake
STUDY = "study"  # the folder beside the members that holds the study of them
KEPT_CACHE, EPOCHS = "keep_cache", "epochs"  # parameters that sweeps know
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Member:
    """One variant: its name within the sweep, what tables show of it, and the recipe of its run."""

    name: str
    labels: dict[str, Any]
    recipe: recipes.Recipe


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Attributes:
        name: of the sweep and of the folder of its runs.
        members: in the order of the axes, the last one quickest; a search has none before it begins.
        last: the last stage to make, "" for the whole chain.
        varies: the columns of the members' labels, in order.
        path: the file.
        base: the recipe's content that all members share.
        lines: the axes.
        search, halving: how it spends its time, None for all members to the end.
    """

    name: str
    members: list[Member]
    last: str = ""
    varies: list[str] = field(default_factory=list)
    path: Path | None = None
    base: dict[str, Any] = field(default_factory=dict)
    lines: list[axes.Axis] = field(default_factory=list)
    search: options.Search | None = None
    halving: options.Halving | None = None

    @property
    def folder(self) -> Path:
        """Return the folder that holds its members as runs."""
        return project.runs_folder() / self.name

    @property
    def metric(self) -> str:
        """Return what ranks the members; "" where the sweep leaves it to the study."""
        option = self.search or self.halving
        return option.metric if option else ""

    def member(self, name: str, points: Sequence[axes.Point]) -> Member:
        """Return the member of one point of each axis."""
        labels, changes = _together(points)
        content, _ = _changed(self.base, changes)
        recipe = recipes.build(content | {"name": f"{self.name}/{name}"}, self.path)
        return Member(name, labels, recipe)

    def recipe_of(self, member: Member, description: str) -> recipes.Recipe:
        """Return a member's recipe for a run of its own, called SWEEP_best."""
        sections = {
            stage: {
                key: value
                for key, value in section.items()
                if key != KEPT_CACHE or key in (self.base.get(stage) or {})  # else it is there for the other members
            }
            for stage, section in member.recipe.stages.items()
        }
        about = {"description": description, "published": member.recipe.published}
        return recipes.Recipe(f"{self.name}_best", sections, **about, path=self.path)


def load(path: str | Path, overrides: list[str] | None = None, name: str = "") -> Sweep:
    """Read a sweep's file and check all of it and all of its members.

    Args:
        path, overrides, name: as for `recipes.load`; overrides are of the recipe, and hold for every member.

    Raises:
        RecipeError: anything is unknown, of the wrong type or out of range, in any member. All problems are listed.
    """
    file, content, problems = recipes.read(path, overrides)
    content["name"] = name or content.get("name", file.stem)
    keys = {*notebooks.stages(), *recipes.ABOUT_THE_RUN, *recipes.OF_A_SWEEP}
    problems += [
        f"{key}: a sweep has no such key.{words.did_you_mean(str(key), keys)}" for key in content.keys() - keys
    ]
    base = {key: value for key, value in content.items() if key in keys - recipes.OF_A_SWEEP}
    problems += recipes.check(base)
    if "/" in str(content["name"]):
        problems.append(f"name: {content['name']!r} names a member; a sweep's name has no slash.")
    search = options.read(options.Search, content.get("search"), problems)
    halving = options.read(options.Halving, content.get("halving"), problems)
    lines, wrong = axes.read(content, searched=search is not None)
    problems += wrong
    last = _last(content.get("to"), problems)
    problems += _undecided(content) if search or halving else []
    if search and not problems:
        problems += _untriable(base, lines, search, last)
    members = _members(base, lines, content.get("names"), file, problems) if not (search or problems) else []
    problems += _twins(members, last) if not problems else []
    if halving and not problems:
        problems += _unstoppable(_ends(base, lines) if search else members, last, halving)
        if search and search.metric != halving.metric:
            problems.append(
                f"halving.metric: {halving.metric}, but search.metric: {search.metric}. Give both the same."
            )
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in dict.fromkeys(problems))
        raise notebooks.RecipeError(f"{project.display_path(file)} cannot be run:\n{listed}")
    varies = [key for axis in lines for key in ([axis.key] if isinstance(axis, axes.Range) else axis[0].labels)]
    return Sweep(content["name"], members, last, varies, file, base, lines, search, halving)


def trained(recipe: recipes.Recipe, last: str = "") -> str:
    """Return the last stage up to `last` that trains, "" for none: what ranks the members is its history."""
    chain = recipe.chain()
    chain_to_last = chain[: chain.index(last) + 1] if last in chain else chain
    return next((name for name in reversed(chain_to_last) if notebooks.stages()[name].trains), "")


def _undecided(content: Mapping[str, Any]) -> list[str]:
    """Name what a sweep whose members depend on each other's results cannot have."""
    problems = []
    if "seeds" in content:
        problems.append(
            "seeds: a search, and halving too, would keep the lucky seeds. Leave them out here, and compare the best"
            " settings over seeds in a sweep of their own."
        )
    if "search" in content and "names" in content:
        problems.append("names: a search names its members itself: trial-001, trial-002 ...")
    return problems


def _untriable(base: dict[str, Any], lines: list[axes.Axis], search: options.Search, last: str) -> list[str]:
    """Return what is wrong with any point of the axes, or with a search of them."""
    problems: list[str] = []
    if not trained(recipes.build(base, None), last):
        problems.append(f"to: nothing is trained up to {last}, so there is no {search.metric} to search by.")
    for axis in lines:
        for point in _points(axis):
            content, wrong = _changed(base, point.changes)
            problems += [problem for problem in wrong + recipes.check(content) if problem not in problems]
        texts = [] if isinstance(axis, axes.Range) else [axes.name_of(point) for point in axis]
        if len(set(texts)) < len(texts):
            problems.append(
                f"{' and '.join(axis[0].labels)}: two values read alike: {', '.join(texts)}. Give them names."
            )
    if (count := math.prod(map(len, lines))) < search.trials:
        problems.append(
            f"search.trials: {search.trials} of the {count} members that there are. Without search, all are made."
        )
    return problems


def _points(axis: axes.Axis) -> list[axes.Point]:
    """Return the values of an axis, or the two ends of a range."""
    return [axis.at(axis.low), axis.at(axis.high)] if isinstance(axis, axes.Range) else list(axis)


def _ends(base: dict[str, Any], lines: list[axes.Axis]) -> list[Member]:
    """Return a member of a search for each value of each axis, or each end of it."""
    members = []
    for axis in lines:
        for point in _points(axis):
            content, _ = _changed(base, point.changes)
            members.append(Member(f"a trial with {axes.name_of(point)}", point.labels, recipes.build(content, None)))
    return members


def _unstoppable(members: list[Member], last: str, halving: options.Halving) -> list[str]:
    """Name members that cannot be stopped after the first epochs."""
    problems = []
    for member in members:
        stage = trained(member.recipe, last)
        epochs = member.recipe.resolved(stage).get(EPOCHS, 0) if stage else 0
        if epochs <= halving.from_epochs:
            what = f"{stage}.{EPOCHS} is {epochs}" if stage else "it trains nothing"
            problems.append(f"halving.from_epochs: {halving.from_epochs} must be fewer than {member.name} has; {what}.")
    return problems


def _last(name: Any, problems: list[str]) -> str:
    if name is None:
        return ""
    try:
        return notebooks.find_stage(str(name)).name
    except notebooks.RecipeError as error:
        problems.append(f"to: {error}")
        return ""


def _members(base: dict[str, Any], lines: list[axes.Axis], names: Any, file: Path, problems: list[str]) -> list[Member]:
    count = math.prod(len(axis) for axis in lines)
    if count > MOST:
        problems.append(f"{count:,} members are too many; {MOST:,} are the most.")
        return []
    members, seen = [], {}
    for places in itertools.product(*(range(len(axis)) for axis in lines)):
        points = [axis[place] for axis, place in zip(lines, places, strict=True)]
        labels, changes = _together(points)
        content, wrong = _changed(base, changes)
        wrong += recipes.check(content)
        problems += [problem for problem in wrong if problem not in problems]
        if wrong:
            continue
        name = _name(names, labels, places, lines, problems)
        if name in seen:
            problems.append(f"names: two members would be called {name}. Name what else varies: {', '.join(labels)}.")
        if not recipes.RUN_NAME.fullmatch(name) or "/" in name or name == STUDY:
            problems.append(
                f"names: {name!r} cannot name a member: letters, digits, - and _, at most 100, and not {STUDY}."
                ' Give a pattern, as in names: "rate-{learning_rate}".'
            )
        seen[name] = True
        members.append(Member(name, labels, recipes.build(content | {"name": f"{base['name']}/{name}"}, file)))
    return members


def _together(points: Sequence[axes.Point]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the labels and the changes of one point of each axis."""
    labels = {key: label for point in points for key, label in point.labels.items()}
    return labels, {key: value for point in points for key, value in point.changes.items()}


def _changed(base: dict[str, Any], changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the recipe's content with the changes of one member, and the problems in them."""
    content, problems = copy.deepcopy(base), []
    for stage in content.keys() & notebooks.stages().keys():
        content[stage] = content[stage] if content[stage] is not None else {}
    for key, value in changes.items():
        stage, *rest = key.split(".")
        if stage not in notebooks.stages():
            problems.append(f"{key}: there is no such stage.{words.did_you_mean(stage, notebooks.stages())}")
            continue
        section = content.setdefault(stage, {})
        if not rest:
            continue
        name, *inner = rest
        if not inner:
            section[name] = copy.deepcopy(value)
        elif len(inner) > 1 or not isinstance(section.get(name), dict):
            problems.append(
                f"{key}: {stage}.{name} must be a dict in the recipe, so that one key of it can vary, as in"
                f" {stage}: {{{name}: {{name: ..., {inner[0]}: ...}}}}; it is {section.get(name)!r}."
            )
        else:
            section[name][inner[0]] = copy.deepcopy(value)
    for name, stage in notebooks.stages().items():  # what members have in common is computed once for all of them
        runs = name in content or not stage.optional
        if runs and KEPT_CACHE in stage.settings and isinstance(content.get(name, {}), dict):
            content.setdefault(name, {}).setdefault(KEPT_CACHE, True)
    return content, problems


def _name(
    names: Any, labels: dict[str, Any], places: tuple[int, ...], lines: list[axes.Axis], problems: list[str]
) -> str:
    if names == "letters" or (isinstance(names, Mapping) and set(names) == {"letters"}):
        return _letters(names, labels, places, lines, problems)
    fields = {_field(key, labels): slug(label, place) for (key, label), place in _placed(labels, places, lines)}
    if names is None:
        return "_".join(text if key == "member" else f"{key}-{text}" for key, text in fields.items())
    try:
        return str(names).format_map(fields)
    except (KeyError, ValueError, IndexError) as error:
        message = f"names: {names!r} has a field that is none of {', '.join(fields)} ({error})."
        problems += [message] if message not in problems else []
        return "unnamed"


def _field(key: str, labels: dict) -> str:
    """Return the last part of a parameter's name, or all of it where another one ends alike."""
    last = key.rpartition(".")[2]
    alike = sum(other.rpartition(".")[2] == last for other in labels)
    return last if alike == 1 else key.replace(".", "_")


def _placed(
    labels: dict[str, Any], places: tuple[int, ...], lines: list[axes.Axis]
) -> list[tuple[tuple[str, Any], int]]:
    of_axis = {key: place for axis, place in zip(lines, places, strict=True) for key in axis[place].labels}
    return [((key, label), of_axis[key]) for key, label in labels.items()]


def slug(label: Any, place: int) -> str:
    """Return a label as part of a folder's name; what has no short one is numbered by its place."""
    text = axes.as_text(label).replace(".", "p")
    text = re.sub(r"[^\w-]+", "-", text).strip("-")
    return text if text and len(text) <= 40 else str(place + 1)


def _letters(names: Any, labels: dict, places: tuple[int, ...], lines: list[axes.Axis], problems: list[str]) -> str:
    """Return three capitals, group, set and experiment, and the seed where there are several."""
    group = names["letters"] if isinstance(names, Mapping) else "A"
    counts = [len(axis) for axis in lines]
    seeded = "seed" in lines[-1][0].labels
    if seeded:
        places, counts = places[:-1], counts[:-1]
    first, rest = (places[0], places[1:]) if len(places) > 1 else (0, places)
    experiment = 0
    for place, count in zip(rest, counts[1:] if len(places) > 1 else counts, strict=True):
        experiment = experiment * count + place
    if group not in list(LETTERS) or max(first, experiment) >= len(LETTERS):
        message = (
            "names: letters are one capital for the group, up to 26 sets (the first thing that varies) and up to 26"
            f" experiments in each; got group {group!r} and {math.prod(counts):,} members."
        )
        problems += [message] if message not in problems else []
        return "unnamed"
    return f"{group}{LETTERS[first]}{LETTERS[experiment]}" + (f"-{labels['seed']}" if seeded else "")


def _twins(members: list[Member], last: str) -> list[str]:
    """Name members that are the same run."""
    first, problems = {}, []
    for member in members:
        chain = member.recipe.chain()
        chain_to_last = chain[: chain.index(last) + 1] if last in chain else chain
        if last and last not in chain:
            problems.append(f"to: {member.name} leaves {last} out.")
        key = repr([(stage, member.recipe.resolved(stage)) for stage in chain_to_last])
        if key in first:
            problems.append(
                f"{first[key]} and {member.name} are the same run: what varies between them changes nothing."
            )
        first.setdefault(key, member.name)
    return problems
