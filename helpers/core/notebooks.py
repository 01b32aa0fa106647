"""The notebooks' parameters cells: what they declare, and the check of values against them.

The parameters cell of a notebook is the only place where a parameter is declared. One parameter a line:

    learning_rate: float = 1e-2  # step size at the start of phase 1 (0, 10]
    optimizer: str = "adam"  # the rule that updates the weights {adam, adamw, sgd}

The annotation is its type, the comment its meaning. An interval or a set at the comment's end gives the allowed values.
(A `Literal` would mean the same as the set, but papermill cannot read it.) A default `runs/demo/<stage>` names the
folder that another notebook writes, and so gives the order of the stages. A comment that ends in
`(as fine_tune.unfreeze)` gives the parameter the value of another one where a recipe sets only that.

A comment line in the cell makes a stage optional: it runs only for a recipe that has its section.

    # optional
    # optional, in place of explore

With the second, the stages after it read its folder instead of the named one, which must be one that it reads itself.
A line `# study` takes the notebook out of the chain: it answers a question about finished runs.
"""

import ast
import io
import json
import math
import re
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from helpers.core import project, words

NOTEBOOKS = project.ROOT / "notebooks"
DEMO = "runs/demo/"
NUMBER = r"[-+]?(?:inf|[\d.][\d.e+-]*)"
INTERVAL = re.compile(rf"^(?P<text>.*?)\s*(?P<left>[\[(])(?P<low>{NUMBER}),\s*(?P<high>{NUMBER})(?P<right>[\])])$")
FOLLOWS = re.compile(r"\(as (?P<stage>\w+)\.(?P<name>\w+)\)$")
OPTIONAL = re.compile(r"^# optional(?:, in place of (?P<replaces>\w+))?$", re.MULTILINE)
STUDY = re.compile(r"^# study$", re.MULTILINE)
TITLE = re.compile(r"# (?:\w+ · )?(?P<title>.+)")
CHOICES = re.compile(r"^(?P<text>.*?)\s*\{(?P<choices>\w+(?:,\s*\w+)*)\}$")

# Parameters of earlier versions: what to do with a recipe that still sets one.
RETIRED = {
    "resamples": "intervals come from 2,000 resamples, always. Delete this line",
}


class RecipeError(ValueError):
    """A recipe or parameter that cannot run; the message lists every problem and how to fix each."""


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell."""

    name: str
    annotation: Any
    type_text: str
    default: Any
    meaning: str
    allowed: str = ""

    @property
    def follows(self) -> tuple[str, str] | None:
        """Return the stage and the parameter whose value this one takes where a recipe sets only that, or None."""
        other = FOLLOWS.search(self.meaning)
        return (other["stage"], other["name"]) if other else None

    @property
    def made_by(self) -> str:
        """Return the stage that writes this folder, or "" when the parameter is not a stage's folder."""
        is_folder = isinstance(self.default, str) and self.default.startswith(DEMO)
        return self.default.removeprefix(DEMO) if is_folder else ""

    def constrained(self) -> Any:
        """Return the annotation with the allowed values as a constraint for pydantic (per item for a list)."""
        if not self.allowed:
            return self.annotation
        if choices := CHOICES.match(self.allowed):
            kind = get_args(self.annotation)[0] if get_origin(self.annotation) is list else self.annotation
            literal = Literal[tuple(kind(text) for text in re.split(r",\s*", choices["choices"]))]
            return literal if kind is self.annotation else list[literal]
        bounds = _bounds(self.allowed)
        if get_origin(self.annotation) is list:
            return list[Annotated[get_args(self.annotation)[0], pydantic.Field(**bounds)]]
        if self.annotation in (int, float):
            return Annotated[self.annotation, pydantic.Field(**bounds)]
        numbers = [
            Annotated[t, pydantic.Field(**bounds)] if t in (int, float) else t for t in get_args(self.annotation)
        ]
        union = numbers[0]
        for other in numbers[1:]:
            union = union | other
        return union


