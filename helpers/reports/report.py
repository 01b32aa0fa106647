"""The report of a run: one HTML file that needs no network, results first and then everything behind them.

`build_report` reads only the run's folder, so a report can be made again at any time, also for a run that
stopped early. Figures, images and style sheets are inside the file; text from data (class names, file names, notes)
is escaped by Jinja, and the notebooks' own HTML is cleaned by nbconvert.
"""

import base64
import io
import os
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from markupsafe import Markup
from PIL import Image

from helpers.core import disk, notebooks, project, stages, words
from helpers.data.formats import deep
from helpers.data.labelling import fixes
from helpers.data.splits import PARTS, UNUSED, dropped, listed
from helpers.evaluation import details, metrics, tables
from helpers.evaluation.trust import promises
from helpers.reports import charts, curves, doubts, pages, sheets

GROUPS, PER_GROUP = 3, 2  # groups of look-alikes shown, and images of each
MISTAKES = 18  # images in the gallery: three rows of six
ROWS = 20  # of a table without a limit, such as the quarantine


def build_report(run_folder: str | os.PathLike) -> Path:
    """Write `report.html` of a run, whole or not at all, and return its path.

    Args:
        run_folder: runs/<name>, with the stages that are done so far.

    Raises:
        FileNotFoundError: there is no such folder, or no stage in it is done.
    """
    run = project.resolve(run_folder)
    stages = defaultdict(lambda: None, {name: read_stage(run / name) for name in notebooks.stages()})
    if not any(stages.values()):
        raise FileNotFoundError(
            f"{project.display_path(run)} has no finished stage to report on. `thaw run` with its recipe makes them."
        )
    return disk.write_text(run / "report.html", render(run, stages))


def render(run: Path, stages: dict[str, dict | None]) -> str:
    """Return the report as a string of HTML."""
    recipe = _recipe(run)
    environment = pages.environment()
    environment.filters |= {"percent": _percent, "duration": words.duration, "figure": _figure, "moment": _moment}
    return environment.get_template("report.html.j2").render(
        name=recipe.get("name", run.name),
        description=recipe.get("description", ""),
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        steps=_steps(stages),
        seconds=sum(stage.get("seconds", 0) for stage in stages.values() if stage),
        code_style=pages.code_style(),
        **{section: make(run, stages) for section, make in SECTIONS.items()},
    )


def read_stage(folder: Path) -> dict | None:
    """Return the stage.json of a finished stage; None if the stage is missing, unfinished or not one of Thaw."""
    return disk.read_json(folder / stages.STAGE_FILE) if stages.status(folder) == "done" else None


def _recipe(run: Path) -> dict:
    path = run / "recipe.yaml"
    return notebooks.read_yaml(path) if path.is_file() else {}


def _steps(stages: dict[str, dict | None]) -> list[dict]:
    return [
        {"title": stage.title, "done": bool(stages[name]), "record": stages[name] or {}, "name": name}
        for name, stage in notebooks.stages().items()
        if stages[name] or not stage.optional
    ]


def _results(run: Path, stages: dict) -> dict | None:
    """Return headline, confusions and mistakes on the test part, or on the part that was measured instead."""
    if not stages["evaluate"]:
        return None
    folder = run / "evaluate"
    result = disk.read_json(folder / "metrics.json")
    names = result["class_names"]
    predictions = tables.read_predictions(folder / "predictions.csv")
    mistakes = details.confident_mistakes(predictions, names, n=MISTAKES)
    frame = pd.DataFrame(result["per_class"])
    return {
        "metrics": result,
        "kind": "validation" if result.get("part") == "val" else "test",
        "cards": [(key, title, result[key]) for key, title in metrics.CARDS.items() if key in result],
        "published": _published(result["accuracy"], _recipe(run).get("published") or {}),
        "confusion": _svg(charts.confusion_matrix, result["confusion_matrix"], names),
        "per_class_figure": _svg(charts.per_class, frame) if len(names) > 2 else None,
        "per_class": frame.astype(object).where(frame.notna(), None).to_dict("records"),
        "reliability": _svg(charts.reliability, pd.DataFrame(result["reliability"])),
        "trust": _trust(run, result, predictions, names),
        "mistakes": [_with_image(run, row) for row in mistakes.to_dict("records")],
        "n_mistakes": result["n"] - result["n_correct"],
    }


def _trust(run: Path, result: dict, predictions: pd.DataFrame, names: list[str]) -> dict | None:
    """Return the doubts of 05: sentences, the curve of risk and coverage, and images with their maps."""
    if "calibration" not in result:  # measured by an earlier Thaw
        return None
    outcome, gaps = result["promise"], result["gaps"]
    sentences = [result["calibration"]["sentence"], metrics.errors_text(result["calibration"]["errors"])]
    figure = run / "evaluate" / "explained.png"
    return {
        "sentences": [*sentences, *([outcome["sentence"]] if outcome else []), *gaps, *result["cheats"]],
        "risk": _svg(doubts.risk_and_coverage, promises.risk_and_coverage(predictions, names), outcome),
        "explained": _uri("image/png", figure.read_bytes()) if figure.is_file() else None,
    }


