"""The label review of a run: one HTML page that needs no kernel and no network, for correcting wrong labels.

A page shows what looks wrong: images that look alike and have different labels, labels that cleanlab suspects, and the
most confident of the other mistakes. Its button saves fixes.csv, which `explore.fixes` applies to the labels.
"""

import base64
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image

from helpers.core import disk, parallel, project, stages
from helpers.data import images, inventory
from helpers.evaluation import label_errors
from helpers.reports import pages, sheets

SHOWN = 200  # cards in a section at most
TOGETHER = 8  # cards of one group of look-alikes at most
SIDE = 320  # pixels of an image's longer side
TEMPLATES = Path(__file__).parent / "templates"


@dataclass
class Evidence:
    """Facts about the images of a run.

    Attributes:
        table: path (relative to the source's root), label, part, sha256 and group, a row an image.
        probabilities: float64 (images, classes), out of sample; NaN in rows that could not be judged.
        class_names: in the order of the columns.
        conflicts: tables of path, label and sha256: each a group of look-alikes with different labels.
    """

    table: pd.DataFrame
    probabilities: np.ndarray
    class_names: list[str]
    conflicts: list[pd.DataFrame]


def build(run: str | Path, out: str | Path | None = None, *, folds: int = 5) -> tuple[Path, str]:
    """Write the review page of a run and return its path and a sentence about its content.

    Args:
        run: the folder of a run whose phase 1 is done.
        out: the file to write; review.html in the run's folder by default.
        folds: of the cross-validation.

    Raises:
        FileNotFoundError: the run lacks a stage that is needed.
        ImportError: cleanlab is not installed.
        ValueError: there are too few images for so many folds.
    """
    label_errors.cleanlab()  # a missing package is reported before the work starts
    run = project.run_folder(run)
    head = stages.require(run / "head", "model.keras", "model.json", made_by="03_train_head")
    resized = stages.require(run / "resize", "images.csv", "class_names.json", made_by="02_resize")
    explore = stages.require(run / "explore", "inventory.csv", "groups.json", "source", made_by="00_explore")
    listed, class_names = inventory.read(explore), disk.read_json(resized / "class_names.json")
    table, features = label_errors.embed(head, resized)
    table["group"] = table["path"].map(listed.set_index("path")["group"]).fillna(table["path"])
    labels = table["label"].map({name: index for index, name in enumerate(class_names)}).to_numpy()
    probabilities = label_errors.out_of_sample(
        features, labels, table["part"], table["group"], len(class_names), folds=folds
    )
    distance = disk.read_json(explore / "groups.json")["near_duplicates"]
    conflicts = label_errors.look_alikes(listed, distance) + label_errors.identical(explore)
    evidence = Evidence(table, probabilities, class_names, conflicts)
    page_sections = sections(evidence)
    about = {"backbone": disk.read_json(head / "model.json")["backbone"], "folds": folds, "earlier": _earlier(explore)}
    html = render(run, explore / "source", evidence, page_sections, about)
    path = disk.write_text(Path(out).absolute() if out else run / "review.html", html)
    counts = ", ".join(f"{section['title'].lower()}: {section['count']:,}" for section in page_sections)
    return path, f"{counts or 'nothing looks wrong'} ({len(html) / 1e6:.1f} MB)"


def sections(evidence: Evidence) -> list[dict[str, Any]]:
    """Return the sections of the page: title, count (of all images) and groups of cards; an image appears once."""
    table, probabilities, names = evidence.table, evidence.probabilities, evidence.class_names
    position = pd.Series(table.index, index=table["path"])
    labels = pd.Index(names).get_indexer(table["label"])
    groups = [_conflict_cards(group, evidence, position) for group in evidence.conflicts[:SHOWN]]
    used = {card["path"] for group in groups for card in group}
    suspected = [row for row in label_errors.suspects(labels, probabilities) if table["path"][row] not in used]
    confidence, guess = np.nan_to_num(probabilities).max(axis=1), np.nan_to_num(probabilities).argmax(axis=1)
    missed = np.flatnonzero((guess != labels) & (confidence > 0))
    rest = sorted(set(missed) - set(suspected), key=lambda row: (-confidence[row], table["path"][row]))
    rest = [row for row in rest if table["path"][row] not in used]
    parts = [("alike", "Look-alikes with different labels", len(evidence.conflicts), groups)]
    for key, title, rows in (
        ("suspects", "Suspected label errors", suspected),
        ("mistakes", "Other confident mistakes", rest),
    ):
        cards = [_card(table.loc[row], names[guess[row]], confidence[row]) for row in rows[:SHOWN]]
        parts.append((key, title, len(rows), [cards]))
    return [
        {"key": key, "title": title, "count": count, "groups": groups, "shown": min(count, SHOWN)}
        for key, title, count, groups in parts
        if count
    ]


