"""Figures of many runs together, and the page that holds them."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from helpers.core import disk, words
from helpers.reports import theme

COLOURS = (theme.VERMILION, theme.BLUE, theme.GREEN, "#CC79A7", "#E69F00")  # Okabe and Ito (2008)
MOST_CHOSEN = len(COLOURS)
PAGE_STYLE = "svg { max-width: 100%; height: auto; } .wide { overflow-x: auto; } .wide * { white-space: nowrap; }"
THREE = (
    ("val_loss", "lowest validation loss"),
    ("loss_area", "mean validation loss"),
    ("val_accuracy", "accuracy there"),
)


def many_curves(
    histories: pd.DataFrame, coloured: Sequence[str], *, score: str = "val_loss", ax: Axes | None = None
) -> Axes:
    """Draw one score of many members over the epochs of all phases: a few in colour, the others grey.

    A loss that explodes does not hide the others: the axis ends a little above nine tenths of the values.

    Args:
        histories: columns member, phase, running and the score.
        coloured: members in colour, at most five, the best first.
        score: a column; "gap" is training minus validation accuracy.
    """
    table = histories.assign(gap=histories["accuracy"] - histories["val_accuracy"])
    ax = theme.new(ax, (theme.WIDTH, 3.6))
    for member, one in table.groupby("member", sort=False):
        if member not in coloured[:MOST_CHOSEN]:
            ax.plot(one["running"], one[score], color="#C5CDD3", linewidth=0.8, zorder=1)
    for colour, member in zip(COLOURS, coloured, strict=False):
        one = table[table["member"] == member]
        ax.plot(one["running"], one[score], color=colour, linewidth=1.9, label=words.shorten(member, 32), zorder=3)
    values = table[score].replace([np.inf, -np.inf], np.nan).dropna()
    if "loss" in score and len(values):
        ax.set_ylim(max(0.0, 0.92 * values.min()), min(1.05 * values.max(), 1.35 * values.quantile(0.9)))
    one = table[table["member"] == (coloured[0] if len(coloured) else table["member"].iloc[0])]
    for boundary in one["running"][one["phase"] != one["phase"].shift()].iloc[1:]:
        ax.axvline(boundary - 0.5, color=theme.INK, linewidth=1.0, linestyle=(0, (2, 2)), zorder=0)
    ax.set(
        xlabel="epoch, all phases", ylabel={"val_loss": "validation loss", "gap": "gap in accuracy"}.get(score, score)
    )
    if "loss" not in score:
        ax.yaxis.set_major_formatter(theme.PERCENT)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    theme.grid(ax, "y")
    return theme.legend(ax) if len(coloured) else ax


def against(members: pd.DataFrame, varies: Sequence[str]) -> np.ndarray | None:
    """Draw lowest loss, mean loss and the accuracy there against one varying number; a line for each other setting.

    Args:
        members: as `members.read` returns it.
        varies: what varies.

    Returns:
        Three Axes; None, after a printed line, unless a number with three values or more varies, and at most one
        other thing.
    """
    keys = [name for name in varies if name != "seed"]
    numbers = [n for n in keys if pd.api.types.is_numeric_dtype(members[n]) and members[n].nunique() > 2]
    if not numbers or len(keys) > 2:
        print("No single number with three values or more varies: there is no curve over it.")
        return None
    number = max(numbers, key=lambda name: members[name].nunique())
    others = [name for name in keys if name != number]
    _, axes = plt.subplots(1, 3, figsize=(theme.WIDTH, 2.9), layout="constrained")
    lines = list(members.groupby(others[0], sort=False)) if others else [("", members)]
    for ax, (score, title) in zip(axes, THREE, strict=True):
        theme.new(ax, (3, 3))
        for colour, (name, group) in zip(COLOURS[1:] + COLOURS[:1], lines, strict=False):
            mean = group.groupby(number)[score].mean().dropna()
            ax.plot(mean.index, mean, "o-", color=colour, linewidth=1.4, markersize=3.5, label=str(name))
            if len(mean):
                best = mean.idxmin() if "loss" in score else mean.idxmax()
                ax.plot(best, mean[best], "o", color=colour, markersize=9, markerfacecolor="none", markeredgewidth=1.6)
        _number_axis(ax, members[number], number)
        values = members[score].dropna()
        if "loss" in score and len(values):
            ax.set_ylim(0.94 * values.min(), min(1.04 * values.max(), 1.5 * values.quantile(0.7)))
        else:
            ax.yaxis.set_major_formatter(theme.PERCENT)
        theme.headed(ax, title)
        theme.grid(ax, "both")
    if others:
        axes[0].legend(frameon=False, fontsize=8, title=others[0].rpartition(".")[2], title_fontsize=8)
    return axes


def _number_axis(ax: Axes, values: pd.Series, name: str) -> None:
    if values.min() > 0 and values.max() / values.min() > 20:
        ax.set_xscale("log")
        ax.tick_params(which="minor", length=0)
    ax.set_xlabel(name.rpartition(".")[2].replace("_", " "))


def heat(table: pd.DataFrame | None, label: str = "accuracy on validation", ax: Axes | None = None) -> Axes | None:
    """Draw a two-way table as shades with its numbers; None, after a printed line, if there is no such table."""
    if table is None:
        print("Not exactly two parameters vary: there is no two-way table.")
        return None
    import seaborn

    ax = theme.new(ax, (min(theme.WIDTH, 2.6 + 0.95 * len(table.columns)), 1.1 + 0.42 * len(table)))
    few = table.size <= 60
    columns, rows = ([_text(one) for one in axis] for axis in (table.columns, table.index))
    numbers = table.to_numpy(float)
    notes = np.vectorize(lambda value: words.percent(value) if np.isfinite(value) else "")(numbers) if few else None
    seaborn.heatmap(numbers, annot=notes, fmt="", cmap=theme.SHADES, ax=ax, linewidths=1, xticklabels=columns,
                    yticklabels=rows, cbar=not few, annot_kws={"fontsize": 9})  # fmt: skip
    ax.tick_params(length=0, axis="both")
    ax.set_yticklabels(rows, rotation=0)
    ax.set(xlabel=str(table.columns.name).rpartition(".")[2], ylabel=str(table.index.name).rpartition(".")[2])
    return theme.headed(ax, label)


def effects(table: pd.DataFrame, monitor: str = "val_loss", ax: Axes | None = None) -> Axes | None:
    """Draw the main effect of each value with its interval; None, after a printed line, for fewer than two factors."""
    if table.empty:
        print("Fewer than two parameters have values that several members share: there are no main effects to compare.")
        return None
    ax = theme.new(ax, (theme.WIDTH, theme.tall(len(table))))
    rows = np.arange(len(table))[::-1]
    ax.axvline(0, color=theme.GREY, linewidth=0.8)
    ax.hlines(rows, table["low"], table["high"], color="#8CB9D9", linewidth=2.5)
    ax.plot(table["effect"], rows, "o", color=theme.BLUE, markersize=6)
    names = [f"{row.factor.rpartition('.')[2]} {_text(row.value)}" for row in table.itertuples()]
    ax.set_yticks(rows, [words.shorten(name, 40) for name in names], fontsize=9)
    ax.set_xlabel(f"mean {monitor.replace('val_', 'validation ')} minus that of all members")
    theme.grid(ax, "x")
    return ax


def parallel(
    members: pd.DataFrame, varies: Sequence[str], monitor: str = "val_loss", ax: Axes | None = None
) -> Axes | None:
    """Draw a line for each member through everything that varies to its score, the best tenth in colour.

    Returns:
        None, after a printed line, if fewer than three things vary.
    """
    keys = [name for name in varies if members[name].nunique() > 1]
    table = members[members[monitor].notna()]
    if len(keys) < 3 or len(table) < 2:
        print("Fewer than three parameters vary: parallel coordinates would show no more than the table.")
        return None
    ax = theme.new(ax, (theme.WIDTH, 3.6))
    places = pd.DataFrame({name: _place(table[name]) for name in [*keys, monitor]})
    order = table[monitor].sort_values(ascending="loss" not in monitor).index  # the best is drawn last
    best = set(order[-max(1, len(order) // 10) :])
    for index in order:
        style = (
            {"color": theme.VERMILION, "linewidth": 1.8} if index in best else {"color": "#C5CDD3", "linewidth": 0.8}
        )
        ax.plot(range(len(keys) + 1), places.loc[index], **style)
    for at, name in enumerate([*keys, monitor]):
        ax.axvline(at, color=theme.INK, linewidth=0.8)
        marks = dict(zip(places[name], map(_text, table[name]), strict=True))
        shown = sorted(marks)[:: max(1, len(marks) // 6)]  # a score has a value for each member
        for place, value in ((place, marks[place]) for place in shown):
            theme.text(ax, at, place, f" {words.shorten(value, 14)}", fontsize=7.5, color=theme.INK, va="center")
    ax.set_xticks(range(len(keys) + 1), [name.rpartition(".")[2].replace("_", " ") for name in [*keys, monitor]])
    ax.set_yticks([])
    ax.spines[["left", "bottom"]].set_visible(False)
    return ax


def importance(table: pd.DataFrame, ax: Axes | None = None) -> Axes | None:
    """Draw the share of each parameter in the differences of members; None, after a printed line, without a search."""
    if table.empty:
        print("This is not a search: there is no importance of parameters.")
        return None
    ax = theme.new(ax, (theme.WIDTH, theme.tall(len(table))))
    rows = np.arange(len(table))[::-1]
    ax.barh(rows, table["importance"], height=0.55, color=theme.BLUE)
    ax.set_yticks(rows, [words.shorten(str(name).rpartition(".")[2], 40) for name in table["parameter"]], fontsize=9)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(theme.PERCENT)
    ax.set_xlabel("share of the differences between members")
    theme.grid(ax, "x")
    return ax


def _place(column: pd.Series) -> pd.Series:
    """Return the places of the values on a line from 0 to 1: by their logarithm, their size, or their order."""
    if pd.api.types.is_numeric_dtype(column) and column.nunique() > 1:
        scaled = np.log(column) if column.min() > 0 and column.max() / column.min() > 20 else column.astype(float)
        return (scaled - scaled.min()) / (scaled.max() - scaled.min())
    codes = pd.Series(pd.factorize(column)[0], index=column.index)
    return codes / max(1, codes.max())


def _text(value: Any) -> str:
    """Return a value with four digits: 3.16e-5 and 0.8651; "" if it is NaN."""
    if not isinstance(value, float):
        return str(value)
    return "" if value != value else re.sub(r"e-0?", "e-", f"{value:.4g}")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table as text, with four digits for every number, also for small rates, and without empty columns."""
    filled = [name for name in table if (table[name].notna() & (table[name].astype(str) != "")).any()]
    return table[filled].rename(columns=lambda name: str(name).rpartition(".")[2]).map(_text)


