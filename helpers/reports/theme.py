"""The look of every figure: colours, fonts, axes."""

import logging
import warnings
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FuncFormatter

from helpers.core import words

# Blue and vermilion of Okabe and Ito (2008): distinct in every kind of colour vision, and light against dark in grey.
BLUE, VERMILION, GREEN, INK, GREY, PALE = "#0B6BA8", "#D55E00", "#009E73", "#22303C", "#7A8791", "#E6EAED"
PARTS = {"train": BLUE, "val": "#8CB9D9", "test": VERMILION}
SHADES = LinearSegmentedColormap.from_list("thaw", ["#FFFFFF", "#CFE1EE", "#6FA8D0", BLUE, "#0A3D62"])

# Matplotlib's own font lacks many scripts; the first of these that is installed draws a class named in one of them.
SCRIPTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "Microsoft YaHei")
SCRIPTS += ("Yu Gothic", "PingFang SC", "Hiragino Sans", "Arial Unicode MS", "Noto Sans Arabic", "Noto Sans Devanagari")
PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %")
WIDTH = 8.0  # inches: the text width of a notebook and of the report


@cache
def prepare() -> None:
    """Let Matplotlib draw names in every script that has a font here, without a warning for each missing letter."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    plt.rcParams["font.family"] = ["sans-serif", *(name for name in SCRIPTS if name in installed)]
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a font may lack the requested weight
    warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")  # a box is drawn; tables show the name


def new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return `ax` or the Axes of a new figure, in the suite's style; the session's rcParams do not change it."""
    prepare()
    if ax is None:
        _, ax = plt.subplots(figsize=size, layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#B9C2C9")
    ax.tick_params(colors=INK, labelsize=9, length=3, color="#B9C2C9")
    ax.xaxis.label.set(color=GREY, fontsize=9)
    ax.yaxis.label.set(color=GREY, fontsize=9)
    ax.set_axisbelow(True)
    return ax


def grid(ax: Axes, axis: str) -> None:
    ax.grid(axis=axis, color=PALE, linewidth=0.8)


def legend(ax: Axes, raise_by: float = 0.0) -> Axes:
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0 + raise_by), ncols=4, frameon=False, fontsize=9, borderaxespad=0,
              labelcolor=INK, handlelength=1.4, columnspacing=1.6)  # fmt: skip
    return ax


def headed(ax: Axes, heading: str) -> Axes:
    if heading:
        ax.set_title(heading, loc="left", fontsize=10, color=INK, pad=8, parse_math=False)
    return ax


def text(ax: Axes, x: float, y: float, text: str, **style) -> None:
    ax.text(x, y, text, parse_math=False, **style)


def require(table: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"the table lacks {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    if len(table) == 0:
        raise ValueError("the table has no rows, so there is nothing to draw")


def tall(rows: int) -> float:
    """Return the height in inches for a line of text per row: large for few rows, small but legible for a hundred."""
    return 0.9 + rows * float(np.clip(0.36 - 0.004 * (rows - 8), 0.16, 0.36))


def fit(ax: Axes, rows: int, axis: str = "y") -> float:
    """Return the font size in points at which `rows` lines fit along an axis, between 4 and 9."""
    size = ax.get_window_extent().height if axis == "y" else ax.get_window_extent().width
    return float(np.clip(0.78 * size * 72 / ax.figure.dpi / max(1, rows), 4.0, 9.0))


def name_axis(ax: Axes, axis: str, names: list[str], limit: int = 30, first: float = 0.0) -> None:
    """Write class names on an axis; if even small type overlaps, leave names out (draw every second, third, ...).

    `first` is the place of the first name; each next one is 1 further.
    """
    extent = ax.get_window_extent()
    points = (extent.height if axis == "y" else extent.width) * 72 / ax.figure.dpi
    step = max(1, int(np.ceil(5.0 * len(names) / points)))
    style = {"fontsize": fit(ax, int(np.ceil(len(names) / step)), axis), "color": INK, "parse_math": False}
    labels = [words.shorten(name, limit) for name in names[::step]]
    if axis == "y":
        ax.set_yticks(first + np.arange(0, len(names), step), labels, rotation=0, **style)
    else:
        room = points / len(names) / (0.6 * style["fontsize"])  # characters that fit side by side
        turn = {} if max(map(len, labels)) + 1 < room else {"rotation": 90} if len(names) > 12 else {
            "rotation": 35, "ha": "right", "rotation_mode": "anchor"}  # fmt: skip
        ax.set_xticks(first + np.arange(0, len(names), step), labels, **style, **turn)
