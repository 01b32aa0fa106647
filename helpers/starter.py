"""A first recipe for somebody's own images: `thaw new`."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from helpers import recipes, runs, sources

UNEQUAL = 3  # weigh the classes when the largest has more than so many times the images of the smallest


def write_recipe(name: str, source: str) -> str:
    """Write recipes/<name>.yaml for the images in `source` and return a summary of what was found.

    Args:
        name: of the recipe and its run.
        source: a folder (relative to the working directory), or the name of a built-in data set.

    Raises:
        ValueError: the name cannot name a run, or the source holds no usable images.
        FileExistsError: the recipe exists already.
    """
    if problems := recipes.check({"name": name}):
        raise recipes.RecipeError(problems[0])
    path = runs.ROOT / "recipes" / f"{name}.yaml"
    if path.exists():
        raise FileExistsError(f"{runs.display_path(path)} exists already. Take another name, or edit it.")
    if Path(source).is_dir():
        source = runs.display_path(Path(source).resolve())
    explore = {key: p.default for key, p in recipes.find_stage("explore").settings.items()} | {"source": source}
    counts = sources.read(explore).table["label"].value_counts()
    found = f"{counts.sum():,} images in {len(counts)} classes, {counts.min():,} to {counts.max():,} a class"
    filled: dict[str, dict[str, Any]] = {"explore": {"source": source}}
    notes = [f"{name}: {found}."]
    if counts.max() > UNEQUAL * counts.min():
        filled["head"] = filled["fine_tune"] = {"imbalance": "class_weight"}
        notes.append("The classes are unequal, so the loss weighs them.")
    runs.write_text(path, _text(name, found, filled))
    notes.append(f"Written: {runs.display_path(path)}. Next: thaw run {runs.display_path(path)}")
    return "\n".join(notes)


def _text(name: str, found: str, filled: dict[str, dict[str, Any]]) -> str:
    """Return a recipe with every parameter of every stage: those in `filled` set, the others as comments."""
    lines = [
        f"# {found}.",
        "# Every parameter is here. Behind a #, the notebook's own value holds: remove the # to change it.",
        f"name: {name}",
    ]
    for stage in recipes.stages().values():
        given = filled.get(stage.name, {})
        lines += ["", f"{'' if given else '# '}{stage.name}:  # notebooks/{stage.notebook.name}"]
        for parameter in stage.settings.values():
            value = _yaml_value(given.get(parameter.name, parameter.default))
            mark = "  " if parameter.name in given else "#   "
            lines.append(f"{mark}{parameter.name}: {value}  # {parameter.meaning} {parameter.allowed}".rstrip())
    return "\n".join(lines) + "\n"


def _yaml_value(value: Any) -> str:
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = True, 10_000
    yaml.dump(value, stream)
    return stream.getvalue().replace("...", "").strip()
