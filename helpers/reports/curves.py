"""Curves over epochs, images and workers."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from helpers.reports import theme

PHASES = {"head": "head", "fine_tune": "fine-tune", "1": "head", "2": "fine-tune"}


def training_curves(
    history: pd.DataFrame | Sequence[pd.DataFrame],
    phases: Mapping[str, str] | None = None,
    *,
    monitor: str = "val_loss",
    ax: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Draw accuracy above and loss below over the epochs of all phases, with thaws marked and the best epochs dotted.

    Args:
        history: the columns of history.csv (epoch, phase, loss, accuracy, val_loss, val_accuracy), or one such table
            per phase, in their order. If epochs start again in a later phase, the count continues.
        phases: a name for each value of `phase`; "head" and "fine_tune" have names already.
        monitor: the column whose best epoch of each phase gets a dot: lowest for a loss, highest otherwise.
        ax: two Axes, one above the other.

    Returns:
        The two Axes, accuracy first; none, after a printed line, if nothing was trained.
    """
    table = history if isinstance(history, pd.DataFrame) else pd.concat(list(history), ignore_index=True)
    if table.empty:
        print("Nothing was trained: there is no curve.")
        return np.array([])
    table = table.reset_index(drop=True)
    # A single epoch is invisible without a dot, so short lines have markers.
    style = {"linewidth": 1.6, "marker": "o" if len(table) < 4 else None, "markersize": 4}
    epochs = _running_epochs(table)
    axes = _curve_axes(ax)
    for axis, metric in zip(axes, ("accuracy", "loss"), strict=True):
        for column, name, colour in ((metric, "train", theme.BLUE), (f"val_{metric}", "validation", theme.VERMILION)):
            if column in table and table[column].notna().any():
                axis.plot(epochs, table[column], label=name, color=colour, **style)
        for row in _best_rows(table, monitor):
            if f"val_{metric}" in table:
                axis.plot(epochs[row], table[f"val_{metric}"][row], "o", color=theme.VERMILION, markersize=6.5,
                          zorder=5, markeredgecolor="white", markeredgewidth=1.2, clip_on=False)  # fmt: skip
        axis.set_ylabel(metric)
        axis.margins(y=0.12)
        theme.grid(axis, "y")
    axes[0].yaxis.set_major_formatter(theme.PERCENT)
    axes[0].set_ylim(top=min(1.005, axes[0].get_ylim()[1]))  # no share is above 100 %
    axes[1].set_ylim(bottom=max(0.0, axes[1].get_ylim()[0]))
    for axis in axes:
        _epoch_axis(axis, epochs)
    axes[0].set_xlabel("")
    _mark_phases(axes, table, epochs, phases or PHASES)
    if any(f"val_{metric}" in table for metric in ("accuracy", "loss")):
        axes[0].plot([], [], "o", markersize=6, color=theme.VERMILION, label=f"best {monitor} of the phase")
    theme.legend(axes[0], raise_by=0.1)
    return axes


def learning_rates(
    history: pd.DataFrame, phases: Mapping[str, str] | None = None, ax: Axes | None = None
) -> Axes | None:
    """Draw the learning rate by epoch, across phases; on a logarithmic axis if it spans more than a factor of twenty.

    Args:
        history: columns epoch, learning_rate and, if there are several, phase: a schedule before training or the
            history.csv after it.

    Returns:
        The Axes; None, after a printed line, if nothing is trained.
    """
    if len(history):
        theme.require(history, "learning_rate")
    # A solved head has no rate, and is one epoch in the history.
    table = history.assign(epoch=_running_epochs(history)).dropna(subset="learning_rate").reset_index(drop=True)
    if table.empty:
        print("Nothing is trained: there is no learning rate.")
        return None
    rates, epochs = table["learning_rate"].to_numpy(float), table["epoch"].to_numpy()
    ax = theme.new(ax, (theme.WIDTH, 2.2))
    if len(rates) == 1:
        ax.plot(epochs, rates, "o", color=theme.BLUE, markersize=6)
    else:
        ax.step(epochs, rates, where="mid", color=theme.BLUE, linewidth=1.6)
    positive = rates[rates > 0]
    if len(positive) and positive.max() / positive.min() > 20:
        ax.set_yscale("log")
        ax.tick_params(which="minor", length=0)
    elif len(positive):
        ax.set_ylim(0, 1.15 * rates.max())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_ylabel("learning rate")
    _epoch_axis(ax, epochs)
    theme.grid(ax, "y")
    _mark_phases([ax], table, epochs, phases or PHASES)
    return ax


