"""Every figure of the suite, in one quiet style that works for colour blindness, grey printing and many classes.

Each function takes data and an optional `ax`, draws, and returns the Axes: it computes nothing that a
table does not hold, writes nothing, and never calls `show()`. Without `ax` it makes a figure whose size follows from
its content. In a notebook, end the line with a semicolon so that only the figure appears:

    charts.class_counts(inventory);

Class names are drawn as they are (a `$` in a name is not mathematics) and shortened only where they would overlap.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from helpers.core import words
from helpers.reports import theme


def class_counts(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw images per class as bars, stacked by train, val and test if the table has a column `part`.

    Args:
        table: one row per image, with the column `label` and, if the split is known, `part`.
    """
    theme.require(table, "label")
    if "part" in table:
        counts = pd.crosstab(table["label"].astype(str), table["part"])
        counts = counts[[part for part in theme.PARTS if part in counts]]
    else:
        counts = table["label"].astype(str).value_counts().to_frame("images")
    counts = counts.loc[counts.sum(axis=1).sort_values(kind="stable").index]
    ax = theme.new(ax, (theme.WIDTH, theme.tall(len(counts))))
    left = np.zeros(len(counts))
    for part in counts:
        ax.barh(
            range(len(counts)),
            counts[part],
            left=left,
            height=0.72,
            label=part,
            color=theme.PARTS.get(part, theme.BLUE),
        )
        left += counts[part].to_numpy()
    theme.name_axis(ax, "y", list(counts.index))
    if len(counts) <= 60:
        for row, total in enumerate(left):
            ax.text(
                total,
                row,
                f" {int(total):,}",
                va="center",
                ha="left",
                fontsize=theme.fit(ax, len(counts)),
                color=theme.GREY,
            )
        ax.set_xlim(0, left.max() * 1.08)
    ax.set_ylim(-0.6, len(counts) - 0.4)
    ax.set_xlabel("images")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    theme.grid(ax, "x")
    return theme.legend(ax) if "part" in table else ax


def image_sizes(widths: Sequence[int], heights: Sequence[int], ax: Axes | None = None) -> Axes:
    """Draw width against height in pixels: a disc for each size, its area the number of images of that size."""
    sizes = pd.DataFrame({"width": np.asarray(widths), "height": np.asarray(heights)}).value_counts().reset_index()
    if sizes.empty:
        raise ValueError("no image sizes to draw; got none")
    ax = theme.new(ax, (5.2, 4.2))
    largest = 400 if len(sizes) <= 10 else 120  # points squared; many sizes need small discs to stay visible
    area = 12 + largest * sizes["count"] / sizes["count"].max()
    ax.scatter(
        sizes["width"], sizes["height"], s=area, color=theme.BLUE, alpha=0.45, linewidths=0.6, edgecolors=theme.BLUE
    )
    limit = 1.12 * max(sizes["width"].max(), sizes["height"].max())
    ax.plot([0, limit], [0, limit], color=theme.GREY, linewidth=0.8, linestyle=(0, (4, 4)), zorder=0)
    ax.text(0.97 * limit, 0.97 * limit, "square ", color=theme.GREY, fontsize=8, ha="right", va="center")
    ax.set(xlim=(0, limit), ylim=(0, limit), xlabel="width (pixels)", ylabel="height (pixels)", aspect="equal")
    if len(sizes) == 1:
        width, height, count = sizes.iloc[0]
        ax.annotate(f"all {count:,}: {width} × {height}", (width, height), (-16, 0), textcoords="offset points",
                    ha="right", va="bottom", fontsize=9, color=theme.INK)  # fmt: skip
    theme.grid(ax, "both")
    return ax


