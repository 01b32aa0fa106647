"""Every figure of the suite, in one quiet style that survives colour blindness, grey printing and many classes.

Each function takes data and an optional `ax`, draws, and returns the Axes: nothing is computed that a table does not
already hold, nothing is written, and `show()` is never called. Without `ax` a figure is made whose size follows from
its content. In a notebook, end the line with a semicolon so that only the picture appears:

    plots.class_counts(inventory);

Class names are drawn as they are (a `$` in a name is not mathematics) and shortened only where they would collide.
"""

import logging
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from PIL import Image, ImageOps

# Blue and vermilion of Okabe and Ito (2008): told apart by every kind of colour vision, and light against dark in grey.
BLUE, VERMILION, GREEN, INK, GREY, PALE = "#0B6BA8", "#D55E00", "#009E73", "#22303C", "#7A8791", "#E6EAED"
PARTS = {"train": BLUE, "val": "#8CB9D9", "test": VERMILION}
PHASES = {"head": "head", "fine_tune": "fine-tune", "1": "head", "2": "fine-tune"}
SHADES = LinearSegmentedColormap.from_list("thaw", ["#FFFFFF", "#CFE1EE", "#6FA8D0", BLUE, "#0A3D62"])

# Matplotlib's own font lacks many scripts; the first of these that is installed draws a class named in one of them.
SCRIPTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "Microsoft YaHei")
SCRIPTS += ("Yu Gothic", "PingFang SC", "Hiragino Sans", "Arial Unicode MS", "Noto Sans Arabic", "Noto Sans Devanagari")
_installed = {font.name for font in font_manager.fontManager.ttflist}
plt.rcParams["font.family"] = ["sans-serif", *(name for name in SCRIPTS if name in _installed)]
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # such a font may lack the very weight asked for
warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")  # else a box is drawn; tables show the name

PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %")

WIDTH = 8.0  # inches: the text width of a notebook and of the report
TILE = 160  # pixels of one picture on a contact sheet
GAP, LINE = 10, 17  # pixels between pictures, and of a line of caption