def _published(accuracy: dict, published: dict[str, float]) -> dict | None:
    """Return this run's accuracy and the published ones as places (0-100) on one common scale, best first."""
    if not published:
        return None
    rows = [{"name": name, "value": metrics.as_fraction(value), "own": False} for name, value in published.items()]
    rows.append({"name": "this run", "own": True, **accuracy})
    ends = [value for row in rows for value in (row["value"], row.get("low"), row.get("high")) if value is not None]
    margin = 0.15 * (max(ends) - min(ends)) or 0.05
    low, high = max(0.0, min(ends) - margin), min(1.0, max(ends) + margin)
    for row in rows:
        for key in ("value", "low", "high"):
            if row.get(key) is not None:
                row[f"{key}_at"] = round(100 * (row[key] - low) / (high - low), 2)
    return {"rows": sorted(rows, key=lambda row: -row["value"]), "low": low, "high": high}


def _training(run: Path, stages: dict) -> dict | None:
    """Return the curves of the phases that are done, as one figure."""
    trained = [stage for name, stage in notebooks.stages().items() if stage.trains and stages[name]]
    histories = [pd.read_csv(run / stage.name / "history.csv") for stage in trained]
    histories = [history for history in histories if len(history)]
    if not histories:
        return None
    history = pd.concat(histories, ignore_index=True)
    monitor = stages[trained[-1].name]["parameters"].get("monitor") or "val_loss"
    titles = {stage.name: stage.title for stage in trained}
    return {
        "curves": _svg(curves.training_curves, history, monitor=monitor),
        "rates": _svg(curves.learning_rates, history)
        if history.get("learning_rate", pd.Series()).notna().any()
        else None,
        "phases": [
            (titles.get(name, name), len(table), table["seconds"].sum())
            for name, table in history.groupby("phase", sort=False)
        ],
    }


def _data(run: Path, stages: dict) -> dict | None:
    """Return the data: images per class and part, files set aside and why, and whether the parts are separate."""
    data = _NO_DATA.copy()
    for name, section in DATA.items():
        if stages[name]:
            data |= section(run, stages)
    if data["counts"] is None:
        return None
    counts, names = data["counts"], data.pop("names")
    data["figure"] = _svg(charts.class_counts, counts)
    data["parts"] = [part for part in (*PARTS, UNUSED) if part in set(counts.get("part", ()))]
    table = pd.crosstab(counts["label"], counts["part"]) if data["parts"] else counts.groupby("label").size().to_frame()
    table["total"] = table.sum(axis=1)
    if names.is_file():  # natural order: 9 before 10
        table = table.reindex([name for name in disk.read_json(names) if name in table.index])
    return data | {"counts": table.reset_index().to_dict("records")}


def _explored(run: Path, stages: dict) -> dict:
    listed = run / ("crop" if stages["crop"] else "explore")
    inventory, folder = disk.read_table(listed / "inventory.csv"), run / "explore"
    sizes = inventory[["width", "height"]].astype(float).astype(int)
    groups, alike = _alike(run, listed / "groups.json", inventory)
    return {
        "images": len(inventory),
        "sizes": _svg(charts.image_sizes, sizes["width"], sizes["height"]),
        "counts": inventory[["label"]],
        "names": folder / "class_names.json",
        "fixes": fixes.sentence(disk.read_table(folder / "fixes.csv")) if (folder / "fixes.csv").is_file() else "",
        "quarantine": _quarantine(run),
        "levels": disk.read_json(folder / deep.FILE)["sentence"] if (folder / deep.FILE).is_file() else "",
        "flat": int((inventory["note"] != "").sum()) if "note" in inventory else 0,
        "groups": groups,
        "alike": alike,
        "ignored": disk.read_json(folder / "ignored.json") if (folder / "ignored.json").is_file() else {},
    }


def _cropped(run: Path, stages: dict) -> dict:
    return {"crop": stages["crop"]["headline"]}


def _divided(run: Path, stages: dict) -> dict:
    split = disk.read_table(run / "split" / "split.csv")
    names = {} if stages["explore"] else {"names": run / "split" / "class_names.json"}
    gap = _honest_gap(run / "split" / "leakage.json")
    facts = {"counts": split, "leaks": _leaks(split), "images": split["path"].nunique(), "gap": gap}
    return names | facts | {"dropped": listed(dropped(split))}


def _alike(run: Path, figures: Path, inventory: pd.DataFrame) -> tuple[dict, list[dict]]:
    """Return what must stay together: the numbers of groups.json, and the largest groups as images."""
    if not figures.is_file():
        return {}, []
    sizes = inventory["group"].value_counts()
    alike = []
    for group, size in sizes[sizes > 1].sort_index().sort_values(ascending=False, kind="stable").head(GROUPS).items():
        rows = inventory[inventory["group"] == group].head(PER_GROUP).to_dict("records")
        alike.append({"size": int(size), "rows": [_with_image(run, row) for row in rows]})
    return disk.read_json(figures), alike


