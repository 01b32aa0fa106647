"""Sheets of images: the data, their augmentation and the mistakes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from PIL import Image

from helpers.core import words
from helpers.data.images import decode, open_image, read_bytes
from helpers.reports import theme

TILE = 160  # pixels of one image on a contact sheet
GAP, LINE = 10, 17  # pixels between images, and of a line of caption


def contact_sheet(
    images: Sequence[np.ndarray | str | Path],
    titles: Sequence[str] | None = None,
    *,
    columns: int = 6,
    heading: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw images in rows, whole and undistorted, with an optional caption under each.

    Args:
        images: RGB (height, width, 3) or grey (height, width) arrays in 0-255, or paths of image files.
        titles: a caption of one or two lines for each image.
        columns: images in a row.
        heading: a line above the sheet.

    Raises:
        ValueError: there is no image, or not one caption for each image.
    """
    if len(images) == 0:
        raise ValueError("a contact sheet needs at least one image; got none")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"expected one caption for each of {len(images)} images; got {len(titles)}")
    columns = max(1, min(columns, len(images)))
    lines = max((str(title).count("\n") + 1 for title in titles), default=0) if titles is not None else 0
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    ax = _mosaic(rows, columns=columns, caption_lines=lines, ax=ax)
    for index, title in enumerate(titles if titles is not None else []):
        _caption(ax, index // columns, index % columns, str(title), columns, lines)
    return theme.headed(ax, heading)


def class_sheet(
    images_by_class: Mapping[str, Sequence[np.ndarray | str | Path]], *, heading: str = "", ax: Axes | None = None
) -> Axes:
    """Draw one row of images for each class, with its name at the left.

    Args:
        images_by_class: class name -> images (arrays or paths, as in `contact_sheet`), in the order of the rows.
    """
    columns = max((len(images) for images in images_by_class.values()), default=0)
    if columns == 0:
        raise ValueError("a class sheet needs at least one image; got none")
    ax = _mosaic(list(images_by_class.values()), columns=columns, caption_lines=0, ax=ax, names=True)
    for row, name in enumerate(images_by_class):
        y = row * _pitch(0)[1] + TILE / 2
        theme.text(ax, -GAP, y, words.shorten(name, 20), ha="right", va="center", fontsize=8.5, color=theme.INK)
    return theme.headed(ax, heading)


def before_and_after(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray], *, columns: int = 6, heading: str = ""
) -> Axes:
    """Draw two sheets of images side by side: before at the left, after at the right.

    Args:
        before, after: as many images each, arrays as in `contact_sheet`.
        columns: images in a row of each sheet.
        heading: a line above the sheets.
    """
    if len(before) == 0 or len(before) != len(after):
        raise ValueError(f"expected as many images before as after, at least one; got {len(before)}, {len(after)}")
    columns, gap = min(columns, len(before)), np.full((1, 1, 3), 255, np.uint8)
    empty = [gap] * (-len(before) % columns)
    left, right = ([*images, *empty] for images in (before, after))
    rows = [[*left[at : at + columns], gap, *right[at : at + columns]] for at in range(0, len(left), columns)]
    return theme.headed(_mosaic(rows, columns=2 * columns + 1, caption_lines=0, ax=None), heading)


def write_before_and_after(folder: Path, pairs: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> list[Path]:
    """Write a PNG a class: its images in rows of six at the left, the changed images at the right.

    Args:
        folder: where the files go; it is made if necessary.
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
    """Draw wrongly classified images, each with its true class, the predicted class and its confidence.

    Args:
        table: columns file (relative to `root`), label, predicted, confidence (0-1); drawn in the order of its rows.
    """
    if len(table) == 0:
        ax = theme.new(ax, (theme.WIDTH, 0.8))
        ax.set_axis_off()
        theme.text(
            ax, 0, 0.5, "No mistakes: every image was classified correctly.", fontsize=10, color=theme.GREY, va="center"
        )
        return ax
    files = [Path(root) / file for file in table["file"]]
    columns = max(3, min(columns, len(files)))
    rows = [files[start : start + columns] for start in range(0, len(files), columns)]
    ax = _mosaic(rows, columns=columns, caption_lines=2, ax=ax)
    for index, row in enumerate(table.itertuples(index=False)):
        place = (ax, index // columns, index % columns)
        _caption(*place, f"is {row.label}", columns, 2)
        _caption(
            *place,
            f"model: {row.predicted}",
            columns,
            2,
            line=1,
            color=theme.VERMILION,
            tail=f" {100 * row.confidence:.0f} %",
        )
    return ax


def thumbnail(image: np.ndarray | str | Path, side: int = TILE) -> np.ndarray:
    """Return the image, upright, as RGB uint8 (height, width, 3) with `side` pixels along its longer side.

    A file is decoded as everywhere in the suite, so a figure shows what the model reads.

    Raises:
        ValueError: an array that is not an image.
        ImageError: a file that cannot be read as an image.
    """
    if isinstance(image, str | Path):
        array = decode(open_image(read_bytes(image), max_pixels=None), at_least=(side, side))
    else:
        array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or 0 in array.shape:
        raise ValueError(f"expected an image of shape (height, width, 3) or (height, width); got {array.shape}")
    pixels = Image.fromarray(np.clip(np.nan_to_num(array), 0, 255).astype(np.uint8)).convert("RGB")
    scale = side / max(pixels.size)
    size = tuple(max(1, round(length * scale)) for length in pixels.size)
    return np.asarray(pixels.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST))


def _pitch(caption_lines: int) -> tuple[int, int]:
    """Return pixels from one image to the next, across and down, on the canvas of a contact sheet."""
    return TILE + GAP, TILE + GAP + LINE * caption_lines + (GAP if caption_lines else 0)


def _mosaic(rows, *, columns: int, caption_lines: int, ax: Axes | None, names: bool = False) -> Axes:
    """Draw all images on one canvas in one Axes: an Axes each would take seconds, and align less well."""
    across, down = _pitch(caption_lines)
    canvas = np.full((len(rows) * down - GAP, columns * across - GAP, 3), 255, np.uint8)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            tile = thumbnail(image)
            top = row * down + (TILE - tile.shape[0]) // 2
            left = column * across + (TILE - tile.shape[1]) // 2
            canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    margin = 1.5 if names else 0.0
    inch = min((theme.WIDTH - margin) / columns, 1.7, max(0.6, 60 / len(rows)))
    ax = theme.new(ax, (margin + columns * inch, len(rows) * inch * down / across + 0.1))
    ax.imshow(canvas, interpolation="antialiased")
    # Names are left of the images, inside the Axes, where no layout can cut them off.
    ax.set_xlim(-margin / inch * across, canvas.shape[1])
    ax.set_axis_off()
    return ax


def _caption(
    ax, row: int, column: int, text: str, columns: int, lines: int, line: int = 0, color=theme.INK, tail=""
) -> None:
    across, down = _pitch(lines)
    width = ax.get_window_extent().width * 72 / ax.figure.dpi / columns
    size = float(np.clip(width / 12.5, 4.0, 8.5))
    limit = int(width / (0.6 * size)) - len(tail)
    shown = "\n".join(words.shorten(part, max(4, limit)) for part in text.split("\n")) + tail
    y = row * down + TILE + GAP / 2 + LINE * line
    theme.text(ax, column * across, y, shown, ha="left", va="top", fontsize=size, color=color, linespacing=1.1)
