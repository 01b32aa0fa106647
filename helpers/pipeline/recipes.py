"""Recipes: one YAML file that says how a run differs from the notebooks' own values."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from helpers.core import notebooks, project, words

RUN_NAME = re.compile(r"[^\W_][\w-]{0,99}(/[^\W_][\w-]{0,99})?")  # SWEEP/MEMBER too
ABOUT_THE_RUN = {"name", "extends", "description", "published"}
OF_A_SWEEP = {"grid", "zip", "members", "seeds", "names", "to", "search", "halving"}  # see `sweeps.files`


@dataclass
class Recipe:
    """A run's name and, for every stage, the parameters that differ from the notebook's own."""

    name: str
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    description: str = ""
    published: dict[str, float] = field(default_factory=dict)
    path: Path | None = None

    def chain(self) -> list[str]:
        """Return the names of the stages that this recipe runs, in order: all but the optional ones it leaves out."""
        return [stage.name for stage in notebooks.stages().values() if not stage.optional or stage.name in self.stages]

    def resolved(self, stage: str) -> dict[str, Any]:
        """Return every parameter of `stage` with the value that the run uses."""
        return {name: self._value(stage, name) for name in notebooks.stages()[stage].settings}

    def _value(self, stage: str, name: str) -> Any:
        section, parameter = self.stages.get(stage, {}), notebooks.stages()[stage].settings[name]
        if name in section:
            return section[name]
        return self._value(*parameter.follows) if parameter.follows else parameter.default

    def as_yaml(self) -> str:
        """Return the recipe with every parameter written out."""
        content: dict[str, Any] = {"name": self.name}
        content |= {key: value for key in ("description", "published") if (value := getattr(self, key))}
        content |= {stage: self.resolved(stage) for stage in self.chain()}
        stream = io.StringIO()
        notebooks.yaml().dump(content, stream)
        return stream.getvalue()


def load(path: str | Path, overrides: list[str] | None = None, name: str = "") -> Recipe:
    """Read a recipe, apply `stage.parameter=value` overrides, and check all of it.

    Args:
        path: the YAML file. A relative path is tried from the working directory, then from the project's root.
        overrides: settings such as "fine_tune.epochs=5"; the value is read as YAML.
        name: the run's name, instead of the recipe's.

    Raises:
        RecipeError: anything is unknown, of the wrong type or out of range. All problems are listed together.
    """
    file, content, problems = read(path, overrides)
    content["name"] = name or content.get("name", file.stem)
    problems += check(content)
    if problems:
        raise notebooks.RecipeError(
            "\n".join([f"{project.display_path(file)} cannot be run:", *(f"  - {p}" for p in problems)])
        )
    return build(content, file)


def read(path: str | Path, overrides: list[str] | None = None) -> tuple[Path, dict[str, Any], list[str]]:
    """Return the file, its content with what it extends and the overrides, and the overrides' problems; see `load`."""
    file = _find(Path(path))
    content = _read_extended(file, ())
    problems: list[str] = []
    for override in overrides or []:
        problems += _override(content, override)
    return file, content, problems


def build(content: Mapping[str, Any], file: Path | None) -> Recipe:
    """Return a recipe made of content in which `check` finds no problem."""
    about = {key: content[key] for key in ("name", "description", "published") if key in content}
    sections = {
        name: dict(content[name])
        for name, stage in notebooks.stages().items()
        if content.get(name) or (stage.optional and content.get(name) is not None)
    }
    return Recipe(stages=sections, path=file, **about)


def check(content: Mapping[str, Any]) -> list[str]:
    """Return every problem of a recipe's content, in words; an empty list when it can be run."""
    problems = []
    name = content.get("name")
    if not isinstance(name, str) or not RUN_NAME.fullmatch(name):
        problems.append(
            f"name: {name!r} cannot name a run. Use letters, digits, - and _, beginning with a letter or digit:"
            " it becomes a folder below runs/."
        )
    published = content.get("published", {})
    if not isinstance(published, dict) or not all(isinstance(v, int | float) for v in published.values()):
        problems.append(f"published: expected a mapping of a name to a number, got {published!r}.")
    for key, section in content.items():
        if key in ABOUT_THE_RUN:
            continue
        if key in OF_A_SWEEP:
            problems.append(f"{key}: this belongs to a sweep, which `thaw sweep` runs.")
        elif key not in notebooks.stages():
            problems.append(
                f"{key}: there is no such stage.{words.did_you_mean(str(key), [*notebooks.stages(), *ABOUT_THE_RUN])}"
            )
        elif section is not None and not isinstance(section, dict):
            example = next(iter(notebooks.stages()[key].settings))
            problems.append(f"{key}: expected parameters, e.g. {{{example}: ...}}, got {section!r}.")
        else:
            problems += notebooks.problems(notebooks.stages()[key], section or {})
    return problems


def _read_extended(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Read a recipe over the one that it extends, parameter by parameter."""
    if file in seen:
        raise notebooks.RecipeError(
            f"{project.display_path(file)} extends itself: {' -> '.join(p.name for p in (*seen, file))}."
        )
    content = notebooks.read_yaml(file)
    if "extends" not in content:
        return content
    base = _read_extended(_find(file.parent / str(content.pop("extends"))), (*seen, file))
    merged = {key: value for key, value in base.items() if key != "name"}
    for key, value in content.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merged[key] | value if both else value
    return merged


def _override(content: dict[str, Any], override: str) -> list[str]:
    key, equals, text = override.partition("=")
    stage, dot, name = key.strip().partition(".")
    if not (equals and dot and name):
        return [f"--set {override}: expected stage.parameter=value, e.g. fine_tune.epochs=5."]
    try:
        value = notebooks.yaml().load(text) if text.strip() else ""
    except YAMLError:
        value = text
    if (
        stage in notebooks.stages()
        and name in notebooks.stages()[stage].settings
        and notebooks.stages()[stage].settings[name].annotation is str
    ):
        value = value if isinstance(value, str) else text.strip()  # a folder may be called 2024
    section = content.get(stage)
    content[stage] = (section if isinstance(section, dict) else {}) | {name: value}
    return []


def _find(path: Path) -> Path:
    for candidate in (Path.cwd() / path, project.ROOT / path, project.ROOT / "recipes" / path):
        if candidate.is_file():
            return candidate.resolve()
    recipe_paths = [str(p.relative_to(project.ROOT)) for p in sorted((project.ROOT / "recipes").rglob("*.yaml"))]
    raise notebooks.RecipeError(f"There is no recipe {path}.{words.did_you_mean(str(path), recipe_paths)}")