@dataclass(frozen=True)
class Stage:
    """A notebook as a function: its parameters, the stages it reads and the stage it makes.

    Attributes:
        name: of the stage and of its folder.
        parameters: by name, in the order of the cell.
        inputs: parameter -> the stage that makes the folder which it names.
        model: checks values of the parameters.
        title: of the notebook's first cell, without its number.
        optional: whether it runs only for a recipe that has its section.
        replaces: the stage that it replaces for all later stages, "" for none.
        is_study: whether it belongs to no chain.
    """

    name: str
    notebook: Path
    parameters: dict[str, Parameter]
    inputs: dict[str, str]
    model: type[pydantic.BaseModel]
    title: str = ""
    optional: bool = False
    replaces: str = ""
    is_study: bool = False

    @property
    def number(self) -> str:
        """Return the number of the notebook, such as "03" or "00b"."""
        return self.notebook.name.split("_")[0]

    @property
    def called(self) -> tuple[str, ...]:
        """Return the names that it has: its own, its notebook's name and number."""
        return self.name, self.notebook.stem, self.number, self.number.removeprefix("0")

    @property
    def trains(self) -> bool:
        """Return whether it trains a network: its notebook has a parameter `epochs`."""
        return "epochs" in self.parameters

    @property
    def settings(self) -> dict[str, Parameter]:
        """Return the parameters that a recipe may set: all except the folders, which the pipeline sets."""
        return {name: p for name, p in self.parameters.items() if not p.made_by}


@cache
def stages() -> dict[str, Stage]:
    """Return the stages in the notebooks' order, each read from its notebook's parameters cell."""
    paths = [path for path in NOTEBOOKS.glob("*_*.ipynb") if re.match(r"\d\d[a-z]?_", path.name)]
    all_stages = [_read_stage(path) for path in sorted(paths)]
    return {stage.name: stage for stage in all_stages if not stage.is_study}


