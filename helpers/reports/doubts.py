"""Figures of how far to trust a model: calibration, ranking, unanswered images, and what it looks at."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from PIL import Image

from helpers.core import words
from helpers.reports import sheets, theme

NAMED = 6  # classes with their own colour and name among many curves
STRENGTH = 0.55  # of a map's colour over its image


def calibration(bins: Mapping[str, pd.DataFrame], ax: Axes | None = None) -> Axes:
    """Draw how often the model is correct at each confidence, before and after calibration.

    Args:
        bins: name -> columns confidence and accuracy (0-1), as `calibration.bins` returns them; the last in front.
    """
    ax = theme.new(ax, (4.8, 4.2))
    low = min(min(table[["confidence", "accuracy"]].min()) for table in bins.values())
    low = max(0.0, np.floor(10 * low - 0.5) / 10)
    ax.plot([low, 1], [low, 1], color=theme.GREY, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    colours = [*["#B9C2C9"] * (len(bins) - 1), theme.BLUE]
    for (name, table), colour in zip(bins.items(), colours, strict=True):
        ax.plot(table["confidence"], table["accuracy"], "o-", color=colour, markersize=5, linewidth=1.2, label=name)
    ax.text(0.97, 0.03, "below the line: too sure", transform=ax.transAxes, fontsize=8, color=theme.GREY, ha="right")
    ax.set(xlim=(low, 1.02), ylim=(low, 1.02), aspect="equal", xlabel="confidence", ylabel="share that was correct")
    ticks = [tick for tick in ax.get_xticks() if low <= tick < 1.001]  # no share is above 100 %
    ax.set(xticks=ticks, yticks=ticks)
    ax.xaxis.set_major_formatter(theme.PERCENT)
    ax.yaxis.set_major_formatter(theme.PERCENT)
    theme.grid(ax, "both")
    return theme.legend(ax)


def rank_curves(table: pd.DataFrame) -> Sequence[Axes]:
    """Draw ROC curves and precision against recall, side by side; of many classes the worst in colour, the rest grey.

    Args:
        table: as `details.rank_curves` returns it.
    """
    theme.require(table, "label", "kind", "x", "y", "area")
    theme.prepare()
    rows = min(NAMED, table["label"].nunique())  # of the legends, below the axes: worst curves may be anywhere in them
    _, axes = plt.subplots(1, 2, figsize=(theme.WIDTH, 4.1 + 0.18 * rows), layout="constrained")
    names = {"roc": ("false positive rate", "true positive rate", "AUC"), "precision": ("recall", "precision", "AP")}
    colours = [theme.VERMILION, theme.BLUE, theme.GREEN, "#CC79A7", "#E69F00", "#56B4E9"]
    for ax, (kind, (x, y, area)) in zip(axes, names.items(), strict=True):
        theme.new(ax, (0, 0))
        own = table[table["kind"] == kind]
        order = own.groupby("label", sort=False)["area"].first().sort_values(kind="stable")
        for label in order.index[NAMED:]:
            curve = own[own["label"] == label]
            ax.plot(curve["x"], curve["y"], color="#D5DBE0", linewidth=0.8, zorder=1)
        for label, colour in zip(order.index[:NAMED], colours, strict=False):
            curve = own[own["label"] == label]
            ax.plot(curve["x"], curve["y"], color=colour, linewidth=1.5, zorder=2,
                    label=f"{words.shorten(label, 22)}  {area} {order[label]:.3f}".replace("$", r"\$"))  # fmt: skip
        ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=x, ylabel=y)
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.14), frameon=False, fontsize=8, labelcolor=theme.INK)
        theme.grid(ax, "both")
    if len(order) > NAMED:
        axes[0].set_title(
            f"the {NAMED} lowest of {len(order)} classes in colour", loc="left", fontsize=9, color=theme.GREY
        )
    return axes


def risk_and_coverage(table: pd.DataFrame, outcome: Mapping[str, Any] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the share of wrong answers when only the most confident images are answered; the promise as a dot.

    Args:
        table: as `promises.risk_and_coverage` returns it.
        outcome: as `promises.outcome` returns it.
    """
    theme.require(table, "coverage", "risk")
    ax = theme.new(ax, (theme.WIDTH, 3.2))
    ax.plot(table["coverage"], table["risk"], color=theme.BLUE, linewidth=1.6)
    if outcome and outcome["kind"] != "coverage":
        limit = 1 - outcome["wanted"] if outcome["kind"] == "precision" else outcome["wanted"]
        ax.axhline(limit, color=theme.GREY, linewidth=0.8, linestyle=(0, (4, 4)))
        ax.text(0.005, limit, " promised", fontsize=8, color=theme.GREY, va="bottom")
        if outcome["value"] is not None:
            ax.plot(outcome["answered"], 1 - outcome["value"], "o", color=theme.VERMILION, markersize=7, zorder=3)
            ax.annotate("here the promise answers", (outcome["answered"], 1 - outcome["value"]), (-8, 10), fontsize=8.5,
                        ha="right", color=theme.VERMILION, textcoords="offset points")  # fmt: skip
    ax.set(
        xlim=(0, 1.01), xlabel="share of the images answered, most confident first", ylabel="share of the answers wrong"
    )
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_formatter(theme.PERCENT)
    ax.yaxis.set_major_formatter(theme.PERCENT)
    theme.grid(ax, "both")
    return ax


def explained(
    images: np.ndarray,
    heat: np.ndarray,
    titles: Sequence[str],
    *,
    pairs: int = 3,
    heading: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw each image beside its map: places for the class in red, places against it in blue.

    Args:
        images: RGB 0-255, (n, H, W, 3).
        heat: (n, H, W), as `explanation.heat` returns it; each is scaled to its own largest value.
        titles: a caption of one or two lines for each image.
        pairs: images in a row.

    Raises:
        ValueError: there is no image, or not one map and caption for each.
    """
    if not len(images) == len(heat) == len(titles):
        raise ValueError(f"{len(images)} images, {len(heat)} maps and {len(titles)} captions; expected one for each.")
    tiles = [tile for image, one in zip(images, heat, strict=True) for tile in (image, over(image, one))]
    captions = [text for title in titles for text in (title, "")]
    return sheets.contact_sheet(tiles, captions, columns=2 * pairs, heading=heading, ax=ax)


def captions(table: pd.DataFrame) -> list[str]:
    """Return three lines for each image of a table as `details.telling` returns it."""
    theme.require(table, "label", "predicted", "confidence", "why")
    rows = table.itertuples(index=False)
    return [f"{row.why}\nis {row.label}\nmodel: {row.predicted} {100 * row.confidence:.0f} %" for row in rows]


def over(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return an image with a map drawn over it, uint8 (H, W, 3): red where the map is positive, blue where negative."""
    grey = np.repeat(np.asarray(image, np.float32).mean(axis=2, keepdims=True), 3, axis=2)
    largest = max(float(np.abs(heat).max()), 1e-12)
    strength = STRENGTH * np.clip(np.abs(heat) / largest, 0, 1)[..., None]
    colour = np.where(heat[..., None] > 0, (213, 94, 0), (11, 107, 168)).astype(np.float32)
    return np.clip((1 - strength) * grey + strength * colour, 0, 255).astype(np.uint8)


def read(paths: Sequence[str | Path]) -> np.ndarray:
    """Return the images of one size, uint8 (n, H, W, 3), of files as 02_resize writes them."""
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