def write_page(path: Path, title: str, lede: str, shown: Mapping[str, tuple[Any, str]]) -> Path:
    """Write one HTML file that needs no network: tables and figures, each with a heading and what to look for.

    Args:
        path: the file.
        title: of the page.
        lede: a sentence or two at its start.
        shown: heading -> (a table, one or several Axes, or None, which is left out; what to look for).
    """
    parts = [f"<section><h2>{html.escape(name)}</h2>{_shown(what)}<p class='note'>{html.escape(note)}</p></section>"
             for name, (what, note) in shown.items() if what is not None]  # fmt: skip
    css = (Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    name, lede = html.escape(title), html.escape(lede)
    return disk.write_text(
        path,
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{name} · Thaw study</title>"
        f"<link rel='icon' href='data:,'><style>{css}\n{PAGE_STYLE}</style></head>"
        f"<body><header><p class='overline'>Thaw study</p><h1>{name}</h1><p class='lede'>{lede}</p></header>"
        f"<main>{''.join(parts)}</main></body></html>\n",
    )


def _shown(what: Any) -> str:
    if isinstance(what, pd.DataFrame):
        return f"<div class='wide'>{readable(what).to_html(index=False, border=0)}</div>"
    figure = (what if hasattr(what, "figure") else what[0]).figure
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]
