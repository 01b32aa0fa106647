"""A first recipe for a user's own images: `thaw new`."""

import io
import statistics
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from helpers.core import disk, machine, notebooks, project, words
from helpers.data import images, sources, splits
from helpers.data.labelling import archives, folders, tables
from helpers.pipeline import recipes

SAMPLE = 200  # images whose size is read
SOLVED = 200_000  # images times classes up to which the head is solved rather than trained by epochs
SECONDS = {"a run": 40, "an image": 0.16}  # by one run, of ELPV on two cores; an image's on one core
UNEQUAL = 3  # weigh the classes when the largest has more than so many times the images of the smallest


def write_recipe(
    name: str, source: str, class_folders: folders.Levels = "auto", *, label: str = "", group: str = ""
) -> str:
    """Write recipes/<name>.yaml for the images in `source` and return a summary of what was found.

    Args:
        name: of the recipe and its run.
        source: a folder, a table of labels or an archive (relative to the working directory), or the name of a built-in
            data set. An archive is unpacked into data/<name>.
        class_folders: of folders in folders, the one that names the class.
        label, group: columns of a table of labels; "" to detect them.

    Raises:
        ValueError: the name cannot name a run, or the source holds no usable images, or an archive is unsafe.
        FileExistsError: the recipe exists already.
    """
    if problems := recipes.check({"name": name}):
        raise notebooks.RecipeError(problems[0])
    if "/" in name:
        raise notebooks.RecipeError(f"name: {name!r} cannot name a run outside a sweep: leave the slash out.")
    path = project.ROOT / "recipes" / f"{name}.yaml"
    if path.exists():
        raise FileExistsError(f"{project.display_path(path)} exists already. Take another name, or edit it.")
    source_parameters, notes = _source_parameters(name, source, class_folders, label, group)
    explore = {key: p.default for key, p in notebooks.find_stage("explore").settings.items()}
    try:
        data = sources.read(explore | source_parameters)
    except ValueError as error:
        raise ValueError(" ".join([str(error), *notes, *_tables_beside(name, source_parameters)])) from None
    counts, side = data.table["label"].value_counts(), _typical_side(data)
    summary = f"{counts.sum():,} images in {len(counts)} classes, {counts.min():,} to {counts.max():,} a class"
    summary += f", typically {side} pixels on the shorter side"
    filled: dict[str, dict[str, Any]] = {"explore": source_parameters, "head": {"levels": "auto", "pool": "mean_std"}}
    if counts.sum() * len(counts) <= SOLVED:
        filled["head"]["solver"] = "auto"
    notes = [f"{name}: {summary}.", *notes, *data.notes]
    parts = data.table.loc[data.table["split"] != "", "split"].value_counts()
    if len(parts):
        filled["split"] = {"method": "predefined"}
        sizes = ", ".join(f"{part} {parts[part]:,}" for part in ("train", "val", "test") if part in parts)
        notes.append(f"There is a ready-made split, which is kept (split.method: predefined): {sizes}.")
        for part in parts.index:
            classes = set(data.table.loc[data.table["split"] == part, "label"])
            if lacking := [label for label in counts.index if label not in classes]:
                notes.append(f"{part} lacks {len(lacking)} of the classes: {', '.join(lacking[:10])}.")
    if counts.max() > UNEQUAL * counts.min():
        filled["head"]["imbalance"] = "class_weight"
        filled["fine_tune"] = {"imbalance": "class_weight"}
        notes.append("The classes are unequal, so the loss weighs them.")
    image_size = notebooks.find_stage("resize").settings["image_size"].default
    if side < image_size:
        notes.append(f"The images are smaller than resize.image_size ({image_size}) and will be enlarged to it.")
    notes.append(_time(counts.sum()))
    disk.write_text(path, _text(name, summary, filled))
    settings = {key: p.default for key, p in notebooks.find_stage("split").settings.items()}
    try:
        splits.rehearse(data.table, settings | filled.get("split", {}))
    except ValueError as error:
        notes.append(f"Before it can run: {error}")
    notes.append(f"Written: {project.display_path(path)}. Next: thaw run {project.display_path(path)}")
    return "\n".join(notes)