def strengths(path: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the losses along the path of a solved head, from strong to weak regularisation, the chosen strength dotted.

    Args:
        path: columns strength, loss, val_loss and chosen, as `solving.solve` returns it.
    """
    theme.require(path, "strength", "loss", "val_loss", "chosen")
    ax = theme.new(ax, (theme.WIDTH, 2.8))
    for column, name, colour in (("loss", "train", theme.BLUE), ("val_loss", "validation", theme.VERMILION)):
        ax.plot(path["strength"], path[column], "o-", label=name, color=colour, linewidth=1.6, markersize=3.5)
    best = path[path["chosen"]].iloc[0]
    ax.plot(best["strength"], best["val_loss"], "o", color=theme.VERMILION, markersize=8, label="chosen", zorder=5,
            markeredgecolor="white", markeredgewidth=1.2)  # fmt: skip
    ax.set(xscale="log", xlabel="strength C: the larger, the freer the weights", ylabel="loss", ylim=(0, None))
    ax.tick_params(which="minor", length=0)
    theme.grid(ax, "y")
    return theme.legend(ax)


def learning_curve(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw accuracy against training images per class: dots where it was measured, a dashed line beyond.

    Args:
        table: columns per_class, measured (0-1, NaN where nothing was), accuracy, low and high (of the curve).
    """
    theme.require(table, "per_class", "measured", "accuracy", "low", "high")
    measured = table[table["measured"].notna()]
    ax = theme.new(ax, (theme.WIDTH, 3.6))
    ax.fill_between(
        table["per_class"], table["low"], table["high"], color="#CFE1EE", linewidth=0, label="95 % interval"
    )
    ax.plot(
        table["per_class"],
        table["accuracy"],
        color=theme.BLUE,
        linewidth=1.6,
        linestyle=(0, (4, 3)),
        label="extrapolated",
    )
    ax.plot(
        table["per_class"][: len(measured)],
        table["accuracy"][: len(measured)],
        color=theme.BLUE,
        linewidth=1.6,
        label="fitted",
    )
    ax.plot(measured["per_class"], measured["measured"], "o", color=theme.VERMILION, markersize=6, label="measured")
    ax.set(xscale="log", xlabel="training images per class (mean)", ylabel="accuracy on validation")
    ax.set_xticks(table["per_class"], [f"{number:,.0f}" for number in table["per_class"]])
    ax.tick_params(which="minor", length=0, labelbottom=False)
    ax.yaxis.set_major_formatter(theme.PERCENT)
    theme.grid(ax, "both")
    return theme.legend(ax)


def loader_workers(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw seconds to load one epoch against the number of loader threads, each bar with its images/s.

    Args:
        table: index workers, columns images/s and seconds.
    """
    theme.require(table, "images/s", "seconds")
    ax = theme.new(ax, (theme.WIDTH, 2.6))
    rows = np.arange(len(table))
    ax.bar(rows, table["seconds"], width=0.62, color=theme.BLUE)
    for row, (seconds, rate) in enumerate(zip(table["seconds"], table["images/s"], strict=True)):
        ax.text(row, seconds, f"{rate:,.0f} images/s", ha="center", va="bottom", fontsize=8.5, color=theme.GREY)
    ax.set_xticks(rows, [str(number) for number in table.index])
    ax.set(xlabel="loader workers (threads)", ylabel="seconds an epoch", ylim=(0, 1.15 * table["seconds"].max()))
    theme.grid(ax, "y")
    return ax


def _running_epochs(table: pd.DataFrame) -> np.ndarray:
    """Return epoch numbers that only grow, from 1: a phase that counts from its own start follows the last one."""
    epochs = table["epoch"].to_numpy(float) if "epoch" in table else np.arange(1.0, len(table) + 1)
    if len(epochs) and (np.any(np.diff(epochs) <= 0) or not np.all(np.isfinite(epochs))):
        epochs = np.arange(1.0, len(table) + 1)
    return epochs + 1 if len(epochs) and epochs[0] == 0 else epochs


def _curve_axes(ax: Sequence[Axes] | None) -> np.ndarray:
    if ax is None:
        _, ax = plt.subplots(2, 1, figsize=(theme.WIDTH, 4.8), sharex=True, layout="constrained")
    axes = np.ravel(np.asarray(ax, dtype=object))
    if len(axes) != 2:
        raise ValueError(f"training curves need two Axes, accuracy above loss; got {len(axes)}")
    return np.array([theme.new(axis, (theme.WIDTH, 2.4)) for axis in axes], dtype=object)


def _best_rows(table: pd.DataFrame, monitor: str) -> list[int]:
    if monitor not in table:
        return []
    groups = table.groupby("phase", sort=False) if "phase" in table else [("", table)]
    scores = [group[monitor].dropna() for _, group in groups]
    return [int(score.idxmin() if "loss" in monitor else score.idxmax()) for score in scores if len(score)]


def _mark_phases(axes: Sequence[Axes], table: pd.DataFrame, epochs: np.ndarray, names: Mapping[str, str]) -> None:
    """Draw a line where the phase changes, labelled "thaw", and above the first Axes the name of each phase."""
    phases = table["phase"].astype(str).to_numpy() if "phase" in table else np.array([""] * len(table))
    changes = [row for row in range(1, len(phases)) if phases[row] != phases[row - 1]]
    for row in changes:
        boundary = (epochs[row - 1] + epochs[row]) / 2
        for axis in axes:
            axis.axvline(boundary, color=theme.INK, linewidth=1.0, linestyle=(0, (2, 2)), zorder=0)
        # The label is between the figure and its legend, where no curve crosses it.
        name = names.get(phases[row], phases[row])
        axes[0].annotate(f"thaw · {name}", (boundary, 1.0), (3, 3), xycoords=("data", "axes fraction"), fontsize=8.5,
                         textcoords="offset points", color=theme.INK, ha="left", va="bottom", parse_math=False,
                         annotation_clip=False)  # fmt: skip


def _epoch_axis(ax: Axes, epochs: np.ndarray) -> None:
    ax.set_xlabel("epoch")
    room = 0.5 + 0.01 * (epochs[-1] - epochs[0])
    ax.set_xlim(epochs[0] - min(room, 0.9), epochs[-1] + room)  # no epoch 0 on the axis
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
