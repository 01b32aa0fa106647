"""Classify images with the model of a run, read exactly like its training images."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import chain, islice, pairwise
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from joblib import cpu_count

from helpers.core import disk, notebooks, parallel, project
from helpers.data import crop, images
from helpers.data.formats import deep, listing
from helpers.evaluation import tables
from helpers.evaluation.trust import distances, novelty, promises

BATCH = 32
UNSURE = "unsure"
FIRST = ("path", "predicted", "confidence")  # columns of a row
NOTES = {
    "answer": "the predicted class, or unsure where the promise of 05 cannot be kept",
    "second": "the second most probable class",
    "set": "the classes that keep a promise of coverage",
    "novel": "yes if the image looks like none of the classes",
}
DECISIVE = ("model.keras", "model.json", "class_names.json", "decision.json", distances.FILE)  # files that decide a row
PIECE = 16 * BATCH  # images that a host gets at a time; whole batches, so that hosts change no digit


def model_folder(run: str | Path) -> Path:
    """Return the folder of the run's model: the one that 05_evaluate tested, otherwise the last one trained.

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
        mirror: "none" (the model itself), "horizontal", "vertical", "both", all four mirror images, or
            "dihedral", all eight flips and quarter turns.

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
    """Return the probabilities of a model for the images of a resized folder, (images, classes) float32, in order.

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


def load(folder: Path):
    """Return the network of a run: images -> probabilities, and the features of novelty if 05 remembers images.

    Args:
        folder: as `model_folder` returns it.

    Returns:
        keras.Model with one output (batch, classes), or with two.
    """
    from helpers.compute import hardware  # takes seconds, which a wrong path should not cost

    model = hardware.load(folder / "model.keras")
    return novelty.with_features(model) if (folder / distances.FILE).is_file() else model


def asking(model, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from images to the outputs of a run's network, in one pass and as fast as in 05.

    Args:
        model: as `load` returns it.
        folder: of the model.

    Returns:
        A function, images (n, H, W, 3) -> probabilities (n, classes). If 05 remembers images, one more column holds
        by how much each image is farther than the threshold of novelty.
    """
    from helpers.compute import inference

    remembered = distances.read(folder)
    if remembered is None:
        return inference.fast(model)
    run, count = novelty.asking(model)

    def ask(pixels: np.ndarray) -> np.ndarray:
        outputs = run(pixels)
        return np.column_stack([outputs[:, :count], remembered.beyond(outputs[:, count:])])

    return ask


class Classifier:
    """The model of a run, for any number of files with the memory of a few.

    Attributes:
        class_names: in the model's order.
        header: the columns of a row: path, predicted, confidence, not_read (why a file is no readable image), the
            notes that the run can make (`NOTES`), and the probability of each class.
        version: changes when the model does, or its notes.
    """

    def __init__(self, run: str | Path, hosts: str = "") -> None:
        """Find the model; it is loaded when the first files are found.

        Args:
            run: the folder of a run, or of one of its training stages.
            hosts: address of a Dask scheduler whose hosts share the work; they must see the run and the images under
                the same paths.

        Raises:
            FileNotFoundError: the run or its model does not exist.
        """
        self.folder, self.hosts = model_folder(run).resolve(), hosts
        self.class_names = disk.read_json(self.folder / "class_names.json")
        self.version = disk.version_of(self.folder / name for name in DECISIVE)
        self._about, decided = disk.read_json(self.folder / "model.json"), self.folder / "decision.json"
        self._promise = disk.read_json(decided)["promise"] if decided.is_file() else {}
        self._notes = ["answer", "second"] if self._promise else []
        self._notes += ["set"] if self._promise.get("kind") == "coverage" else []
        self._notes += ["novel"] if (self.folder / distances.FILE).is_file() else []
        own = [f"{name}_" if name in self.class_names else name for name in ("not_read", *self._notes)]
        self.header = [*FIRST, *own, *self.class_names]
        self._read = self._beyond = 0

    def rows(self, files: Iterable[str | Path], reads: Iterable[str | Path] = ()) -> Iterator[list]:
        """Yield a row for each file, in order; if it cannot be read, all except its path and the reason is "".

        Args:
            files: images.
            reads: files and folders that every host must see.

        Raises:
            parallel.HostError: the hosts cannot do it.
        """
        for paths, outputs, reasons, beyond in self._pieces(files, reads):
            self._read, self._beyond = self._read + len(outputs), self._beyond + beyond
            answers = zip(*self._columns(outputs), strict=True) if len(outputs) else iter(())
            for path, reason in zip(paths, reasons, strict=True):
                unread = ["", "", reason, *[""] * (len(self.header) - len(FIRST) - 1)]
                yield [str(path), *(unread if reason else next(answers))]

    def caution(self) -> str:
        """Return cautions about the rows so far; "" if there are none."""
        cautions = []
        if boxes := self._about.get("crop", {}).get("boxes"):
            cautions.append(f"The model learned on images cut to the boxes of {boxes}; these are taken whole.")
        if self._beyond:
            black, white = self._about["levels"]
            cautions.append(
                f"{self._beyond:,} of {self._read:,} images have values beyond {black:g} to {white:g}, the range that"
                " the model learned on; these values are cut off."
            )
        return "\n".join(cautions)

    def _pieces(self, files: Iterable[str | Path], reads: Iterable[str | Path]) -> Iterator[tuple]:
        if not self.hosts:
            return _classify(self.folder, self.version, files)
        work = partial(_classify_with, self.folder, self.version, os.getcwd())
        seen = [self.folder / "model.keras", *map(os.path.abspath, reads)]
        pieces = _batched(map(str, files), PIECE)
        return chain.from_iterable(parallel.spread(work, pieces, address=self.hosts, reads=seen))

    def _columns(self, outputs: np.ndarray) -> list[list]:
        """Return the columns from `predicted` on, of the readable images."""
        names, count = np.array(self.class_names, dtype=object), len(self.class_names)
        chances = outputs[:, :count]
        order = np.argsort(-chances, axis=1, kind="stable")
        first, rows = names[order[:, 0]], [chances.max(axis=1).tolist(), [""] * len(outputs)]
        if self._promise:
            answers = np.where(promises.answered(self._promise, chances), first, UNSURE)
            rows += [answers.tolist(), names[order[:, 1]].tolist()]
        if "set" in self._notes:
            rows.append(["|".join(names[row]) for row in promises.sets(self._promise, chances)])
        if "novel" in self._notes:
            rows.append(["yes" if beyond else "" for beyond in outputs[:, count] > 0])
        return [first.tolist(), *rows, *chances.T.tolist()]