def _time(images: int) -> str:
    """Return how long a run takes on as many cores as this machine has; how fast they are is not measured."""
    cores = machine.cores()
    seconds = SECONDS["a run"] + images * SECONDS["an image"] / cores
    return (
        f"A run takes about {words.duration(seconds)} on {cores} fast cores, as many as this machine has, and two to"
        " three times as long on slow ones; much less on a GPU. Measured with efficientnet_lite0."
    )


def _source_parameters(
    name: str, source: str, class_folders: folders.Levels, label: str, group: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the parameters of 00_explore for a source on the command line, and notes on how it is read."""
    path = Path(source)
    if path.is_file() and archives.is_archive(path):
        folder = archives.unpack(path, project.ROOT / "data" / name)
        parameters, notes = _source_parameters(name, str(folder), class_folders, label, group)
        return parameters, [f"{path.name} is unpacked into {project.display_path(folder)}.", *notes]
    if path.is_file():
        if path.suffix.lower() not in tables.TABLES:
            endings = ", ".join(tables.TABLES)
            raise ValueError(
                f"{source} is not a folder, a table of labels ({endings}), an archive or a built-in data set."
            )
        if class_folders != "auto":
            raise ValueError("--classes is for folders; a table names the class of each image itself.")
        columns = tables.find_columns(path.resolve(), label, group)
        return {"source": project.display_path(columns.source)} | columns.parameters, columns.notes
    if label or group:
        raise ValueError(f"--label and --group name columns of a table of labels; {source} is not one.")
    if path.is_dir():
        source = project.display_path(path.resolve())
    return {"source": source} | ({"class_folders": class_folders} if class_folders != "auto" else {}), []


def _tables_beside(name: str, source_parameters: dict[str, Any]) -> list[str]:
    """Return a hint where a folder that names no classes holds a table, which may name them."""
    root = project.resolve(source_parameters["source"])
    if "labels" in source_parameters or not root.is_dir():
        return []
    files = sorted(path for path in [*root.glob("*"), *root.glob("*/*")] if path.suffix.lower() in tables.TABLES[:2])
    if not files:
        return []
    file_name = project.display_path(files[0])
    return [f"If {files[0].name} names the classes: thaw new {name} {file_name}"]


def _typical_side(data: sources.Source) -> int:
    """Return the median of the shorter sides of up to SAMPLE images, read from their headers.

    Raises:
        ValueError: none of them is an image.
    """
    sides = []
    for path in data.table["path"].sample(min(SAMPLE, len(data.table)), random_state=0):
        try:
            sides.append(min(images.open_image(images.read_bytes(data.root / path)).size))
        except images.ImageError:
            continue  # 00_explore will name it
    if not sides:
        raise ValueError(f"None of the files read below {project.display_path(data.root)} is an image.")
    return int(statistics.median(sides))


def _text(name: str, summary: str, filled: dict[str, dict[str, Any]]) -> str:
    """Return a recipe with every parameter of every stage: those in `filled` set, the others as comments."""
    lines = [
        f"# {summary}.",
        "# Every parameter is here. After a # stands the notebook's own value: remove the # to change it.",
        f"name: {name}",
    ]
    for stage in notebooks.stages().values():
        section = filled.get(stage.name, {})
        lines += ["", f"{'' if section else '# '}{stage.name}:  # notebooks/{stage.notebook.name}"]
        for parameter in stage.settings.values():
            value = _yaml_value(section.get(parameter.name, parameter.default))
            mark = "  " if parameter.name in section else "#   "
            lines.append(f"{mark}{parameter.name}: {value}  # {parameter.meaning} {parameter.allowed}".rstrip())
    return "\n".join(lines) + "\n"


def _yaml_value(value: Any) -> str:
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = True, 10_000
    yaml.dump(value, stream)
    return stream.getvalue().replace("...", "").strip()