def confusion_matrix(
    matrix: np.ndarray,
    class_names: Sequence[str],
    *,
    normalised: bool = True,
    boxes: Sequence[Sequence[str]] = (),
    ax: Axes | None = None,
) -> Axes:
    """Draw true classes down, predicted classes across; the shade is the share of the true class (or the count).

    Args:
        matrix: counts, (classes, classes), rows are true classes.
        class_names: in the order of the matrix.
        normalised: shade each row by its share, so that a rare class is as visible as a common one.
        boxes: groups of neighbouring classes, each to be framed.

    Raises:
        ValueError: the matrix is not square or does not fit the names.
    """
    import seaborn  # half a second that only few figures need

    matrix = np.asarray(matrix)
    count = len(class_names)
    if matrix.shape != (count, count):
        raise ValueError(f"expected a ({count}, {count}) matrix for {count} class names; got {matrix.shape}")
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    few = count <= 12
    side = float(np.clip(2.0 + 0.55 * count, 3.6, 6.2)) if few else min(5.0 + 0.13 * count, 20.0)
    ax = theme.new(ax, (side + 1.0, side))
    seaborn.heatmap(
        shares if normalised else matrix,
        vmin=0,
        vmax=1 if normalised else max(1, matrix.max()),
        cmap=theme.SHADES,
        annot=_cells(matrix, shares) if few else None,
        fmt="",
        annot_kws={"fontsize": 10 if count <= 6 else 8},
        square=True,
        linewidths=1.5 if few else 0.3 if count <= 60 else 0,
        linecolor="white" if few else theme.PALE,
        cbar_kws={"shrink": 0.6, "aspect": 28, "pad": 0.02},
        rasterized=not few,  # tens of thousands of cells would make a report of many megabytes
        xticklabels=False,
        yticklabels=False,
        ax=ax,
    )
    theme.name_axis(ax, "x", list(class_names), limit=18, first=0.5)
    theme.name_axis(ax, "y", list(class_names), limit=24, first=0.5)
    for box in boxes:
        places = [list(class_names).index(name) for name in box]
        corner, length = (min(places), min(places)), len(places)
        ax.add_patch(Rectangle(corner, length, length, fill=False, edgecolor=theme.VERMILION, linewidth=2, zorder=5))
    ax.set(xlabel="predicted class", ylabel="true class")
    ax.tick_params(length=0)
    bar = ax.collections[0].colorbar
    bar.ax.tick_params(labelsize=8, colors=theme.GREY, length=0)
    if normalised:
        bar.ax.yaxis.set_major_formatter(theme.PERCENT)
    bar.set_label("share of the true class" if normalised else "images", fontsize=8, color=theme.GREY)
    return ax