@cache
def studies() -> dict[str, Stage]:
    """Return the notebooks that belong to no chain: those without a number and those with `# study`."""
    all_stages = [_read_stage(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    return {study.name: study for study in all_stages if study.is_study}


def find_notebook(text: str) -> Stage:
    """Return a study by its name, notebook or number, or a stage as `find_stage` does.

    Raises:
        RecipeError: there is neither.
    """
    matching_studies = (study for study in studies().values() if text in study.called)
    return next(matching_studies, None) or find_stage(text)


def find_stage(text: str) -> Stage:
    """Return a stage by its name ("head"), its notebook ("03_train_head") or its number ("03" or "3").

    Raises:
        RecipeError: there is no such stage.
    """
    for stage in stages().values():
        if text in stage.called:
            return stage
    raise RecipeError(f"There is no stage {text!r}.{words.did_you_mean(text, stages())}")


def read_parameters(source: str) -> dict[str, Parameter]:
    """Return the parameters in the source of a parameters cell.

    Raises:
        RecipeError: a line is not `name: type = literal  # meaning`.
    """
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    parameters = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module == "typing":
            continue
        refusal = f"Line {node.lineno} of the parameters cell is not `name: type = literal  # meaning`"
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
            raise RecipeError(f"{refusal}.")
        type_text = ast.unparse(node.annotation)
        try:
            annotation = eval(type_text, {"__builtins__": {}}, _TYPES)  # names of _TYPES only
            default = ast.literal_eval(node.value)
        except (NameError, TypeError, ValueError) as error:
            raise RecipeError(f"{refusal}: {error}.") from None
        # A formatter may split a long line and put its comment on any of the new lines.
        comment = next((comments[line] for line in range(node.lineno, node.end_lineno + 1) if line in comments), "")
        parts = INTERVAL.match(comment) or CHOICES.match(comment)
        meaning, allowed = (parts["text"], comment[len(parts["text"]) :].strip()) if parts else (comment, "")
        name = node.target.id
        parameters[name] = Parameter(name, annotation, type_text, default, meaning, allowed)
    return parameters


def in_force(stage: str, namespace: Mapping[str, Any]):
    """Check the parameters that a notebook has now and return them as a table.

    Args:
        stage: the name of the stage.
        namespace: the notebook's `globals()`.

    Returns:
        A pandas.DataFrame indexed by parameter, with the columns value, default and meaning.

    Raises:
        RecipeError: a value is of the wrong type or out of range.
    """
    import pandas as pd

    stage_notebook = find_notebook(stage)
    parameters = stage_notebook.parameters
    values = {name: namespace[name] for name in parameters}
    if wrong := problems(stage_notebook, values, everything=True):
        raise RecipeError(f"notebooks/{stage_notebook.notebook.name}: " + "; ".join(wrong))
    pd.set_option("display.max_colwidth", None)  # the meanings are sentences
    rows = {name: [values[name], p.default, p.meaning] for name, p in parameters.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "default", "meaning"]).astype(object)


def problems(stage: Stage, values: Mapping[str, Any], everything: bool = False) -> list[str]:
    """Return the problems of `values` as parameters of `stage`; `everything` allows the folders too."""
    allowed = stage.parameters if everything else stage.settings
    messages = []
    for name in values:
        if name in stage.parameters and name not in allowed:
            messages.append(f"{stage.name}.{name}: the pipeline sets this folder, not a recipe. Delete this line.")
        elif name not in allowed and name in RETIRED:
            messages.append(f"{stage.name}.{name}: this parameter is gone: {RETIRED[name]}.")
        elif name not in allowed:
            messages.append(f"{stage.name}.{name}: there is no such parameter.{words.did_you_mean(str(name), allowed)}")
    try:
        stage.model(**{name: value for name, value in values.items() if name in allowed})
    except pydantic.ValidationError as error:
        wrong = dict.fromkeys(str(item["loc"][0]) for item in error.errors())
        for name in wrong:
            p = stage.parameters[name]
            expected = f"{p.type_text} in {p.allowed}" if p.allowed else p.type_text
            messages.append(f"{stage.name}.{name}: expected {expected}, got {values[name]!r}. It is: {p.meaning}.")
    return messages


def _read_stage(notebook: Path) -> Stage:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise RecipeError(f"{notebook.name} needs exactly one cell tagged `parameters`, it has {len(tagged)}.")
    source = "".join(tagged[0]["source"])
    parameters = read_parameters(source)
    if "out" not in parameters or not parameters["out"].made_by:
        raise RecipeError(f'{notebook.name}: the parameters cell needs out: str = "{DEMO}<stage>".')
    inputs = {name: p.made_by for name, p in parameters.items() if p.made_by and name != "out"}
    fields = {name: (p.constrained(), p.default) for name, p in parameters.items()}
    config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    name = parameters["out"].made_by
    optional = OPTIONAL.search(source)
    replaces = (optional["replaces"] or "") if optional else ""
    if replaces and replaces not in inputs.values():
        raise RecipeError(
            f"{notebook.name}: a stage can replace only a stage that it reads"
            f" ({', '.join(inputs.values()) or 'none'}), not {replaces}."
        )
    title = TITLE.match("".join(cells[0]["source"]))
    return Stage(
        name,
        notebook,
        parameters,
        inputs,
        pydantic.create_model(name, __config__=config, **fields),
        title=title["title"] if title else name,
        optional=optional is not None,
        replaces=replaces,
        is_study=STUDY.search(source) is not None or not notebook.name[0].isdigit(),
    )


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML 1.2 mapping: `1e-2` is a number, `on` and `no` are text, a repeated key is an error.

    Raises:
        RecipeError: the file is not valid YAML or not a mapping.
    """
    try:
        content = yaml().load(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{project.display_path(file)} is not UTF-8 text: {error.reason} at byte {error.start}."
        ) from None
    except YAMLError as error:
        raise RecipeError(f"{project.display_path(file)} is not valid YAML: {_where_and_why(error)}") from None
    if not isinstance(content, dict):
        raise RecipeError(
            f"{project.display_path(file)} should hold `stage: {{parameter: value}}` lines, got {content!r}."
        )
    return content


def _where_and_why(error: YAMLError) -> str:
    """Return line, column and reason of a YAML error, in one line."""
    mark, context = getattr(error, "problem_mark", None), getattr(error, "context", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    reason = " ".join((getattr(error, "problem", None) or str(error)).split())[:300]
    hint = ". Indent with spaces, not with a tab" if r"\t" in reason else ""
    return f"{where}{reason}{f' {context}' if context else ''}{hint}."


def yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False
    yaml.allow_unicode = True
    yaml.width = 110
    return yaml


def _bounds(interval: str) -> dict[str, float]:
    parts = INTERVAL.match(interval)
    low, high = float(parts["low"]), float(parts["high"])
    bounds = {}
    if math.isfinite(low):
        bounds["ge" if parts["left"] == "[" else "gt"] = low
    if math.isfinite(high):
        bounds["le" if parts["right"] == "]" else "lt"] = high
    return bounds


_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict, "Literal": Literal}
_TYPES |= {"Union": Union}
