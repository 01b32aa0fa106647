"""The model card of a bundle: what the model is, its measured quality, and its limits.

Its header is in the format of the Hugging Face Hub (https://huggingface.co/docs/hub/model-cards).
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.core import disk, notebooks, project, stages, words
from helpers.evaluation import metrics
from helpers.evaluation.trust import distances
from helpers.export import bundle, certificate

UNKNOWN = "unknown: ask the owner of the images"
PER_CLASS = 30  # rows of a table


def write(folder: Path, evaluated: Path, parities: Sequence[certificate.Parity], *, name: str, licence: str) -> Path:
    """Write README.md of a bundle.

    Args:
        folder: of the bundle, whose formats are proved.
        evaluated: the folder of 05_evaluate.
        parities: of its formats.
        name: of the model.
        licence: of the model and its images, by its name on the Hub (such as mit); "" if unknown.
    """
    measured, about = disk.read_json(evaluated / "metrics.json"), disk.read_json(evaluated / "model.json")
    facts = _facts(folder, evaluated, measured, about, licence)
    certified = certificate.table(list(parities)).rename_axis("format").reset_index()
    images = f"{parities[0].images:,} image files, in a process without Thaw, and compared with the Keras model"
    proof = [f"Each format classified {images}.", "", _markdown(certified), ""]
    proof += ["`python verify.py` repeats it on the golden images.", "", "## Recipe", ""]
    lines = [_header(name, measured, licence), f"# {name}", "", *facts, "", "## Proof", "", *proof]
    text = "\n".join([*lines, "```yaml", _recipe(evaluated), "```", ""])
    return disk.write_text(folder / "README.md", text)


def _header(name: str, measured: dict[str, Any], licence: str) -> str:
    part = "validation" if measured.get("part") == "val" else "test"
    scores = [{"type": key, "value": round(measured[key]["value"], 4)} for key in metrics.NAMES if key in measured]
    task = {"type": "image-classification", "name": "Image Classification"}
    result = {"task": task, "dataset": {"name": name, "type": name, "split": part}, "metrics": scores}
    content = {"license": licence or "unknown", "pipeline_tag": "image-classification", "library_name": "litert"}
    content |= {"tags": ["thaw", "transfer-learning"], "model-index": [{"name": name, "results": [result]}]}
    return f"---\n{_yaml(content)}\n---\n"


def _facts(folder: Path, evaluated: Path, measured: dict, about: dict, licence: str) -> list[str]:
    versions, part = stages.versions(), "validation" if measured.get("part") == "val" else "test"
    lines = [f"An image classifier with {len(measured['class_names'])} classes: {_listed(measured['class_names'])}."]
    lines += [
        f"Version {bundle.version_of(folder)}. Backbone {about['backbone']}, images of {about['image_size']} pixels."
    ]
    lines += ["", "    python predict.py photo.jpg folder/ --csv answers.csv", ""]
    lines += [f"## Measured on {measured['n']:,} {part} images", ""]
    rows = [(f"{metrics.NAMES[key]}", _interval(key, measured[key])) for key in metrics.NAMES if key in measured]
    lines += [_table(["metric", "value (95 % interval)"], rows), "", "### By class", ""]
    keys = ("label", "precision", "recall", "f1", "support")
    by_class = [tuple(_short(row.get(key)) for key in keys) for row in measured["per_class"][:PER_CLASS]]
    lines += [_table(list(keys), by_class), ""]
    if groups := measured.get("subgroups"):
        lines += ["### By subgroup", "", _table(list(groups[0]), [tuple(map(_short, g.values())) for g in groups]), ""]
    lines += ["## Limits", "", _novelty(folder, len(measured["class_names"]))]
    lines += ["- The numbers hold for images like those of the test part: the same cameras, places and time."]
    if measured.get("part") == "val":
        lines += ["- There was no test part. Validation chose the model, so its numbers are too optimistic."]
    if boxes := about.get("crop", {}).get("boxes"):
        lines += [f"- It learned on images cut to the boxes of {boxes}. Cut yours in the same way first."]
    decision = disk.read_json(folder / "decision.json") if (folder / "decision.json").is_file() else {}
    if promise := decision.get("promise"):
        lines += [f'- It may answer "unsure": its promise is {promise.get("kind")} of {promise.get("wanted", "?")}.']
    lines += [f"- Licence: {licence or UNKNOWN}. The golden images are images of the data set.", "", "## Versions", ""]
    return [*lines, ", ".join(f"{package} {version}" for package, version in versions.items())]


def _novelty(folder: Path, classes: int) -> str:
    novelty = distances.read(folder)
    sentence = f"- It has {classes} classes and answers every image with one of them."
    if novelty is None:
        return sentence
    share = words.percent(novelty.false_alarms)
    return f"{sentence} `novel` marks images that look like none of them, but also {share} of the validation images."


def _interval(key: str, score: dict[str, Any]) -> str:
    show = (lambda value: f"{value:.3f}") if key in ("auc", "log_loss", "ece") else words.percent
    between = f" ({show(score['low'])} to {show(score['high'])})" if score.get("low") is not None else ""
    return show(score["value"]) + between


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _markdown(table) -> str:
    return _table(list(table.columns), list(table.itertuples(index=False)))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def _recipe(evaluated: Path) -> str:
    """Return the parameters of every stage behind a model, without the folders, as YAML."""
    recipe: dict[str, dict] = {}
    waiting, seen = [evaluated], set()
    while waiting:
        folder = waiting.pop(0).resolve()
        if folder in seen:  # a stage made by hand names itself, as `out`
            continue
        seen.add(folder)
        record = disk.read_json(folder / stages.STAGE_FILE)
        stage = notebooks.stages().get(record["stage"].split("-")[0])
        name = stage.name if stage else record["stage"]
        parameters = record.get("parameters", {})
        folders = [project.resolve(v) for v in parameters.values() if isinstance(v, str) and v]
        waiting += [path for path in folders if (path / stages.STAGE_FILE).is_file()]
        kept = {key: value for key, value in parameters.items() if not stage or key in stage.settings}
        recipe[name] = kept
    return _yaml(dict(reversed(recipe.items())))


def _yaml(content: dict) -> str:
    stream = io.StringIO()
    notebooks.yaml().dump(content, stream)
    return stream.getvalue().rstrip()