def _quarantine(run: Path) -> dict:
    """Return the files set aside by any stage: how many for each reason, and the first of them."""
    files = [run / stage / "quarantine.csv" for stage in ("explore", "resize")]
    parts = [disk.read_table(path) for path in files if path.is_file()]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["path", "reason"])
    return {
        "n": len(table),
        "reasons": table["reason"].value_counts().to_dict(),
        "rows": table.head(ROWS).to_dict("records"),
    }


def _leaks(split: pd.DataFrame) -> list[tuple[str, int]]:
    """Return how many contents and groups are in more than one part; there should be none. Unused ones do not count."""
    leaks, split = [], split[split["part"].isin(PARTS)]
    for column, what in (("sha256", "identical files"), ("group", "groups")):
        if column in split and (split[column] != "").any():
            rows = split[split[column] != ""]
            leaks.append((what, int((rows.groupby(column)["part"].nunique() > 1).sum())))
    return leaks


def _honest_gap(file: Path) -> dict | None:
    """Return the scores of a probe on splits that keep groups together and on naive ones; None if there are none."""
    rows = disk.read_json(file).get("honest_gap") if file.is_file() else None
    if not rows:
        return None
    scores = pd.DataFrame(rows).groupby("split")["balanced_accuracy"]
    spread = {f"{name}_spread": value for name, value in scores.std().items()}
    return scores.mean().to_dict() | spread | {"splits": len(scores.get_group("honest"))}


def _settings(run: Path, stages: dict) -> list[dict]:
    """Return the parameters of each stage, without the folders that `thaw run` chose itself."""
    settings = []
    for name, stage in notebooks.stages().items():
        parameters = (stages[name] or {}).get("parameters") or {}
        kept = {key: value for key, value in parameters.items() if key != "out" and ".store" not in str(value)}
        if kept:
            settings.append({"name": name, "title": stage.title, "parameters": kept})
    return settings


def _versions(run: Path, stages: dict) -> dict[str, str]:
    """Return package -> version; several if stages were made in different environments."""
    by_package: dict[str, list[str]] = {}
    for stage in filter(None, stages.values()):
        for package, version in stage.get("versions", {}).items():
            if version not in by_package.setdefault(package, []):
                by_package[package].append(version)
    return {package: " and ".join(versions) for package, versions in by_package.items()}


def _notebooks(run: Path, stages: dict) -> list[dict]:
    exporter = pages.exporter()
    executed = []
    for name, stage in notebooks.stages().items():
        places = (run / name / "notebook.ipynb", run / stage.notebook.name)
        path = next((place for place in places if place.is_file()), None)
        if path:
            body, _ = exporter.from_filename(str(path.resolve()))
            html = Markup(body)  # cleaned by the exporter
            executed.append({"name": stage.notebook.stem, "title": stage.title, "html": html})
    return executed


def _svg(draw: Callable, *values, **options) -> str:
    """Return a figure as a data URI: SVG stays sharp on paper, and its text is drawn as paths, so it needs no font."""
    with matplotlib.rc_context({"svg.hashsalt": "thaw", "svg.fonttype": "path", "figure.dpi": 100}):
        axes = draw(*values, **options)
        figure = (axes if hasattr(axes, "figure") else axes[0]).figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    return _uri("image/svg+xml", buffer.getvalue())


def _with_image(run: Path, row: dict) -> dict:
    """Return a row of the mistakes with its image; with None if the file is no longer there."""
    places = (run / "resize" / row.get("file", ""), run / "explore" / "source" / row["path"])
    path = next((place for place in places if place.is_file()), None)
    return row | {"image": _jpeg(path) if path else None}


def _jpeg(path: Path) -> str:
    buffer = io.BytesIO()
    Image.fromarray(sheets.thumbnail(path, 240)).save(buffer, format="JPEG", quality=85)
    return _uri("image/jpeg", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _percent(fraction: float | None, digits: int = 1) -> str:
    return words.percent(fraction, digits).replace(" ", "\N{NO-BREAK SPACE}")


def _figure(value: float | None, key: str) -> str:
    """Return a metric as text: log loss and AUC as plain numbers, shares in percent."""
    return f"{value:.3f}" if value is not None and key in ("log_loss", "auc") else _percent(value)


def _moment(iso: str) -> str:
    return datetime.fromisoformat(iso).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


# What each stage adds to the section on data; without it, the values of _NO_DATA stay.
DATA = {"explore": _explored, "crop": _cropped, "split": _divided}
_NO_DATA: dict[str, Any] = {"counts": None, "quarantine": None, "ignored": {}, "leaks": None, "sizes": None}
_NO_DATA |= {"groups": {}, "alike": [], "gap": None, "fixes": "", "crop": "", "levels": "", "flat": 0, "dropped": ""}

# The sections of the template by name; each function gets the run's folder and the records of its stages.
SECTIONS: dict[str, Callable[[Path, dict], Any]] = {
    "results": _results,
    "training": _training,
    "data": _data,
    "settings": _settings,
    "versions": _versions,
    "notebooks": _notebooks,
}
