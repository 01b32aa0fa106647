"""Runs side by side: what each is, its scores on validation, its cost, and the parameters in which they differ."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from helpers.core import disk, notebooks, project, stages, words
from helpers.evaluation import metrics, selection, tables

SEED = "seed"  # runs that differ only in this parameter are members of one entry
SHOWN = ("accuracy", "balanced_accuracy", "macro_f1", "log_loss")
EARLIER = ": it was made by an earlier Thaw. Run its recipe again."
FILES = ("predictions.csv", "val_predictions.csv", "metrics.json", "class_names.json")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: of the run's folder.
        part: the part of its predictions, "test" or "val".
        predictions, validation: as `tables.predictions_table` makes them; `path` is that of the raw image, with
            the box if boxes were cut out.
        shown: the resized file of each of `predictions`.
        groups: group of each of `predictions`.
        parameters: stage -> parameters, without folders.
        history: the epochs of both phases.
        seconds: of its phases; of a joined run, of all runs in it.
        megabytes: of its model's file.
    """

    name: str
    part: str
    class_names: list[str]
    predictions: pd.DataFrame
    validation: pd.DataFrame
    shown: dict[str, Path]
    groups: dict[str, str]
    parameters: dict[str, dict[str, Any]]
    history: pd.DataFrame
    seconds: float
    megabytes: float


@dataclass(frozen=True)
class Entry:
    """Runs that differ only in their seeds."""

    name: str
    runs: list[Run] = field(default_factory=list)


