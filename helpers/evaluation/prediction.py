"""Classify images with the model of a run, read exactly as its training images were read."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from helpers.core import disk, notebooks, parallel, project
from helpers.data import crop, images
from helpers.data.formats import deep
from helpers.data.labelling import folders
from helpers.evaluation import tables
from helpers.evaluation.trust import novelty, promises

BATCH = 32
UNSURE = "unsure"
NOTES = {
    "answer": "the predicted class, or that the promise of 05 cannot be kept",
    "second": "the class next in probability",
    "set": "the classes that keep a promise of coverage",
    "novel": "yes where the image looks like none of the classes",
}
PIECE = 16 * BATCH  # images that a host is given at a time; whole batches, so that hosts change no digit


def model_folder(run: str | Path) -> Path:
    """Return the folder of the run's model: the one that 05_evaluate tested, else the last one trained.

    Raises:
        FileNotFoundError: there is no such run, or it has no trained model yet.
    """
    folder = project.run_folder(run)
    for candidate in (folder, *(folder / stage for stage in reversed(notebooks.stages()))):
        if (candidate / "model.keras").is_file():
            return candidate
    raise FileNotFoundError(
        f"{project.display_path(folder)} is not a run with a trained model. Make one with `thaw run`."
    )


def mirrored(model, mirror: str):
    """Return a model whose probabilities are the mean over symmetries of an image.

    Args:
        model: keras.Model, images (batch, H, W, 3) -> probabilities (batch, classes).
        mirror: "none" (the model itself), "horizontal", "vertical", "both", which takes all four mirror images, or
            "dihedral", which takes all eight flips and quarter turns.

    Raises:
        ValueError: "dihedral" for images that are not square, which quarter turns do not fit.
    """
    import keras

    if mirror == "none":
        return model
    image = keras.Input(model.input_shape[1:], name="image")
    if mirror == "dihedral" and image.shape[1] != image.shape[2]:
        raise ValueError(f"mirror: dihedral turns images and needs square ones; the model takes {image.shape[1:]}.")
    images = [image]
    for axis in {"vertical": [1], "horizontal": [2], "both": [1, 2], "dihedral": [1, 2]}[mirror]:
        images += [keras.ops.flip(one, axis=axis) for one in images]
    if mirror == "dihedral":
        images += [keras.ops.transpose(one, (0, 2, 1, 3)) for one in images]
    mean = keras.layers.Average(name="mean_probabilities")([model(one) for one in images])
    return keras.Model(image, mean, name="mirrored")


def probabilities(model, images) -> np.ndarray:
    """Return what a model says of the images of a resized folder, (images, classes) float32, in their order.

    Args:
        model: keras.Model, images (batch, H, W, 3) -> probabilities (batch, classes).
        images: datasets.Folder.
    """
    from helpers.compute import inference
    from helpers.training import datasets

    return datasets.through(inference.fast(model), images, "predict")


def table(images, scores: np.ndarray, root: Path) -> pd.DataFrame:
    """Return the table of predictions of the images of a resized folder, as predictions.csv holds it.

    Args:
        images: datasets.Folder.
        scores: as `probabilities` returns them.
        root: the resized folder.
    """
    files = [project.relative(file, root) for file in images.files]
    return tables.predictions_table(images.paths, images.labels, scores, images.class_names, files)


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files among `paths` and all files below the folders among them, sorted within each folder.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no file.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            below = [path / name for name in sorted(folders.walk(path, Counter()))]
            if not below:
                raise FileNotFoundError(f"The folder {path} holds no images.")
            found += below
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"There is no image or folder {path}.")
    return found


def predict(run: str | Path, paths: Iterable[str | Path], hosts: str = "") -> tuple[pd.DataFrame, dict[str, str]]:
    """Classify image files and folders of images.

    Args:
        run: the folder of a run, or of one of its training stages.
        paths: image files and folders.
        hosts: address of a Dask scheduler whose hosts share the work; they must see the run and the images under the
            same paths.

    Returns:
        A table with the columns path, predicted, confidence, what the run has learned to say of it (`NOTES`), and one
        probability per class; and a mapping of each file that is not a readable image to the reason. `attrs["caution"]`
        of the table says what should be known about it.

    Raises:
        FileNotFoundError: the run, its model, or a path does not exist.
        parallel.HostError: the hosts cannot do it.
    """
    folder, paths = model_folder(run).resolve(), list(paths)
    files = find_images(paths)
    class_names, about = disk.read_json(folder / "class_names.json"), disk.read_json(folder / "model.json")
    if hosts:
        pieces = [[os.path.abspath(path) for path in files[at : at + PIECE]] for at in range(0, len(files), PIECE)]
        work = partial(_classify_with, str(folder), (folder / "model.keras").stat().st_mtime_ns)
        reads = [folder / "model.keras", *map(os.path.abspath, paths)]
        parts = list(parallel.spread(work, pieces, address=hosts, reads=reads))
    else:
        parts = [_classify(*_load(str(folder)), folder, files)]
    reasons = [reason for _, _, found, _ in parts for reason in found]
    scores, beyond = np.concatenate([scores for scores, *_ in parts]), sum(count for *_, count in parts)
    distances = np.concatenate([far for _, far, *_ in parts])
    read = [str(path) for path, reason in zip(files, reasons, strict=True) if not reason]
    unreadable = {str(path): reason for path, reason in zip(files, reasons, strict=True) if reason}
    table = pd.DataFrame(scores, columns=class_names)
    for place, (column, values) in enumerate(_notes(folder, scores, distances, class_names).items()):
        table.insert(place, column, values)
    table.attrs["class_names"] = class_names
    table.insert(0, "confidence", scores.max(axis=1) if len(scores) else [])
    table.insert(0, "predicted", [class_names[index] for index in scores.argmax(axis=1)])
    table.insert(0, "path", read)
    cautions = []
    if boxes := about.get("crop", {}).get("boxes"):
        cautions.append(f"The model learned on images cut to the boxes of {boxes}; these are taken whole.")
    if beyond:
        black, white = about["levels"]
        cautions.append(
            f"{beyond:,} of {len(read):,} images have values beyond {black:g} to {white:g}, the range that the model"
            " learned on; these values are cut off."
        )
    if cautions:
        table.attrs["caution"] = "\n".join(cautions)
    return table, unreadable


def lines(table: pd.DataFrame) -> list[str]:
    """Return a line for each row of a table of `predict`, for a terminal."""
    said = []
    for row in table.to_dict("records"):
        line = f"{row['path']}  {row['predicted']}  {row['confidence']:.3f}"
        if row.get("answer") == UNSURE:
            line += f"  {UNSURE}, or {row['second']}"
        said.append(line + ("  looks like none of the classes" if row.get("novel") else ""))
    return said


def _load(folder: str):
    """Return the model in a folder, and a function of images that says how far each is from all that was learned."""
    from helpers.compute import hardware  # takes seconds, which a wrong path need not

    model, known = hardware.load(Path(folder) / "model.keras"), novelty.read(Path(folder))
    if known is None:
        return model, lambda images: np.zeros(len(images), np.float32)
    run = novelty.features_of(model)
    return model, lambda images: known.distance(run(images))


@lru_cache(maxsize=1)
def _loaded(folder: str, modified: int):
    return _load(folder)


def _notes(folder: Path, scores: np.ndarray, distances: np.ndarray, class_names: Sequence[str]) -> dict[str, list]:
    """Return the columns of what 05 promised and remembers; none for a model that has no such thing."""
    decided = folder / "decision.json"
    kept = disk.read_json(decided)["promise"] if decided.is_file() else {}
    notes: dict[str, list] = {}  # a class called "novel" keeps its name, and the note has another one
    if kept:
        named = np.array(class_names, dtype=object)[np.argsort(-scores, axis=1, kind="stable")[:, :2]]
        notes["answer"] = np.where(promises.answered(kept, scores), named[:, 0], UNSURE).tolist()
        notes["second"] = named[:, 1].tolist()
        if kept["kind"] == "coverage":
            chosen = promises.sets(kept, scores)
            notes["set"] = ["|".join(class_names[index] for index in np.flatnonzero(row)) for row in chosen]
    if known := novelty.read(folder):
        notes["novel"] = ["yes" if far else "" for far in distances > known.threshold]
    return {f"{column}_" if column in class_names else column: values for column, values in notes.items()}


def _classify_with(folder: str, modified: int, files: list[str]) -> tuple[np.ndarray, np.ndarray, list[str], int]:
    """Classify files on a host, which keeps the model for its next piece."""
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # the host's worker lives on beside what comes next
    return _classify(*_loaded(folder, modified), Path(folder), files)


def _classify(
    model, distance: Callable, folder: Path, files: Sequence[str | Path]
) -> tuple[np.ndarray, np.ndarray, list[str], int]:
    """Return the probabilities of the files that are readable images, how far each is from all that was learned, for
    each file why it is none, or "", and how many of them hold values beyond the range that the model knows.
    """
    about, class_names = disk.read_json(folder / "model.json"), disk.read_json(folder / "class_names.json")
    part_of = crop.cutter(about["crop"]) if "crop" in about else lambda path: None
    levels = deep.Levels(*about["levels"]) if "levels" in about else None
    scores, reasons, beyond = [np.zeros((0, len(class_names)), np.float32)], [], 0
    distances = [np.zeros(0, np.float32)]
    for start in range(0, len(files), BATCH):
        pixels = []
        for path in map(Path, files[start : start + BATCH]):
            try:
                how = {"box": part_of(path), "levels": levels}
                loaded, cut_off = images.load_noted(path, about["image_size"], about["fit"], **how)
                pixels.append(loaded)
                reasons.append("")
                beyond += cut_off > 0
            except images.ImageError as error:
                reasons.append(str(error))
        if pixels:
            scores.append(model.predict_on_batch(np.stack(pixels)))
            distances.append(distance(np.stack(pixels)))
    return np.concatenate(scores), np.concatenate(distances), reasons, beyond


def submission(predictions: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return predictions in the form that a competition asks for, such as the columns id, breed.

    Args:
        predictions: path, predicted, and a column of probabilities for each class.
        columns: the wanted columns in order. The first identifies the image: by its file name without suffix, or as it
            stands when the column is called path. A class name is that class's probability, `*` stands for all of
            them in the model's order, and any other name is the predicted class.

    Raises:
        ValueError: fewer than two columns are asked for.
    """
    if len(columns) < 2:
        raise ValueError(
            f"columns: {list(columns)}; expected the image's column and one more at least, as in id,breed."
        )
    own = ("path", "predicted", "confidence")
    class_names = predictions.attrs.get("class_names") or [name for name in predictions if name not in own]
    identity, *rest = (name for column in columns for name in (class_names if column == "*" else [column]))
    paths = predictions["path"]
    filled = {identity: paths if identity == "path" else [PurePosixPath(path).stem for path in paths]}
    filled |= {name: predictions[name if name in predictions else "predicted"] for name in rest}
    return pd.DataFrame(filled)