def render(
    run: Path, source: Path, evidence: Evidence, page_sections: list[dict[str, Any]], about: dict[str, Any]
) -> str:
    """Return the page as HTML; every text from the data is escaped, and every image is inside."""
    cards = [card for section in page_sections for group in section["groups"] for card in group]
    thumbnails = parallel.for_each(_jpeg, [source / card["path"] for card in cards], label="images")
    for card, thumbnail in zip(cards, thumbnails, strict=True):
        card["image"] = thumbnail
    script = (TEMPLATES / "review.js").read_text(encoding="utf-8")
    # The page's policy allows only this script, so even a fault in the escaping could not run another one.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        pages.environment()
        .get_template("review.html.j2")
        .render(
            name=run.name,
            sections=page_sections,
            class_names=evidence.class_names,
            images=len(evidence.table),
            unjudged=int(np.isnan(evidence.probabilities[:, 0]).sum()),
            accuracy=_accuracy(evidence),
            recipe=project.display_path(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else "",
            style=Markup((TEMPLATES / "review.css").read_text(encoding="utf-8")),
            script=Markup(script),
            digest=digest,
            **about,
        )
    )


def _conflict_cards(group: pd.DataFrame, evidence: Evidence, position: pd.Series) -> list[dict[str, Any]]:
    """Return the cards of a group of look-alikes, each with the group's most probable other label; rare first."""
    names, cards = evidence.class_names, []
    order = group["label"].map(group["label"].value_counts())
    for row in group.loc[order.sort_values(kind="stable").index].head(TOGETHER).to_dict("records"):
        at = position.get(row["path"])
        judged = at is not None and not np.isnan(evidence.probabilities[at, 0])
        chances = dict(zip(names, evidence.probabilities[at], strict=True)) if judged else {}
        others = sorted(set(group["label"]) - {row["label"]})
        other = max(others, key=lambda name: chances.get(name, 0.0))
        part = evidence.table["part"][at] if at is not None else "unused"
        likeliest = max(chances.values(), default=0.0) == chances.get(other)
        cards.append(_card(row | {"part": part}, other, chances.get(other)) | {"likeliest": likeliest})
    return cards


def _card(row: Any, suggested: str, confidence: float | None) -> dict[str, Any]:
    kept = {key: row[key] for key in ("path", "label", "part", "sha256")}
    kept |= {"suggested": suggested, "likeliest": True}
    return kept | {"confidence": None if confidence is None else float(confidence)}


def _accuracy(evidence: Evidence) -> dict[str, float]:
    """Return the share of out-of-sample predictions that agree with the labels, on train and val and on test."""
    judged = ~np.isnan(evidence.probabilities[:, 0])
    guess = np.asarray(evidence.class_names, object)[np.nan_to_num(evidence.probabilities).argmax(axis=1)]
    right, test = guess == evidence.table["label"].to_numpy(object), (evidence.table["part"] == "test").to_numpy()
    masks = {"train and val": judged & ~test, "test": judged & test}
    return {name: float(right[mask].mean()) for name, mask in masks.items() if mask.any()}


def _earlier(explore: Path) -> list[list[str]]:
    """Return the fixes that already apply as rows of a fixes file, so that the next one keeps them."""
    if not (explore / "fixes.csv").is_file():
        return []
    changes = disk.read_table(explore / "fixes.csv")
    return changes[["path", "to", "sha256"]].to_numpy().tolist()


def _jpeg(path: Path) -> str:
    """Return the image as a data URI, "" if it cannot be read."""
    try:
        pixels = sheets.thumbnail(path, SIDE)
    except images.ImageError:
        return ""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