def predict(run: str | Path, paths: Iterable[str | Path], hosts: str = "") -> tuple[pd.DataFrame, dict[str, str]]:
    """Classify image files and folders of images into one table; `Classifier` takes more of them than fit in memory.

    Args:
        run, hosts: as for `Classifier`.
        paths: image files and folders.

    Returns:
        A table with the columns path, predicted, confidence, the notes that the run can make (`NOTES`), and one
        probability per class; and a mapping of each file that is not a readable image to the reason. `attrs["caution"]`
        of the table holds cautions about it.

    Raises:
        FileNotFoundError: the run, its model, or a path does not exist.
        parallel.HostError: the hosts cannot do it.
    """
    model, paths = Classifier(run, hosts), list(paths)
    table = pd.DataFrame(model.rows(listing.find(paths), paths), columns=model.header)
    reasons = table.pop(model.header[len(FIRST)])
    unreadable = dict(zip(table["path"][reasons != ""], reasons[reasons != ""], strict=True))
    table = table[reasons == ""].reset_index(drop=True).astype(dict.fromkeys(["confidence", *model.class_names], float))
    table.attrs["class_names"] = model.class_names
    if caution := model.caution():
        table.attrs["caution"] = caution
    return table, unreadable


@lru_cache(maxsize=1)
def _loaded(folder: Path, version: str) -> Callable[[np.ndarray], np.ndarray]:
    return asking(load(folder), folder)


def _classify_with(folder: Path, version: str, place: str, files: list[str]) -> list[tuple]:
    """Classify files, whose paths are relative to `place`, on a host, which keeps the model for its next piece."""
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # the host's worker shares the GPU with later work
    return list(_classify(folder, version, files, place))


def _classify(
    folder: Path, version: str, files: Iterable[str | Path], place: str = ""
) -> Iterator[tuple[list, np.ndarray, list[str], int]]:
    """Yield for some files at a time: their paths; the outputs of `asking` for the readable images; why each file
    is unreadable, or ""; how many hold values beyond the learned range.
    """
    read = _reader(folder, place)
    with ThreadPoolExecutor(cpu_count()) as pool:
        reading = ((batch, pool.map(read, batch)) for batch in _batched(files, BATCH))
        for (batch, loaded), _ in pairwise(chain(reading, [None])):  # meanwhile the next batch is read
            results = list(loaded)
            pixels = [one for one, _, _ in results if one is not None]
            outputs = _loaded(folder, version)(np.stack(pixels)) if pixels else np.zeros((0, 0))
            yield batch, outputs, [reason for _, reason, _ in results], sum(beyond for *_, beyond in results)


def _reader(folder: Path, place: str) -> Callable[[str | Path], tuple[np.ndarray | None, str, bool]]:
    """Return a function from a file to its pixels or None, why it is unreadable, or "", and whether it
    holds values beyond the range that the model knows.
    """
    about = disk.read_json(folder / "model.json")
    part_of = crop.cutter(about["crop"]) if "crop" in about else lambda path: None
    levels = deep.Levels(*about["levels"]) if "levels" in about else None

    def read(file: str | Path) -> tuple[np.ndarray | None, str, bool]:
        path = Path(place, file)
        try:
            how = {"box": part_of(path), "levels": levels}
            pixels, cut_off = images.load_noted(path, about["image_size"], about["fit"], **how)
        except images.ImageError as error:
            return None, str(error), False
        return pixels, "", cut_off > 0

    return read


def _batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    return iter(lambda: list(islice(items, size)), [])


def submission(predictions: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return predictions in the form that a competition requires, such as the columns id, breed.

    Args:
        predictions: path, predicted, and a column of probabilities for each class.
        columns: the columns in order. The first identifies the image: by its file name without suffix, or by its path
            if the column is called path. A class name is that class's probability, `*` means all of
            them in the model's order, and any other name is the predicted class.

    Raises:
        ValueError: there are fewer than two columns.
    """
    if len(columns) < 2:
        raise ValueError(
            f"columns: {list(columns)}; expected the image's column and at least one more, as in id,breed."
        )
    own = ("path", "predicted", "confidence")
    class_names = predictions.attrs.get("class_names") or [name for name in predictions if name not in own]
    identity, *rest = (name for column in columns for name in (class_names if column == "*" else [column]))
    paths = predictions["path"]
    filled = {identity: paths if identity == "path" else [PurePosixPath(path).stem for path in paths]}
    filled |= {name: predictions[name if name in predictions else "predicted"] for name in rest}
    return pd.DataFrame(filled)