def read(names: Sequence[str]) -> list[Run]:
    """Return finished runs, in the order of `names`.

    Args:
        names: of runs, or folders of runs or of their stage evaluate.

    Raises:
        FileNotFoundError: one of them is not a run that 05_evaluate has measured.
        ValueError: fewer than two, or one of them twice.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"Name at least two runs to compare, and each once; got {', '.join(names) or 'none'}.")
    return [_read(name) for name in names]


def grouped(runs: Sequence[Run]) -> list[Entry]:
    """Return the runs as entries: those that differ only in their seeds are one, unless all of them are."""
    entries: dict[str, Entry] = {}
    for run in runs:
        same = {stage: {k: v for k, v in own.items() if k != SEED} for stage, own in run.parameters.items()}
        entries.setdefault(str(same), Entry(run.name)).runs.append(run)
    if len(entries) == 1:
        return [Entry(run.name, [run]) for run in runs]
    return [
        Entry(entry.name if len(entry.runs) == 1 else f"{entry.name} ({len(entry.runs)} seeds)", entry.runs)
        for entry in entries.values()
    ]


def leaderboard(entries: Sequence[Entry], by: str = "log_loss", seed: int = 0) -> pd.DataFrame:
    """Return the scores of the entries on validation, the best first; test does not change the order.

    Args:
        entries: from `grouped`.
        by: the metric of the order, one of accuracy, balanced_accuracy, macro_f1, log_loss.
        seed: of the resamples.

    Returns:
        Columns entry, runs (how many), accuracy with low and high (95 % interval of the images), spread (between the
        lowest and the highest run), balanced_accuracy, macro_f1, log_loss, minutes (of both phases) and megabytes (of
        the model), all of them means over runs.
    """
    rows = []
    for entry in entries:
        every = [metrics.metrics(run.validation, run.class_names, seed=seed, n_bootstrap=500) for run in entry.runs]
        accuracy = pd.DataFrame([one["accuracy"] for one in every])
        row = {"entry": entry.name, "runs": len(entry.runs), **accuracy.mean().rename({"value": "accuracy"})}
        row["spread"] = accuracy["value"].max() - accuracy["value"].min()
        row |= {name: sum(one[name]["value"] for one in every) / len(every) for name in SHOWN[1:]}
        row["minutes"] = sum(run.seconds for run in entry.runs) / len(entry.runs) / 60
        row["megabytes"] = sum(run.megabytes for run in entry.runs) / len(entry.runs)
        rows.append(row)
    return pd.DataFrame(rows).sort_values(by, ascending=by == "log_loss", kind="stable").reset_index(drop=True)


def differing(entries: Sequence[Entry]) -> pd.DataFrame:
    """Return only the parameters in which the entries differ: a row each, a column for each entry.

    The index is stage.parameter; a stage that an entry has not run is "–".
    """
    table = {
        entry.name: {
            f"{stage}.{name}": value for stage, own in entry.runs[0].parameters.items() for name, value in own.items()
        }
        for entry in entries
    }
    rows = list(dict.fromkeys(row for column in table.values() for row in column))
    kept = [row for row in rows if len({str(column.get(row, "–")) for column in table.values()}) > 1]
    return pd.DataFrame({name: [column.get(row, "–") for row in kept] for name, column in table.items()}, index=kept)


def same_images(entries: Sequence[Entry], common: bool = False) -> list[str]:
    """Return the paths of the images on which the runs can be compared.

    Args:
        entries: from `grouped`.
        common: if the measured images differ, take those that all have.

    Raises:
        ValueError: the runs have other classes, or other labels for an image; they were measured on other images and
            `common` is false; or they have no image in common.
    """
    runs = [run for entry in entries for run in entry.runs]
    first = runs[0]
    for other in runs[1:]:
        if set(other.class_names) != set(first.class_names):
            raise ValueError(f"{first.name} and {other.name} have other classes, so they cannot be compared.")
        if other.part != first.part:
            raise ValueError(f"{first.name} was measured on {first.part}, {other.name} on {other.part}.")
    each = [set(run.predictions["path"]) for run in runs]
    shared = set.intersection(*each)
    apart = next((number for number, own in enumerate(each) if own != each[0]), None)
    if apart is not None and not common:
        raise ValueError(
            f"{first.name} was measured on {len(each[0]):,} images, {runs[apart].name} on {len(each[apart]):,};"
            f" {len(each[0] & each[apart]):,} are the same. A difference could come from the images. Give"
            " both runs the same split (split.seed, split.ratio), or compare on the common images: --common."
        )
    if not shared:
        raise ValueError(f"{first.name} and the others have no measured image in common.")
    labels = first.predictions.set_index("path")["label"]
    for other in runs[1:]:
        own = other.predictions.set_index("path")["label"]
        if wrong := [path for path in sorted(shared) if own[path] != labels[path]]:
            raise ValueError(
                f"{first.name} and {other.name} give {wrong[0]} other labels; name runs with equal labels."
            )
    return sorted(shared)


def measured(name: str) -> Path:
    """Return the folder that 05_evaluate wrote for a run; `name` is its name, its folder or that of the stage.

    Raises:
        FileNotFoundError: there is none.
    """
    return stages.of_run(name, "evaluate", "predictions.csv", "metrics.json", parameter="runs")


def _read(name: str) -> Run:
    folder = measured(name)
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{project.display_path(folder)} has no {', '.join(missing)}{EARLIER}")
    run = Path(name.rstrip("/"))
    parameters = disk.read_json(folder / stages.STAGE_FILE)["parameters"]
    reads = {stage: project.resolve(parameters[p]) for p, stage in notebooks.stages()["evaluate"].inputs.items()}
    records = {"evaluate": folder, **{_made_by(path, stage): path for stage, path in reads.items() if path.is_dir()}}
    about = {stage: disk.read_json(path / stages.STAGE_FILE) for stage, path in records.items()}
    predictions, validation = (tables.read_predictions(folder / file) for file in FILES[:2])
    if tables.FILE not in predictions:
        raise FileNotFoundError(f"{project.display_path(folder / FILES[0])} has no column file{EARLIER}")
    listed = disk.read_table(reads["resize"] / "images.csv").set_index("file")
    raw_paths = listed["path"] + (":" + listed["box"] if "box" in listed else "")
    predictions = predictions.assign(path=[raw_paths.get(file, file) for file in predictions["file"]])
    shown = {row.path: reads["resize"] / row.file for row in predictions.itertuples()}
    about |= _earlier(about)
    trained = [stage for stage in notebooks.stages() if (records.get(stage, folder) / "history.csv").is_file()]
    histories = [pd.read_csv(records[stage] / "history.csv") for stage in trained]
    alone = sum(about[stage].get("seconds", 0.0) for stage in trained if notebooks.stages()[stage].trains)
    joined = sum(table.loc[table["phase"] == selection.JOINED, "seconds"].sum() for table in histories)
    groups = disk.read_table(reads["explore"] / "inventory.csv").drop_duplicates("path").set_index("path")["group"]
    return Run(
        name=run.parent.name if run.name == "evaluate" else run.name,
        part=disk.read_json(folder / "metrics.json").get("part", "test"),
        class_names=disk.read_json(folder / "class_names.json"),
        predictions=predictions,
        validation=validation,
        shown=shown,
        groups={path: groups.get(path.split(":")[0], path) for path in shown},
        parameters={stage: _settings(stage, record) for stage, record in about.items()},
        history=pd.concat(histories, ignore_index=True) if histories else pd.DataFrame(),
        seconds=joined or alone,
        megabytes=(folder / "model.keras").stat().st_size / 1e6,
    )


def _made_by(path: Path, stage: str) -> str:
    """Return the stage whose notebook made the folder of `stage`, or of another stage that replaces it."""
    maker = disk.read_json(path / stages.STAGE_FILE).get("stage", stage)
    return maker if maker in notebooks.stages() and notebooks.stages()[maker].replaces == stage else stage


def _earlier(about: dict[str, dict]) -> dict[str, dict]:
    """Return the records of the stages that the stages of `about` read, such as the split."""
    records: dict[str, dict] = {}
    for stage, record in about.items():
        for parameter, other in notebooks.stages()[stage].inputs.items():
            path = project.resolve(str(record["parameters"].get(parameter, "")))
            if other not in about and (path / stages.STAGE_FILE).is_file():
                records[other] = disk.read_json(path / stages.STAGE_FILE)
    return records


def _settings(stage: str, record: dict) -> dict[str, Any]:
    settings = notebooks.stages()[stage].settings if stage in notebooks.stages() else {}
    return {name: value for name, value in record["parameters"].items() if name in settings}


def sentence(entries: Sequence[Entry], runs: Sequence[Run]) -> str:
    """Return how many runs make how many entries."""
    several = [entry.name for entry in entries if len(entry.runs) > 1]
    note = f"; runs that differ only in their seeds count as one: {', '.join(several)}" if several else ""
    first = words.shorten(entries[0].name, 60)
    return f"{len(runs)} runs, {len(entries)} entries{note}. The others are compared with {first}."
