"""Figures of runs side by side."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from helpers.core import words
from helpers.reports import theme

COLOURS = [theme.BLUE, theme.VERMILION, theme.GREEN, "#CC79A7", "#E69F00", "#56B4E9", theme.INK]
QUIET = "#CFD6DB"


def curves(histories: Mapping[str, pd.DataFrame]) -> np.ndarray:
    """Draw validation accuracy and loss over the epochs of each entry, in one figure; from the eighth on grey.

    Args:
        histories: entry -> columns val_accuracy and val_loss, a row an epoch; entries without epochs are left out.
    """
    theme.prepare()
    shown = {name: table for name, table in histories.items() if len(table)}
    if not shown:
        print("Nothing was trained: there is no curve.")
        return np.array([])
    _, axes = plt.subplots(1, 2, figsize=(theme.WIDTH, 3.6), layout="constrained")
    for axis, column in zip(axes, ("val_accuracy", "val_loss"), strict=True):
        theme.new(axis, (0, 0))
        for number, (name, table) in enumerate(shown.items()):
            colour = COLOURS[number] if number < len(COLOURS) else QUIET
            marker = "o" if len(table) < 4 else None
            epochs = np.arange(1, len(table) + 1)
            label = words.shorten(name, 30).replace("$", r"\$") if number < len(COLOURS) else None
            axis.plot(epochs, table[column], color=colour, linewidth=1.4, label=label, marker=marker, markersize=4)
        axis.set(xlabel="epoch", ylabel=column.replace("val_", "validation "))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        theme.grid(axis, "y")
    axes[0].yaxis.set_major_formatter(theme.PERCENT)
    names = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(*names, loc="outside upper left", ncols=3, frameon=False, fontsize=8.5)
    return axes


def differences(table: pd.DataFrame, first: str, ax: Axes | None = None) -> Axes:
    """Draw the difference of each metric from the first entry, with its interval, in points; 0 is no difference.

    Args:
        table: as `comparison.against_the_first` returns it; log loss, which is not a share, is left out.
        first: name of the first entry.
    """
    theme.require(table, "entry", "metric", "difference", "low", "high", "verdict")
    table = table[table["metric"] != "log_loss"].iloc[::-1].reset_index(drop=True)
    ax = theme.new(ax, (theme.WIDTH, theme.tall(len(table))))
    colours = {"better": theme.GREEN, "worse": theme.VERMILION}
    for row in table.itertuples():
        colour = colours.get(row.verdict, theme.GREY)
        ax.hlines(row.Index, 100 * row.low, 100 * row.high, color=colour, linewidth=3, alpha=0.45, zorder=1)
        ax.scatter(100 * row.difference, row.Index, s=42, color=colour, zorder=3)
    ax.axvline(0, color=theme.INK, linewidth=0.8)
    names = [f"{words.shorten(row.entry, 28)}: {row.metric.replace('_', ' ')}" for row in table.itertuples()]
    theme.name_axis(ax, "y", names, limit=52)
    ax.set(ylim=(-0.6, len(table) - 0.4), xlabel=f"points above {words.shorten(first, 40)} (line: 95 % interval)")
    theme.grid(ax, "x")
    return ax


def costs(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw accuracy on validation against minutes of training: a disc for each entry, its area the size of the model.

    The line joins the entries that no other one beats in both (the Pareto front).

    Args:
        table: as `entries.leaderboard` returns it.
    """
    theme.require(table, "entry", "accuracy", "minutes", "megabytes")
    ax = theme.new(ax, (theme.WIDTH, 3.6))
    area = 40 + 260 * table["megabytes"] / table["megabytes"].max()
    ax.scatter(table["minutes"], table["accuracy"], s=area, color=theme.BLUE, alpha=0.55, linewidths=0, zorder=3)
    ordered = table.sort_values(["minutes", "accuracy"], ascending=[True, False], kind="stable")
    front = ordered[ordered["accuracy"] > ordered["accuracy"].cummax().shift(fill_value=-1)]
    ends = [*front["minutes"], 1.25 * table["minutes"].max()], [*front["accuracy"], front["accuracy"].iloc[-1]]
    ax.step(*ends, where="post", color=theme.GREY, linewidth=0.9, linestyle=(0, (4, 4)))
    for number, row in enumerate(ordered.itertuples()):  # above and below in turn, since neighbours may be close
        text, away = f"{words.shorten(row.entry, 26)}, {row.megabytes:.0f} MB", (9, -14 if number % 2 else 6)
        ax.annotate(text, (row.minutes, row.accuracy), away, textcoords="offset points", fontsize=8.5,
                    color=theme.INK, parse_math=False)  # fmt: skip
    ax.set(xlabel="minutes of training, both phases", ylabel="accuracy on validation")
    ax.margins(x=0.25, y=0.25)
    ax.yaxis.set_major_formatter(theme.PERCENT)
    theme.grid(ax, "both")
    return ax