def per_class(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw precision, recall and F1 of each class on one line per class, best F1 at the top.

    Args:
        frame: columns label (or the index), precision, recall, f1 (0-1), support.
    """
    theme.require(frame, "precision", "recall", "f1", "support")
    table = frame.set_index("label") if "label" in frame else frame
    table = table.sort_values("f1", kind="stable", na_position="first")
    ax = theme.new(ax, (theme.WIDTH, theme.tall(len(table))))
    rows = np.arange(len(table))
    low, high = table[["precision", "recall"]].min(axis=1), table[["precision", "recall"]].max(axis=1)
    ax.hlines(rows, low, high, color="#C5CDD3", linewidth=2, zorder=1)
    ax.scatter(table["precision"], rows, s=34, color=theme.BLUE, label="precision", zorder=3, marker="s", clip_on=False)
    ax.scatter(table["recall"], rows, s=38, color=theme.VERMILION, label="recall", zorder=3, clip_on=False)
    ax.scatter(table["f1"], rows, s=70, color=theme.INK, label="F1", zorder=2, marker="|", clip_on=False)
    names = [f"{words.shorten(name, 26)} ({int(support):,})" for name, support in table["support"].items()]
    theme.name_axis(ax, "y", names, limit=40)
    ax.set(xlim=(0, 1.0), ylim=(-0.6, len(table) - 0.4), xlabel="score (images in brackets)")
    ax.xaxis.set_major_formatter(theme.PERCENT)
    theme.grid(ax, "both")
    return theme.legend(ax)


def reliability(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how often the model is correct at each confidence: points on the diagonal are well calibrated.

    Args:
        table: one row per bin of confidence: columns confidence (mean, 0-1), accuracy (0-1), count. Empty bins may
            be left out.
    """
    theme.require(table, "confidence", "accuracy", "count")
    table = table[table["count"] > 0]
    ax = theme.new(ax, (4.6, 4.2))
    ax.plot([0, 1], [0, 1], color=theme.GREY, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    ax.vlines(table["confidence"], table["confidence"], table["accuracy"], color="#C5CDD3", linewidth=2, zorder=1)
    area = 20 + 280 * table["count"] / max(1, table["count"].max())
    ax.scatter(table["confidence"], table["accuracy"], s=area, color=theme.BLUE, alpha=0.75, linewidths=0, zorder=3)
    ax.text(0.97, 0.03, "below the line: too sure", transform=ax.transAxes, fontsize=8, color=theme.GREY, ha="right")
    ax.set(xlim=(0, 1.03), ylim=(0, 1.03), aspect="equal", ylabel="share that was correct",
           xlabel="confidence (disc area: images)")  # fmt: skip
    ax.xaxis.set_major_formatter(theme.PERCENT)
    ax.yaxis.set_major_formatter(theme.PERCENT)
    theme.grid(ax, "both")
    return ax


def confidence(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the confidence of correct and of wrong predictions: two histograms, stacked.

    Args:
        table: columns confidence (0-1) and prediction ("correct" or "wrong"), as `details.confidences` returns them.
    """
    import seaborn  # half a second that only this figure needs

    theme.require(table, "confidence", "prediction")
    ax = theme.new(ax, (theme.WIDTH, 3.2))
    colours = {"correct": theme.BLUE, "wrong": theme.VERMILION}
    low = min(np.floor(20 * table["confidence"].min()) / 20, 0.95)  # a model may be sure of every image
    seaborn.histplot(
        table, x="confidence", hue="prediction", hue_order=list(colours), palette=colours, multiple="stack",
        binwidth=0.025, binrange=(low, 1.0), edgecolor="white", linewidth=0.6, alpha=1.0, legend=False, ax=ax,
    )  # fmt: skip
    counts = table["prediction"].value_counts()
    for name, colour in colours.items():
        ax.bar(0, 0, color=colour, label=f"{name} ({counts.get(name, 0):,})")
    ax.set(xlabel="confidence: probability of the predicted class", ylabel="images", xlim=(low, 1.0))
    ax.xaxis.set_major_formatter(theme.PERCENT)
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    theme.grid(ax, "y")
    return theme.legend(ax)


def intervals(table: pd.DataFrame, value: str = "accuracy", *, label: str = "", ax: Axes | None = None) -> Axes:
    """Draw one row a name with a value and its interval, best at the top: a dot on a line.

    Args:
        table: columns low, high and the one that `value` names (fractions of 1); the first column holds the names.
            Rows without a value are left out.
        value: the column of the dots.
        label: of the axis; the name of the column by default.
    """
    theme.require(table, value, "low", "high")
    table = table[table[value].notna()].sort_values(value, kind="stable")
    theme.require(table, value)
    ax = theme.new(ax, (theme.WIDTH, theme.tall(len(table))))
    rows = np.arange(len(table))
    ax.hlines(rows, table["low"], table["high"], color="#8CB9D9", linewidth=3, zorder=1)
    ax.scatter(table[value], rows, s=42, color=theme.BLUE, zorder=3)
    theme.name_axis(ax, "y", [str(name) for name in table.iloc[:, 0]], limit=40)
    ax.set(ylim=(-0.6, len(table) - 0.4), xlabel=f"{label or value.replace('_', ' ')} (line: 95 % interval)")
    ax.xaxis.set_major_formatter(theme.PERCENT)
    theme.grid(ax, "x")
    return ax


def accuracy_and_speed(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw accuracy against images/s on a logarithmic axis, a dot for each backbone: above and to the right is better.

    Args:
        table: columns backbone, accuracy (0-1) and images_per_second; rows without them are left out.
    """
    theme.require(table, "backbone", "accuracy", "images_per_second")
    table = table.dropna(subset=["accuracy", "images_per_second"])
    theme.require(table, "backbone")
    ax = theme.new(ax, (theme.WIDTH, 3.6))
    ax.scatter(table["images_per_second"], table["accuracy"], s=46, color=theme.BLUE, zorder=3)
    for row in table.itertuples(index=False):
        ax.annotate(words.shorten(row.backbone, 26), (row.images_per_second, row.accuracy), (6, 4), fontsize=8.5,
                    color=theme.INK, textcoords="offset points", parse_math=False)  # fmt: skip
    ax.set(xscale="log", xlabel="images/s of the forward pass", ylabel="accuracy on validation")
    ax.margins(x=0.25, y=0.2)
    wide = table["images_per_second"].max() > 4 * table["images_per_second"].min()
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if wide else MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    ax.tick_params(which="minor", length=0, labelbottom=False)
    ax.yaxis.set_major_formatter(theme.PERCENT)
    theme.grid(ax, "both")
    return ax


def _cells(matrix: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return the text of each cell: the count, and below it the share of the row if there is room."""
    if len(matrix) > 6:
        return np.vectorize(lambda count: f"{count:,}")(matrix)
    return np.vectorize(lambda n, share: f"{n:,}\n{100 * share:.0f} %" if n else "0")(matrix, shares)
