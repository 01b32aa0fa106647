"""Which part of each image to keep: boxes from a table or from a detector, and the choice of one of them.

Boxes are in pixels of the upright image, as a viewer shows it. Of the boxes of the chosen classes that score
enough, the largest is used, with a margin and cut off at the image's edge. An image without such a box stays whole. No
image is written twice: the box becomes a column of the inventory, and 02_resize and prediction use the same function.
"""

import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import imagehash
import numpy as np
import pandas as pd
from PIL import Image

from helpers.core import disk, parallel, project
from helpers.data import detectors, images, inventory
from helpers.data.detectors import HUB, Detection
from helpers.data.formats import deep

CORNERS = ["left", "top", "right", "bottom"]
COLUMNS = ["path", *CORNERS, "class", "score"]
DETECTOR = ("layout", "input_size", "mean", "scale", "score")  # parameters of a detector
SMALLEST = 16  # pixels: the shortest side of a useful box
COPIED = ("quarantine.csv", "fixes.csv", "ignored.json", "class_names.json")  # files of 00_explore


def check(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError or FileNotFoundError unless the parameters of 00b_crop name either boxes or a detector."""
    boxes, detector = parameters["boxes"], parameters["detector"]
    if bool(boxes) == bool(detector):
        raise ValueError(
            f"crop: set either boxes (a CSV file) or detector (an ONNX file or {HUB}<preset>), got"
            f" boxes: {boxes!r}, detector: {detector!r}."
        )
    for name, file in (("boxes", boxes), ("detector", detector)):
        if file and not file.startswith(HUB) and not project.resolve(file).is_file():
            raise FileNotFoundError(f"crop.{name}: there is no file {file}.")


def read_boxes(file: Path, paths: Sequence[str]) -> pd.DataFrame:
    """Read a CSV of boxes.

    Args:
        file: with the columns path and left, top, right, bottom, or x, y, width, height (x and y are the left upper
            corner); class and score where it has them. A path is relative to the source, or a file name that only one
            image has. A row without numbers means that its image has no box.
        paths: of the images.

    Returns:
        Columns path, left, top, right, bottom (float), class (text), score (1 where the file has none); a row a box.

    Raises:
        ValueError: a column is missing, a value is not a number, a box has no size, or no row belongs to an image.
    """
    table = disk.read_table(file, encoding="utf-8-sig", skipinitialspace=True)
    box_columns = CORNERS if set(CORNERS) <= set(table) else ["x", "y", "width", "height"]
    if missing := [name for name in ("path", *box_columns) if name not in table]:
        raise ValueError(
            f"boxes: {file.name} has no column {', '.join(missing)}. It has: {', '.join(table)}. Expected path and"
            " left, top, right, bottom, or path and x, y, width, height, in pixels; class and score are optional."
        )
    table = table[(table[box_columns] != "").any(axis=1)].reset_index(drop=True)
    boxes = pd.DataFrame({"path": _inventory_paths(table["path"], paths)})
    boxes[CORNERS] = table[box_columns].apply(pd.to_numeric, errors="coerce").to_numpy()
    if box_columns != CORNERS:
        boxes[["right", "bottom"]] += boxes[["left", "top"]].to_numpy()
    boxes["class"] = table.get("class", "")
    boxes["score"] = pd.to_numeric(table["score"], errors="coerce") if "score" in table else 1.0
    sized = (boxes["right"] > boxes["left"]) & (boxes["bottom"] > boxes["top"]) & boxes["score"].notna()
    if not sized.all():
        row = int(np.argmin(sized))
        shown = ", ".join(f"{name} {table[name][row]!r}" for name in [*box_columns, "score"] if name in table)
        raise ValueError(
            f"boxes: {(~sized).sum()} rows of {file.name} are no boxes, such as {table['path'][row]}: {shown}."
        )
    if len(boxes) and not boxes["path"].isin(paths).any():
        raise ValueError(
            f"boxes: no path in {file.name}, such as {table['path'][0]!r}, is one of the {len(paths):,} images, such as"
            f" {paths[0]!r}. Write paths relative to the source, or file names where each is used once."
        )
    return boxes[COLUMNS]


def _inventory_paths(box_paths: pd.Series, paths: Sequence[str]) -> pd.Series:
    """Return the paths of a boxes file as the inventory has them; a file name that one image has becomes its path."""
    names = pd.Series(list(paths), index=[PurePosixPath(path).name for path in paths])
    alone = names[~names.index.duplicated(keep=False)]
    return box_paths.where(box_paths.isin(paths), box_paths.map(alone)).fillna(box_paths)


def find(
    paths: Sequence[str], root: Path, parameters: Mapping[str, Any], file: Path, *, workers: int = 0
) -> pd.DataFrame:
    """Find the boxes of all images with the table or detector that the parameters name, and write them to `file`.

    A detector's boxes are written image by image; boxes of an interrupted run are kept.

    Args:
        paths: of the images, relative to `root`.
        root: the source's root.
        parameters: those of 00b_crop.
        file: the CSV file to write, in the form that `read_boxes` reads.
        workers: threads; 0 means one for each core.

    Returns:
        As `read_boxes`.

    Raises:
        ValueError: the table or the detector cannot be used.
        ImageError: an image can no longer be read.
    """
    check(parameters)
    paths = list(paths)
    if parameters["boxes"]:
        read_boxes(project.resolve(parameters["boxes"]), paths).to_csv(file, index=False)
        return read_boxes(file, paths)
    earlier_boxes = _done(file)
    earlier_boxes.to_csv(file, index=False)
    remaining_paths = sorted(set(paths) - set(earlier_boxes["path"]))
    look = partial(_look, detect=_detector(parameters), input_size=parameters["input_size"])
    results = parallel.for_each(look, [root / path for path in remaining_paths], workers=workers, label="detect")
    with file.open("a", encoding="utf-8") as stream:
        for path, (boxes, _) in zip(remaining_paths, results, strict=True):
            rows = [[path, *box] for box in boxes] or [[path]]  # a path alone: no box in this image
            pd.DataFrame(rows).to_csv(stream, header=False, index=False, float_format="%.2f")
            stream.flush()
    return read_boxes(file, paths)


def _detector(parameters: Mapping[str, Any]) -> detectors.Detect:
    return detectors.load(parameters["detector"], **{name: parameters[name] for name in DETECTOR})


def _done(file: Path) -> pd.DataFrame:
    """Return the boxes that an interrupted run has written, without those of the last image, which may be cut off."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    whole = text[: text.rfind("\n") + 1] or ",".join(COLUMNS)
    table = disk.read_table(io.StringIO(whole), names=COLUMNS, header=0)
    return table[table["path"] != table["path"].iloc[-1]] if len(table) else table


def _look(path: Path, *, detect: detectors.Detect, input_size: int) -> tuple[list[Detection], tuple[int, int]]:
    """Return the boxes of an image file and its (width, height), both of the upright image at full size."""
    image = images.open_image(images.read_bytes(path), max_pixels=None)
    stored = image.size
    pixels = images.decode(image, at_least=(input_size, input_size))
    reduced = round(max(stored) / max(pixels.shape[:2]))
    turned = (stored[0] > stored[1]) != (pixels.shape[1] > pixels.shape[0])
    boxes = [Detection(*(reduced * side for side in box[:4]), *box[4:]) for box in detect(pixels)]
    return boxes, stored[::-1] if turned else stored


def largest(
    boxes: pd.DataFrame,
    table: pd.DataFrame,
    *,
    classes: Sequence[int | str] = (),
    score: float = 0.5,
    margin: float = 0.0,
) -> pd.DataFrame:
    """Choose the box of every image.

    Args:
        boxes: as `read_boxes` returns it.
        table: the inventory.
        classes: the classes to use, as `boxes` names them; empty: all.
        score: the lowest score to use.
        margin: the border added on every side, as a share of the box's width and height.

    Returns:
        For each row of `table`, in its index: path, box ("left top right bottom" in whole pixels, "" for the whole
        image), class, score, share (of the image's area), why ("cut", or why not).

    Raises:
        ValueError: `classes` is set and no box has a class.
    """
    if classes and not boxes["class"].ne("").any():
        raise ValueError(
            f"classes: {list(classes)} is set, but no box has a class. Add the column class, or leave classes empty."
        )
    by_image = {path: [Detection(*row) for row in rows[COLUMNS[1:]].to_numpy()] for path, rows in boxes.groupby("path")}
    turned = table["orientation"] >= 5
    sizes = zip(table["width"].mask(turned, table["height"]), table["height"].mask(turned, table["width"]), strict=True)
    rows = []
    for path, size in zip(table["path"], sizes, strict=True):
        box, why = choose(by_image.get(path, []), size, classes=classes, score=score, margin=margin)
        row = {"path": path, "box": "", "class": "", "score": np.nan, "share": 1.0, "why": why}
        if box:
            row |= {"box": " ".join(str(side) for side in box[:4]), "class": box.kind, "score": box.score}
            row["share"] = _area(box) / (size[0] * size[1])
        rows.append(row)
    return pd.DataFrame(rows, index=table.index)


def choose(
    boxes: Sequence[Detection], size: tuple[int, int], *, classes: Sequence[int | str], score: float, margin: float
) -> tuple[Detection | None, str]:
    """Return the box to cut an image of `size` (width, height) to, in whole pixels, or None; and "cut" or why not."""
    names = {str(name) for name in classes}
    of_class = [box for box in boxes if not names or box.kind in names]
    enough = [box for box in of_class if box.score >= score]
    clipped = [(_clip(box, size), box) for box in enough]
    large = [(part, box) for part, box in clipped if min(part.right - part.left, part.bottom - part.top) >= SMALLEST]
    steps = ((boxes, "no box"), (of_class, "no box of these classes"), (enough, "too little score"))
    for candidates, why in (*steps, (large, "too small or outside")):
        if not candidates:
            return None, why
    _, box = max(large, key=lambda pair: _area(pair[0]))
    return _clip(box, size, margin), "cut"  # the margin is a share of the box before clipping


def _clip(box: Detection, size: tuple[int, int], margin: float = 0.0) -> Detection:
    """Return the box with its margin in whole pixels, cut off at the edges of an image of `size` (width, height)."""
    across, down = margin * (box.right - box.left), margin * (box.bottom - box.top)
    left, top = max(0, int(np.floor(box.left - across))), max(0, int(np.floor(box.top - down)))
    right, bottom = min(size[0], int(np.ceil(box.right + across))), min(size[1], int(np.ceil(box.bottom + down)))
    return box._replace(left=left, top=top, right=right, bottom=bottom)


def _area(box: Detection) -> float:
    return (box.right - box.left) * (box.bottom - box.top)


def looks(chosen: pd.DataFrame, table: pd.DataFrame, root: Path, *, workers: int = 0) -> pd.Series:
    """Return the perceptual hash of each image after its cut; for a whole image, that of the inventory."""
    cut = chosen[chosen["box"] != ""]
    tasks = [(root / path, box) for path, box in zip(cut["path"], cut["box"], strict=True)]
    hashes = list(parallel.for_each(_hash, tasks, workers=workers, label="looks"))
    return table["phash"].where(chosen["box"] == "", pd.Series(hashes, index=cut.index).reindex(table.index))


def _hash(task: tuple[Path, str]) -> str:
    path, box = task
    side = 4 * inventory.HASH_SIDE
    pixels = images.load(path, side, "squash", box=images.read_box(box), max_pixels=None)
    return str(imagehash.phash(Image.fromarray(pixels).convert("L"), hash_size=inventory.HASH_SIDE))


def examples(chosen: pd.DataFrame, root: Path, *, count: int = 9, side: int = 320) -> list[np.ndarray]:
    """Return before and after in turn, uint8 (side, side, 3), of the `count` cut images with the lowest hashes.

    The image before the cut shows the box in red.
    """
    cut = chosen[chosen["box"] != ""].sort_values("path", key=lambda paths: pd.util.hash_array(paths.to_numpy(object)))
    pairs = []
    for path, text in cut[["path", "box"]].head(count).to_numpy():
        box = images.read_box(text)
        pixels = images.decode(images.open_image(images.read_bytes(root / path), max_pixels=None)).copy()
        after = images.resize(pixels[box[1] : box[3], box[0] : box[2]], side, "pad")
        cv2.rectangle(pixels, box[:2], (box[2] - 1, box[3] - 1), (255, 0, 0), max(2, max(pixels.shape) // 100))
        pairs += [images.resize(pixels, side, "pad"), after]
    return pairs


def write(out: Path, source: Path, table: pd.DataFrame, chosen: pd.DataFrame) -> list[str]:
    """Write the inventory with its boxes and the choices, and copy the rest of `source`; return the files' names.

    Args:
        out: the stage's folder.
        source: the folder of 00_explore.
        table: the inventory, with the column box.
        chosen: as `largest` returns it.
    """
    table.to_csv(out / "inventory.csv", index=False)
    chosen.to_csv(out / "crops.csv", index=False)
    for name in COPIED:
        shutil.copyfile(source / name, out / name)
    if (source / deep.FILE).is_file():
        shutil.copyfile(source / deep.FILE, out / deep.FILE)
    (out / "source").unlink(missing_ok=True)
    (out / "source").symlink_to((source / "source").resolve())
    return ["inventory.csv", "crops.csv", *COPIED]


def headline(chosen: pd.DataFrame) -> str:
    """Return a sentence: how many images are cut, and why the others are not."""
    counts = chosen["why"].value_counts()
    reasons = [f"{count:,} {why}" for why, count in counts.drop("cut", errors="ignore").items()]
    text = f"{counts.get('cut', 0):,} of {len(chosen):,} images cut to a box"
    return text + (f", the others whole: {', '.join(reasons)}" if reasons else "")


def cutter(parameters: Mapping[str, Any]) -> Callable[[Path], images.Box | None]:
    """Return the function that chooses the part of a new image for a model trained with these parameters.

    Args:
        parameters: crop.json. Without a detector every image stays whole: a boxes file has only its own images.
    """
    if not parameters["detector"]:
        return lambda path: None
    detect = _detector(parameters)
    rule = {name: parameters[name] for name in ("classes", "score", "margin")}

    def part(path: Path) -> images.Box | None:
        boxes, size = _look(path, detect=detect, input_size=parameters["input_size"])
        box, _ = choose(boxes, size, **rule)
        return box and box[:4]

    return part