def contact_sheet(
    images: Sequence[np.ndarray | str | Path],
    titles: Sequence[str] | None = None,
    *,
    columns: int = 6,
    heading: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Lay pictures out in rows, whole and undistorted, with an optional caption under each.

    Args:
        images: RGB (height, width, 3) or grey (height, width) arrays in 0-255, or paths of image files.
        titles: a caption of one or two lines for each picture.
        columns: pictures in a row.
        heading: a line above the sheet.

    Raises:
        ValueError: there is no picture, or not one caption for each picture.
    """
    if len(images) == 0:
        raise ValueError("a contact sheet needs at least one picture; got none")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"expected one caption for each of {len(images)} pictures; got {len(titles)}")
    columns = max(1, min(columns, len(images)))
    lines = max((str(title).count("\n") + 1 for title in titles), default=0) if titles is not None else 0
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    ax = _mosaic(rows, columns=columns, caption_lines=lines, ax=ax)
    for index, title in enumerate(titles if titles is not None else []):
        _caption(ax, index // columns, index % columns, str(title), columns, lines)
    return _headed(ax, heading)


def class_sheet(
    images_by_class: Mapping[str, Sequence[np.ndarray | str | Path]], *, heading: str = "", ax: Axes | None = None
) -> Axes:
    """One row of pictures for each class, its name at the left: what the classes look like, side by side.

    Args:
        images_by_class: class name -> pictures (arrays or paths, as in `contact_sheet`), in the order of the rows.
    """
    columns = max((len(images) for images in images_by_class.values()), default=0)
    if columns == 0:
        raise ValueError("a class sheet needs at least one picture; got none")
    ax = _mosaic(list(images_by_class.values()), columns=columns, caption_lines=0, ax=ax, names=True)
    for row, name in enumerate(images_by_class):
        y = row * _pitch(0)[1] + TILE / 2
        _text(ax, -GAP, y, shorten(name, 20), ha="right", va="center", fontsize=8.5, color=INK)
    return _headed(ax, heading)


def before_and_after(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray], *, columns: int = 6, heading: str = ""
) -> Axes:
    """Two sheets of pictures side by side: as they were at the left, what became of each at the right.

    Args:
        before, after: as many pictures each, arrays as in `contact_sheet`.
        columns: pictures in a row of each sheet.
        heading: a line above the sheets.
    """
    if len(before) == 0 or len(before) != len(after):
        raise ValueError(f"expected as many pictures before as after, at least one; got {len(before)}, {len(after)}")
    columns, gap = min(columns, len(before)), np.full((1, 1, 3), 255, np.uint8)
    empty = [gap] * (-len(before) % columns)
    left, right = ([*images, *empty] for images in (before, after))
    rows = [[*left[at : at + columns], gap, *right[at : at + columns]] for at in range(0, len(left), columns)]
    return _headed(_mosaic(rows, columns=2 * columns + 1, caption_lines=0, ax=None), heading)


def write_before_and_after(folder: Path, pairs: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> list[Path]:
    """Write a PNG a class: its images in rows of six at the left, the same images changed at the right.

    Args:
        folder: where the files go; it is made if need be.
        pairs: class, images (k, H, W, 3) and their changed copies, as `transforms.pairs` gives them. 36 images make
            the sheets square.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (name, images, changed) in enumerate(pairs):
        ax = before_and_after(images, changed, heading=name)
        files.append(folder / f"{number:03}_{re.sub(r'[^-.0-9A-Za-z]+', '_', name)[:60]}.png")
        ax.figure.savefig(files[-1], dpi=200, bbox_inches="tight")
        plt.close(ax.figure)
    return files


def mistakes(table: pd.DataFrame, root: str | Path = "", *, columns: int = 6, ax: Axes | None = None) -> Axes:
    """Wrongly classified pictures, each with its true class and what the model said instead, and how surely.

    Args:
        table: columns path (relative to `root`), label, predicted, confidence (0-1); drawn in the order of its rows.
    """
    if len(table) == 0:
        ax = _new(ax, (WIDTH, 0.8))
        ax.set_axis_off()
        _text(ax, 0, 0.5, "No mistakes: every picture was classified rightly.", fontsize=10, color=GREY, va="center")
        return ax
    paths = [Path(root) / path for path in table["path"]]
    columns = max(3, min(columns, len(paths)))
    rows = [paths[start : start + columns] for start in range(0, len(paths), columns)]
    ax = _mosaic(rows, columns=columns, caption_lines=2, ax=ax)
    for index, row in enumerate(table.itertuples(index=False)):
        place = (ax, index // columns, index % columns)
        _caption(*place, f"is {row.label}", columns, 2)
        _caption(
            *place, f"said {row.predicted}", columns, 2, line=1, color=VERMILION, tail=f" {100 * row.confidence:.0f} %"
        )
    return ax


def class_counts(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Pictures per class as bars, stacked by train, val and test where the table has a column `part`.

    Args:
        table: one row per picture, with the column `label` and, if the split is known, `part`.
    """
    _require(table, "label")
    if "part" in table:
        counts = pd.crosstab(table["label"].astype(str), table["part"])
        counts = counts[[part for part in PARTS if part in counts]]
    else:
        counts = table["label"].astype(str).value_counts().to_frame("pictures")
    counts = counts.loc[counts.sum(axis=1).sort_values(kind="stable").index]
    ax = _new(ax, (WIDTH, _tall(len(counts))))
    left = np.zeros(len(counts))
    for part in counts:
        ax.barh(range(len(counts)), counts[part], left=left, height=0.72, label=part, color=PARTS.get(part, BLUE))
        left += counts[part].to_numpy()
    _name_axis(ax, "y", list(counts.index))
    if len(counts) <= 60:
        for row, total in enumerate(left):
            ax.text(total, row, f" {int(total):,}", va="center", ha="left", fontsize=_fit(ax, len(counts)), color=GREY)
        ax.set_xlim(0, left.max() * 1.08)
    ax.set_ylim(-0.6, len(counts) - 0.4)
    ax.set_xlabel("pictures")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _grid(ax, "x")
    return _legend(ax) if "part" in table else ax


def image_sizes(widths: Sequence[int], heights: Sequence[int], ax: Axes | None = None) -> Axes:
    """Width against height in pixels, a disc for each distinct size, its area the number of pictures of that size."""
    sizes = pd.DataFrame({"width": np.asarray(widths), "height": np.asarray(heights)}).value_counts().reset_index()
    if sizes.empty:
        raise ValueError("no picture sizes to draw; got none")
    ax = _new(ax, (5.2, 4.2))
    largest = 400 if len(sizes) <= 10 else 120  # points squared; many sizes need small discs to be told apart
    area = 12 + largest * sizes["count"] / sizes["count"].max()
    ax.scatter(sizes["width"], sizes["height"], s=area, color=BLUE, alpha=0.45, linewidths=0.6, edgecolors=BLUE)
    limit = 1.12 * max(sizes["width"].max(), sizes["height"].max())
    ax.plot([0, limit], [0, limit], color=GREY, linewidth=0.8, linestyle=(0, (4, 4)), zorder=0)
    ax.text(0.97 * limit, 0.97 * limit, "square ", color=GREY, fontsize=8, ha="right", va="center")
    ax.set(xlim=(0, limit), ylim=(0, limit), xlabel="width (pixels)", ylabel="height (pixels)", aspect="equal")
    if len(sizes) == 1:
        width, height, count = sizes.iloc[0]
        ax.annotate(f"all {count:,}: {width} × {height}", (width, height), (-16, 0), textcoords="offset points",
                    ha="right", va="bottom", fontsize=9, color=INK)  # fmt: skip
    _grid(ax, "both")
    return ax


def training_curves(
    history: pd.DataFrame | Sequence[pd.DataFrame],
    phases: Mapping[str, str] | None = None,
    *,
    monitor: str = "val_loss",
    ax: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Accuracy above and loss below over the epochs of all phases, the moment of thawing marked, the best epoch dotted.

    Args:
        history: the columns of history.csv (epoch, phase, loss, accuracy, val_loss, val_accuracy), or one such table
            per phase, in their order. Epochs that begin again in a later phase are counted on.
        phases: what to call each value of `phase`; "head" and "fine_tune" have names already.
        monitor: the column whose best epoch of each phase gets a dot: lowest for a loss, highest otherwise.
        ax: two Axes, one above the other.

    Returns:
        The two Axes, accuracy first.
    """
    table = history if isinstance(history, pd.DataFrame) else pd.concat(list(history), ignore_index=True)
    if table.empty:
        raise ValueError("no epoch in the history; expected at least one row")
    table = table.reset_index(drop=True)
    # Without a dot in the middle of the chart nobody sees a single epoch: markers until the line carries itself.
    style = {"linewidth": 1.6, "marker": "o" if len(table) < 4 else None, "markersize": 4}
    epochs = _running_epochs(table)
    axes = _curve_axes(ax)
    for axis, metric in zip(axes, ("accuracy", "loss"), strict=True):
        for column, name, colour in ((metric, "train", BLUE), (f"val_{metric}", "validation", VERMILION)):
            if column in table and table[column].notna().any():
                axis.plot(epochs, table[column], label=name, color=colour, **style)
        for row in _best_rows(table, monitor):
            if f"val_{metric}" in table:
                axis.plot(epochs[row], table[f"val_{metric}"][row], "o", markersize=6.5, color=VERMILION, zorder=5,
                          markeredgecolor="white", markeredgewidth=1.2, clip_on=False)  # fmt: skip
        axis.set_ylabel(metric)
        axis.margins(y=0.12)
        _grid(axis, "y")
    axes[0].yaxis.set_major_formatter(PERCENT)
    axes[1].set_ylim(bottom=max(0.0, axes[1].get_ylim()[0]))
    for axis in axes:
        _epoch_axis(axis, epochs)
    axes[0].set_xlabel("")
    _mark_phases(axes, table, epochs, phases or PHASES)
    if any(f"val_{metric}" in table for metric in ("accuracy", "loss")):
        axes[0].plot([], [], "o", markersize=6, color=VERMILION, label=f"best {monitor} of the phase")
    _legend(axes[0], raise_by=0.1)
    return axes


def learning_rates(history: pd.DataFrame, phases: Mapping[str, str] | None = None, ax: Axes | None = None) -> Axes:
    """The step size by epoch, across phases; a logarithmic axis where it spans more than a factor of twenty.

    Args:
        history: columns epoch, learning_rate and, if there are several, phase: a schedule before training or the
            history.csv after it.
    """
    _require(history, "learning_rate")
    table = history.reset_index(drop=True)
    rates, epochs = table["learning_rate"].to_numpy(float), _running_epochs(table)
    ax = _new(ax, (WIDTH, 2.2))
    if len(rates) == 1:
        ax.plot(epochs, rates, "o", color=BLUE, markersize=6)
    else:
        ax.step(epochs, rates, where="mid", color=BLUE, linewidth=1.6)
    positive = rates[rates > 0]
    if len(positive) and positive.max() / positive.min() > 20:
        ax.set_yscale("log")
        ax.tick_params(which="minor", length=0)
    elif len(positive):
        ax.set_ylim(0, 1.15 * rates.max())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_ylabel("learning rate")
    _epoch_axis(ax, epochs)
    _grid(ax, "y")
    _mark_phases([ax], table, epochs, phases or PHASES)
    return ax


def confusion_matrix(
    matrix: np.ndarray, class_names: Sequence[str], *, normalised: bool = True, ax: Axes | None = None
) -> Axes:
    """True classes down, predicted classes across; the shade is the share of the true class (or the count).

    Args:
        matrix: counts, (classes, classes), rows are true classes.
        class_names: in the order of the matrix.
        normalised: shade each row by its share, so that a rare class is seen as well as a common one.

    Raises:
        ValueError: the matrix is not square or does not fit the names.
    """
    matrix = np.asarray(matrix)
    count = len(class_names)
    if matrix.shape != (count, count):
        raise ValueError(f"expected a ({count}, {count}) matrix for {count} class names; got {matrix.shape}")
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    side = float(np.clip(2.0 + 0.55 * count, 3.6, 6.2)) if count <= 12 else min(5.0 + 0.13 * count, 20.0)
    ax = _new(ax, (side + 1.0, side))
    shade = shares if normalised else matrix
    image = ax.imshow(shade, cmap=SHADES, vmin=0, vmax=1 if normalised else max(1, matrix.max()), aspect="equal")
    _name_axis(ax, "x", list(class_names), limit=18)
    _name_axis(ax, "y", list(class_names), limit=24)
    ax.set(xlabel="predicted class", ylabel="true class")
    ax.tick_params(length=0)
    if count <= 12:
        _annotate_cells(ax, matrix, shares, shade)
    ax.set_xticks(np.arange(-0.5, count), minor=True)
    ax.set_yticks(np.arange(-0.5, count), minor=True)
    ax.grid(which="minor", color="white" if count <= 12 else PALE, linewidth=1.5 if count <= 12 else 0.3)
    ax.tick_params(which="minor", length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.6, aspect=28, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=GREY, length=0)
    if normalised:
        bar.ax.yaxis.set_major_formatter(PERCENT)
    bar.set_label("share of the true class" if normalised else "pictures", fontsize=8, color=GREY)
    return ax


def per_class(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Precision, recall and F1 of each class on one line per class, best F1 at the top.

    Args:
        frame: columns label (or the index), precision, recall, f1 (0-1), support.
    """
    _require(frame, "precision", "recall", "f1", "support")
    table = frame.set_index("label") if "label" in frame else frame
    table = table.sort_values("f1", kind="stable", na_position="first")
    ax = _new(ax, (WIDTH, _tall(len(table))))
    rows = np.arange(len(table))
    low, high = table[["precision", "recall"]].min(axis=1), table[["precision", "recall"]].max(axis=1)
    ax.hlines(rows, low, high, color="#C5CDD3", linewidth=2, zorder=1)
    ax.scatter(table["precision"], rows, s=34, color=BLUE, label="precision", zorder=3, marker="s", clip_on=False)
    ax.scatter(table["recall"], rows, s=38, color=VERMILION, label="recall", zorder=3, clip_on=False)
    ax.scatter(table["f1"], rows, s=70, color=INK, label="F1", zorder=2, marker="|", clip_on=False)
    names = [f"{shorten(name, 26)} ({int(support):,})" for name, support in table["support"].items()]
    _name_axis(ax, "y", names, limit=40)
    ax.set(xlim=(0, 1.0), ylim=(-0.6, len(table) - 0.4), xlabel="score (pictures in brackets)")
    ax.xaxis.set_major_formatter(PERCENT)
    _grid(ax, "both")
    return _legend(ax)


def reliability(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How often the model is right when it says it is sure: points on the diagonal are honest.

    Args:
        table: one row per bin of confidence: columns confidence (mean, 0-1), accuracy (0-1), count. Empty bins may
            be left out.
    """
    _require(table, "confidence", "accuracy", "count")
    table = table[table["count"] > 0]
    ax = _new(ax, (4.6, 4.2))
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    ax.vlines(table["confidence"], table["confidence"], table["accuracy"], color="#C5CDD3", linewidth=2, zorder=1)
    area = 20 + 280 * table["count"] / max(1, table["count"].max())
    ax.scatter(table["confidence"], table["accuracy"], s=area, color=BLUE, alpha=0.75, linewidths=0, zorder=3)
    ax.text(0.97, 0.03, "below the line: too sure", transform=ax.transAxes, fontsize=8, color=GREY, ha="right")
    ax.set(xlim=(0, 1.03), ylim=(0, 1.03), aspect="equal", ylabel="share that was right",
           xlabel="confidence (disc area: pictures)")  # fmt: skip
    ax.xaxis.set_major_formatter(PERCENT)
    ax.yaxis.set_major_formatter(PERCENT)
    _grid(ax, "both")
    return ax


def intervals(table: pd.DataFrame, value: str = "accuracy", *, label: str = "", ax: Axes | None = None) -> Axes:
    """One row a name with a value and its interval, best at the top: a dot on a line.

    Args:
        table: columns low, high and the one that `value` names (fractions of 1); the first column holds the names.
            Rows without a value are left out.
        value: the column of the dots.
        label: of the axis; the name of the column by default.
    """
    _require(table, value, "low", "high")
    table = table[table[value].notna()].sort_values(value, kind="stable")
    _require(table, value)
    ax = _new(ax, (WIDTH, _tall(len(table))))
    rows = np.arange(len(table))
    ax.hlines(rows, table["low"], table["high"], color="#8CB9D9", linewidth=3, zorder=1)
    ax.scatter(table[value], rows, s=42, color=BLUE, zorder=3)
    _name_axis(ax, "y", [str(name) for name in table.iloc[:, 0]], limit=40)
    ax.set(ylim=(-0.6, len(table) - 0.4), xlabel=f"{label or value.replace('_', ' ')} (line: 95 % interval)")
    ax.xaxis.set_major_formatter(PERCENT)
    _grid(ax, "x")
    return ax


def accuracy_and_speed(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Accuracy against images/s on a logarithmic axis, a dot for each backbone: above and to the right is better.

    Args:
        table: columns backbone, accuracy (0-1) and images_per_second; rows without them are left out.
    """
    _require(table, "backbone", "accuracy", "images_per_second")
    table = table.dropna(subset=["accuracy", "images_per_second"])
    _require(table, "backbone")
    ax = _new(ax, (WIDTH, 3.6))
    ax.scatter(table["images_per_second"], table["accuracy"], s=46, color=BLUE, zorder=3)
    for row in table.itertuples(index=False):
        ax.annotate(shorten(row.backbone, 26), (row.images_per_second, row.accuracy), (6, 4), fontsize=8.5, color=INK,
                    textcoords="offset points", parse_math=False)  # fmt: skip
    ax.set(xscale="log", xlabel="images/s of the forward pass", ylabel="accuracy on validation")
    ax.margins(x=0.25, y=0.2)
    wide = table["images_per_second"].max() > 4 * table["images_per_second"].min()
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if wide else MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    ax.tick_params(which="minor", length=0, labelbottom=False)
    ax.yaxis.set_major_formatter(PERCENT)
    _grid(ax, "both")
    return ax


def learning_curve(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Accuracy against training images per class: dots where it was measured, a line where it is drawn on.

    Args:
        table: columns per_class, measured (0-1, NaN where nothing was), accuracy, low and high (of the curve).
    """
    _require(table, "per_class", "measured", "accuracy", "low", "high")
    known = table[table["measured"].notna()]
    ax = _new(ax, (WIDTH, 3.6))
    ax.fill_between(
        table["per_class"], table["low"], table["high"], color="#CFE1EE", linewidth=0, label="95 % interval"
    )
    ax.plot(table["per_class"], table["accuracy"], color=BLUE, linewidth=1.6, linestyle=(0, (4, 3)), label="drawn on")
    ax.plot(
        table["per_class"][: len(known)], table["accuracy"][: len(known)], color=BLUE, linewidth=1.6, label="fitted"
    )
    ax.plot(known["per_class"], known["measured"], "o", color=VERMILION, markersize=6, label="measured")
    ax.set(xscale="log", xlabel="training images per class (mean)", ylabel="accuracy on validation")
    ax.set_xticks(table["per_class"], [f"{number:,.0f}" for number in table["per_class"]])
    ax.tick_params(which="minor", length=0, labelbottom=False)
    ax.yaxis.set_major_formatter(PERCENT)
    _grid(ax, "both")
    return _legend(ax)


def loader_workers(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Seconds to load one epoch against the number of loader threads, each bar with its images/s.

    Args:
        table: index workers, columns images/s and seconds.
    """
    _require(table, "images/s", "seconds")
    ax = _new(ax, (WIDTH, 2.6))
    rows = np.arange(len(table))
    ax.bar(rows, table["seconds"], width=0.62, color=BLUE)
    for row, (seconds, rate) in enumerate(zip(table["seconds"], table["images/s"], strict=True)):
        ax.text(row, seconds, f"{rate:,.0f} images/s", ha="center", va="bottom", fontsize=8.5, color=GREY)
    ax.set_xticks(rows, [str(number) for number in table.index])
    ax.set(xlabel="loader workers (threads)", ylabel="seconds an epoch", ylim=(0, 1.15 * table["seconds"].max()))
    _grid(ax, "y")
    return ax


def thumbnail(image: np.ndarray | str | Path, side: int = TILE) -> np.ndarray:
    """The picture, upright, as RGB uint8 (height, width, 3) with `side` pixels along its longer side.

    Raises:
        ValueError: an array that is no picture.
        OSError: a file that cannot be read as a picture.
    """
    if isinstance(image, str | Path):
        with Image.open(image) as file:
            # Scanners and EL cameras save 16 bits a pixel, which `convert` would clip to white.
            deep = file.mode.startswith(("I", "F"))
            array = (
                np.asarray(file, dtype=np.float64) if deep else np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
            )
        if deep:
            low, high = array.min(), array.max()
            array = (array - low) * (255 / (high - low) if high > low else 1.0)
    else:
        array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or 0 in array.shape:
        raise ValueError(f"expected a picture of shape (height, width, 3) or (height, width); got {array.shape}")
    picture = Image.fromarray(np.clip(np.nan_to_num(array), 0, 255).astype(np.uint8)).convert("RGB")
    scale = side / max(picture.size)
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST))


def shorten(text: str, limit: int) -> str:
    """The text, or its beginning and end around an ellipsis when it is longer than `limit` characters."""
    text = " ".join(str(text).split())
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 3
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"


def _new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The given Axes or that of a new figure, dressed in the suite's style whatever the session's rcParams are."""
    if ax is None:
        _, ax = plt.subplots(figsize=size, layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#B9C2C9")
    ax.tick_params(colors=INK, labelsize=9, length=3, color="#B9C2C9")
    ax.xaxis.label.set(color=GREY, fontsize=9)
    ax.yaxis.label.set(color=GREY, fontsize=9)
    ax.set_axisbelow(True)
    return ax


def _grid(ax: Axes, axis: str) -> None:
    ax.grid(axis=axis, color=PALE, linewidth=0.8)


def _legend(ax: Axes, raise_by: float = 0.0) -> Axes:
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0 + raise_by), ncols=4, frameon=False, fontsize=9, borderaxespad=0,
              labelcolor=INK, handlelength=1.4, columnspacing=1.6)  # fmt: skip
    return ax


def _headed(ax: Axes, heading: str) -> Axes:
    if heading:
        ax.set_title(heading, loc="left", fontsize=10, color=INK, pad=8, parse_math=False)
    return ax


def _text(ax: Axes, x: float, y: float, text: str, **style) -> None:
    ax.text(x, y, text, parse_math=False, **style)


def _require(table: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"the table lacks {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    if len(table) == 0:
        raise ValueError("the table has no rows, so there is nothing to draw")


def _tall(rows: int) -> float:
    """Height in inches for a line of text per row: ample for few rows, tight (but legible) for a hundred."""
    return 0.9 + rows * float(np.clip(0.36 - 0.004 * (rows - 8), 0.16, 0.36))


def _fit(ax: Axes, rows: int, axis: str = "y") -> float:
    """The font size in points at which `rows` lines fit along an axis, between 4 and 9."""
    size = ax.get_window_extent().height if axis == "y" else ax.get_window_extent().width
    return float(np.clip(0.78 * size * 72 / ax.figure.dpi / max(1, rows), 4.0, 9.0))


def _name_axis(ax: Axes, axis: str, names: list[str], limit: int = 30) -> None:
    """Put class names on an axis; when even small type would overlap, every second (third, ...) name is left out."""
    extent = ax.get_window_extent()
    points = (extent.height if axis == "y" else extent.width) * 72 / ax.figure.dpi
    step = max(1, int(np.ceil(5.0 * len(names) / points)))
    style = {"fontsize": _fit(ax, int(np.ceil(len(names) / step)), axis), "color": INK, "parse_math": False}
    shown = [shorten(name, limit) for name in names[::step]]
    if axis == "y":
        ax.set_yticks(range(0, len(names), step), shown, **style)
    else:
        room = points / len(names) / (0.6 * style["fontsize"])  # characters that fit side by side
        turn = {} if max(map(len, shown)) < room else {"rotation": 90} if len(names) > 12 else {
            "rotation": 35, "ha": "right", "rotation_mode": "anchor"}  # fmt: skip
        ax.set_xticks(range(0, len(names), step), shown, **style, **turn)


def _annotate_cells(ax: Axes, matrix: np.ndarray, shares: np.ndarray, shade: np.ndarray) -> None:
    dark = 0.55 * (1 if shade is shares else max(1, matrix.max()))
    for row, column in np.ndindex(*matrix.shape):
        colour = "white" if shade[row, column] > dark else INK if matrix[row, column] else "#B9C2C9"
        text = f"{matrix[row, column]:,}"
        if len(matrix) <= 6 and matrix[row, column]:
            text += f"\n{100 * shares[row, column]:.0f} %"
        ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=10 if len(matrix) <= 6 else 8)


def _running_epochs(table: pd.DataFrame) -> np.ndarray:
    """Epoch numbers that only grow, from 1: a phase that counts from its own start is put after the one before."""
    epochs = table["epoch"].to_numpy(float) if "epoch" in table else np.arange(1.0, len(table) + 1)
    if len(epochs) and (np.any(np.diff(epochs) <= 0) or not np.all(np.isfinite(epochs))):
        epochs = np.arange(1.0, len(table) + 1)
    return epochs + 1 if len(epochs) and epochs[0] == 0 else epochs


def _curve_axes(ax: Sequence[Axes] | None) -> np.ndarray:
    if ax is None:
        _, ax = plt.subplots(2, 1, figsize=(WIDTH, 4.8), sharex=True, layout="constrained")
    axes = np.ravel(np.asarray(ax, dtype=object))
    if len(axes) != 2:
        raise ValueError(f"training curves need two Axes, accuracy above loss; got {len(axes)}")
    return np.array([_new(axis, (WIDTH, 2.4)) for axis in axes], dtype=object)


def _best_rows(table: pd.DataFrame, monitor: str) -> list[int]:
    if monitor not in table:
        return []
    groups = table.groupby("phase", sort=False) if "phase" in table else [("", table)]
    scores = [group[monitor].dropna() for _, group in groups]
    return [int(score.idxmin() if "loss" in monitor else score.idxmax()) for score in scores if len(score)]


def _mark_phases(axes: Sequence[Axes], table: pd.DataFrame, epochs: np.ndarray, names: Mapping[str, str]) -> None:
    """A line where the phase changes, labelled "thaw", and above the first Axes the name of each phase."""
    phases = table["phase"].astype(str).to_numpy() if "phase" in table else np.array([""] * len(table))
    changes = [row for row in range(1, len(phases)) if phases[row] != phases[row - 1]]
    for row in changes:
        boundary = (epochs[row - 1] + epochs[row]) / 2
        for axis in axes:
            axis.axvline(boundary, color=INK, linewidth=1.0, linestyle=(0, (2, 2)), zorder=0)
        # The label sits in the strip between the chart and its legend, where no curve can run through it.
        name = names.get(phases[row], phases[row])
        axes[0].annotate(f"thaw · {name}", (boundary, 1.0), (3, 3), xycoords=("data", "axes fraction"), fontsize=8.5,
                         textcoords="offset points", color=INK, ha="left", va="bottom", parse_math=False,
                         annotation_clip=False)  # fmt: skip


def _epoch_axis(ax: Axes, epochs: np.ndarray) -> None:
    ax.set_xlabel("epoch")
    room = 0.5 + 0.01 * (epochs[-1] - epochs[0])
    ax.set_xlim(epochs[0] - min(room, 0.9), epochs[-1] + room)  # no epoch 0 on the axis
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _pitch(caption_lines: int) -> tuple[int, int]:
    """Pixels from one picture to the next, across and down, on the canvas of a contact sheet."""
    return TILE + GAP, TILE + GAP + LINE * caption_lines + (GAP if caption_lines else 0)


def _mosaic(rows, *, columns: int, caption_lines: int, ax: Axes | None, names: bool = False) -> Axes:
    """All pictures on one canvas in one Axes: an Axes each would take seconds, and line up less well."""
    across, down = _pitch(caption_lines)
    canvas = np.full((len(rows) * down - GAP, columns * across - GAP, 3), 255, np.uint8)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            tile = thumbnail(image)
            top = row * down + (TILE - tile.shape[0]) // 2
            left = column * across + (TILE - tile.shape[1]) // 2
            canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    margin = 1.5 if names else 0.0
    inch = min((WIDTH - margin) / columns, 1.7, max(0.6, 60 / len(rows)))
    ax = _new(ax, (margin + columns * inch, len(rows) * inch * down / across + 0.1))
    ax.imshow(canvas, interpolation="antialiased")
    # Names stand left of the pictures, inside the Axes, where no layout can cut them off.
    ax.set_xlim(-margin / inch * across, canvas.shape[1])
    ax.set_axis_off()
    return ax


def _caption(ax, row: int, column: int, text: str, columns: int, lines: int, line: int = 0, color=INK, tail="") -> None:
    across, down = _pitch(lines)
    width = ax.get_window_extent().width * 72 / ax.figure.dpi / columns
    size = float(np.clip(width / 12.5, 4.0, 8.5))
    limit = int(width / (0.6 * size)) - len(tail)
    shown = "\n".join(shorten(part, max(4, limit)) for part in text.split("\n")) + tail
    y = row * down + TILE + GAP / 2 + LINE * line
    _text(ax, column * across, y, shown, ha="left", va="top", fontsize=size, color=color, linespacing=1.1)
