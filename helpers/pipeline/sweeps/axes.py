"""What varies in a sweep: axes, each a list of points, each point some parameters' values and what to call them.

    grid: {fine_tune.learning_rate: {log: [1e-6, 1e-2], per_decade: 4}}   # every value with every other axis
    zip: {resize.image_size: [224, 260], head.backbone: [efficientnet_b0, efficientnet_b2]}   # side by side: one axis
    members: {softmax: {head: {dense: []}}, one_layer: {head: {dense: [1024]}}}   # named sets of parameters: one axis
    seeds: {training: [1, 2, 3]}   # split, training, or both: one axis

In a search the ends of a range are enough, `{log: [1e-6, 1e-2]}` or `{linear: [0, 0.5]}`: any number between them may
be tried.

A value may have a name: `fine_tune.unfreeze: {PT0: none, PT2: 0.4, PT5: all}`. A third part of a name is a key of a
parameter that is a dict: `fine_tune.optimizer.weight_decay: [1e-3, 1e-2]`.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helpers.core import notebooks, words

LOG, LINEAR = {"log", "per_decade"}, {"linear", "count"}
DIGITS = 3  # significant ones of the numbers that a range makes
SEEDS = ("split", "training", "both")
RANGES = "{log: [1e-6, 1e-2], per_decade: 4} or {linear: [0, 1], count: 5}"


@dataclass(frozen=True)
class Point:
    """One place on an axis.

    Attributes:
        labels: what tables and names show of it: a number or a text for each thing that varies.
        changes: values of parameters, by "stage.parameter" or "stage.parameter.key".
    """

    labels: dict[str, Any]
    changes: dict[str, Any]


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, of which a search tries any: an axis without points.

    Attributes:
        key: "stage.parameter" or "stage.parameter.key".
        log: whether equal ratios count alike, instead of equal differences.
        whole: whether only whole numbers are meant.
    """

    key: str
    low: float
    high: float
    log: bool
    whole: bool

    def __len__(self) -> int:
        """Return how many whole numbers it holds; without `whole`, more than any search tries."""
        return int(self.high) - int(self.low) + 1 if self.whole else sys.maxsize

    def at(self, number: float) -> Point:
        """Return the point of a number, which is rounded to three significant digits."""
        value = int(number) if self.whole else _rounded(number)
        return Point({self.key: value}, {self.key: value})


Axis = list[Point] | Range


def read(content: Mapping[str, Any], *, searched: bool = False) -> tuple[list[Axis], list[str]]:
    """Return the axes of a sweep's content, members first and seeds last, and every problem in words.

    Args:
        content: of the file.
        searched: whether a range may be given by its ends alone.
    """
    problems: list[str] = []
    axes: list[Axis] = [_members(content.get("members"), problems), _zip(content.get("zip"), problems)]
    for key, values in _mapping("grid", content.get("grid"), problems).items():
        where = f"grid.{key}"
        if searched and isinstance(values, Mapping) and set(values) in ({"log"}, {"linear"}):
            axes += _open_range(where, key, values, problems)
        else:
            axes.append([Point({key: label}, {key: value}) for label, value in _values(where, key, values, problems)])
    axes.append(_seeds(content.get("seeds"), problems))
    varying = [axis for axis in axes if axis]
    if not varying and not problems:
        problems.append("nothing varies: give grid, zip, members or seeds.")
    return varying, problems


def as_label(value: Any) -> Any:
    """Return a value as tables show it: numbers and texts as they are, anything longer in short."""
    return value if isinstance(value, int | float | str) else words.shorten(str(value), 60)


def as_text(label: Any) -> str:
    """Return a label as people write it: 1e-4, not 0.0001; 3.16e-4; 0.4; all."""
    if not isinstance(label, float) or not math.isfinite(label):
        return str(label)
    text = f"{label:.{DIGITS}g}"
    if abs(label) >= 1e-2 or not label:
        return text
    digits, exponent = f"{label:.{DIGITS - 1}e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def name_of(point: Point) -> str:
    """Return the labels of a point in one text."""
    return ", ".join(as_text(label) for label in point.labels.values())


def _mapping(where: str, content: Any, problems: list[str]) -> Mapping[str, Any]:
    if content is None or isinstance(content, Mapping):
        return content or {}
    problems.append(f"{where}: expected {{stage.parameter: values}}, got {content!r}.")
    return {}


def _values(where: str, key: str, content: Any, problems: list[str]) -> list[tuple[Any, Any]]:
    """Return (label, value) for each value that `content` stands for."""
    before = len(problems)
    pairs: list[tuple[Any, Any]] = []
    if isinstance(content, Mapping) and content.keys() & (LOG | LINEAR):
        pairs = [(value, value) for value in _range(where, key, content, problems)]
    elif isinstance(content, Mapping):
        pairs = [(str(label), value) for label, value in content.items()]
    elif isinstance(content, list):
        pairs = [(as_label(value), value) for value in content]
    else:
        problems.append(f"{where}: expected a list of values, names with values, or {RANGES}, got {content!r}.")
    if not pairs and len(problems) == before:
        problems.append(f"{where}: there is no value.")
    return pairs


def _range(where: str, key: str, content: Mapping[str, Any], problems: list[str]) -> list[float | int]:
    ends = content.get("log", content.get("linear"))
    number = content.get("per_decade", content.get("count"))
    numbers = isinstance(ends, list) and len(ends) == 2 and all(_is_number(end) for end in ends)
    if set(content) not in (LOG, LINEAR) or not numbers or type(number) is not int:
        problems.append(f"{where}: expected {RANGES}, got {dict(content)!r}.")
        return []
    low, high = ends
    if low >= high or number < 1 or ("log" in content and low <= 0) or ("linear" in content and number < 2):
        problems.append(f"{where}: a range goes from a lower to a higher number, log above 0; got {dict(content)!r}.")
        return []
    if "log" in content:
        steps = round(number * math.log10(high / low), 6)
        values = [low * 10 ** (step / number) for step in range(math.floor(steps) + 1)]
    else:
        values = [low + (high - low) * step / (number - 1) for step in range(number)]
    rounded = dict.fromkeys(map(_rounded, values))
    return [int(value) if value.is_integer() and _is_whole(key) else value for value in rounded]


def _open_range(where: str, key: str, content: Mapping[str, Any], problems: list[str]) -> list[Range]:
    """Return the range between two ends, a list of one; none where there is a problem."""
    ((kind, ends),) = content.items()
    if not isinstance(ends, list) or len(ends) != 2 or not all(map(_is_number, ends)) or ends[0] >= ends[1]:
        problems.append(f"{where}: expected the ends of a range, as in {{{kind}: [low, high]}}, got {dict(content)!r}.")
        return []
    if kind == "log" and ends[0] <= 0:
        problems.append(f"{where}: the ends of a log range are above 0; got {ends!r}.")
        return []
    if (whole := _is_whole(key)) and not all(float(end).is_integer() for end in ends):
        problems.append(f"{where}: {key} takes whole numbers; got {ends!r}.")
        return []
    low, high = map(int, ends) if whole else ends
    return [Range(key, low, high, log=kind == "log", whole=whole)]


def _rounded(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(key: str) -> bool:
    """Return whether the parameter takes whole numbers only."""
    stage, _, name = key.partition(".")
    parameter = notebooks.stages()[stage].settings.get(name) if stage in notebooks.stages() else None
    return parameter is not None and parameter.annotation is int


def _zip(content: Any, problems: list[str]) -> list[Point]:
    columns = {
        key: _values(f"zip.{key}", key, values, problems) for key, values in _mapping("zip", content, problems).items()
    }
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        problems.append(f"zip: lists side by side need the same number of values; {counts}.")
        return []
    rows = zip(*columns.values(), strict=True)
    return [
        Point(
            {key: label for key, (label, _) in zip(columns, row, strict=True)},
            {key: value for key, (_, value) in zip(columns, row, strict=True)},
        )
        for row in rows
    ]


def _members(content: Any, problems: list[str]) -> list[Point]:
    axis = []
    if content is not None and not isinstance(content, Mapping):
        problems.append(f"members: expected {{name: {{stage: {{parameter: value}}}}}}, got {content!r}.")
        return []
    for name, sections in (content or {}).items():
        changes = {}
        for stage, section in (sections or {}).items() if isinstance(sections, Mapping | None) else [("", sections)]:
            if not isinstance(section, Mapping | None):
                problems.append(f"members.{name}: expected {{stage: {{parameter: value}}}}, got {sections!r}.")
                break
            changes |= {f"{stage}.{parameter}": value for parameter, value in (section or {}).items()}
            if not section:  # an optional stage with its own values
                changes[stage] = {}
        axis.append(Point({"member": str(name)}, changes))
    return axis


def _seeds(content: Any, problems: list[str]) -> list[Point]:
    """Return the axis of seeds: of the stages that train, of those before them, or of all of these."""
    if content is None:
        return []
    which = next(iter(content)) if isinstance(content, Mapping) and len(content) == 1 else None
    values = content[which] if which in SEEDS else None
    if not isinstance(values, list) or not values or not all(type(value) is int for value in values):
        problems.append(
            "seeds: say which and give whole numbers: {split: [1, 2, 3]} varies the parts, {training: [1, 2, 3]} the"
            f" head, order and views, {{both: [1, 2, 3]}} all of it; got {content!r}."
        )
        return []
    seeded = seeded_stages(which)
    return [Point({"seed": seed}, {f"{stage}.seed": seed for stage in seeded}) for seed in values]


def seeded_stages(which: str) -> list[str]:
    """Return the stages whose `seed` a sweep varies. What only measures keeps its seed.

    Args:
        which: "split", "training" or "both".
    """
    line = list(notebooks.stages().values())
    trains = [index for index, stage in enumerate(line) if stage.trains]
    parts = [stage for stage in line[: min(trains, default=len(line))] if "seed" in stage.settings]
    training = [line[index] for index in trains if "seed" in line[index].settings]
    seeded = {"split": parts, "training": training, "both": parts + training}[which]
    return [stage.name for stage in seeded]
