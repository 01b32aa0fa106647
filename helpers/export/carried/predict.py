"""Classify images with the model of this folder. It needs only this folder and its requirements.txt.

python predict.py photo.jpg folder/ --csv answers.csv
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from helpers.data import images
from helpers.data.formats import listing
from helpers.data.formats.deep import Levels
from helpers.evaluation.trust import distances
from helpers.export.carried import networks

FOLDER = Path(__file__).resolve().parent
UNSURE = "unsure"
DECISIVE = ("model.json", "classes.json", "preprocessing.json", "decision.json", distances.FILE)  # they decide a row


class Model:
    """The model of a bundle, ready to classify; each thread needs its own.

    Attributes:
        name: of the run that it comes from.
        version: the beginning of the sha256 of the network's file.
        file: of the network, within the folder.
        classes: names in the order of the probabilities.
        how: preprocessing.json.
        novelty: finds images of none of the classes; None if the run remembers no images.
    """

    def __init__(self, folder: str | os.PathLike = FOLDER, kind: str = "", threads: int = 1) -> None:
        """Load the network.

        Args:
            folder: the bundle.
            kind: one of its formats; "" for the first.
            threads: of one prediction.

        Raises:
            ValueError: the bundle does not hold this format.
        """
        folder = Path(folder)
        about, self.classes = _read(folder / "model.json"), _read(folder / "classes.json")
        self.how = _read(folder / "preprocessing.json")
        self.decision = _read(folder / "decision.json") if (folder / "decision.json").is_file() else {}
        kind = kind or next(iter(about["formats"]))
        if kind not in about["formats"]:
            raise ValueError(f"This bundle has no format {kind!r}; it has {', '.join(about['formats'])}.")
        self.name, self.version = about["name"], about["formats"][kind]["version"]
        self.file = about["formats"][kind]["file"]
        self.network = networks.load(folder / self.file, threads)
        self.novelty = distances.read(folder)
        self.levels = Levels(*self.how["levels"]) if self.how["levels"] else None

    def caution(self) -> str:
        """Return a caution about every answer; "" if there is none."""
        boxes = self.how.get("boxes")
        return f"The model learned on images cut to the boxes of {boxes}; these are taken whole." if boxes else ""

    def pixels(self, data: bytes, max_pixels: int | None = None) -> np.ndarray:
        """Return the content of an image file as input of the network: uint8 RGB, (size, size, 3).

        Args:
            data: of any format that `images.FORMATS` names.
            max_pixels: refuse a larger image; None for the bundle's own limit.

        Raises:
            images.ImageError: it cannot be read.
        """
        size, fit = self.how["image_size"], self.how["fit"]
        image = images.open_image(data, max_pixels=max_pixels or self.how["max_pixels"])
        enough = images._inner_size(image.size, size, fit)
        return images.resize(images.decode(image, at_least=enough, levels=self.levels), size, fit)

    def raw(self, pixels: np.ndarray) -> np.ndarray:
        """Return the outputs of the network for one image: its probabilities and, if there is `novelty`, by how much
        the image is farther than the threshold of novelty; float64 (classes,) or (classes + 1,).
        """
        chances, *features = self.network(pixels[None].astype(np.float32))
        beyond = self.novelty.beyond(features[0]) if self.novelty else []
        return np.concatenate([np.asarray(chances, np.float64)[0], beyond])

    def answer(self, pixels: np.ndarray) -> dict[str, Any]:
        """Return the answer of the model for one image.

        Returns:
            `predicted`: a class, or "unsure" if the model cannot keep its promise; `confidence`: of the most probable
            class; `probabilities`: by class; `candidates`: if the promise is coverage, the most probable class and
            every other one that is probable enough; `novel`: with `novelty`, whether it looks like none of the classes.
        """
        raw, promise = self.raw(pixels), self.decision.get("promise") or {}
        chances = raw[: len(self.classes)]
        top = int(chances.argmax())
        answer = {"predicted": self.classes[top], "confidence": float(chances[top])}
        answer["probabilities"] = dict(zip(self.classes, map(float, chances), strict=True))
        answer |= {"novel": bool(raw[-1] > 0)} if self.novelty else {}
        if promise.get("kind") == "coverage":
            answer["candidates"] = [
                name for name, p in answer["probabilities"].items() if p >= min(promise["level"], chances[top])
            ]
            return answer | ({} if len(answer["candidates"]) == 1 else {"predicted": UNSURE})
        if thresholds := promise.get("thresholds"):
            least = thresholds[top]
            return answer | ({} if least is not None and chances[top] >= least else {"predicted": UNSURE})
        return answer


def rows(model: Model, files: Iterable[str | os.PathLike]) -> Iterator[list[str]]:
    """Yield a row for each image, with the columns of `header`; of an unreadable one, only its path and the reason."""
    for path in files:
        try:
            answer = model.answer(model.pixels(images.read_bytes(path)))
        except images.ImageError as error:
            yield [str(path), "", "", str(error), *[""] * (len(header(model)) - 4)]
        else:
            novel = ["yes" if answer["novel"] else ""] if model.novelty else []
            chances = [f"{chance:.9g}" for chance in answer["probabilities"].values()]
            yield [str(path), answer["predicted"], f"{answer['confidence']:.9g}", "", *novel, *chances]


def header(model: Model) -> list[str]:
    """Return the columns: path, predicted, confidence, not_read, novel if the model has novelty, and each class."""
    own = ["not_read", "novel"] if model.novelty else ["not_read"]
    return ["path", "predicted", "confidence", *(f"{name}_" if name in model.classes else name for name in own),
            *model.classes]  # fmt: skip


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def main() -> int:
    """Write a CSV, one line an image; the exit code is 1 if an image could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="image files, or folders that are searched for images")
    parser.add_argument("--csv", help="the file to write; standard output by default")
    parser.add_argument("--format", default="", help="one of the bundle's formats; the first by default")
    parser.add_argument("--threads", type=int, default=1)
    arguments, unread = parser.parse_args(), 0
    model = Model(kind=arguments.format, threads=arguments.threads)
    if caution := model.caution():
        print(caution, file=sys.stderr)
    with open(arguments.csv, "w", newline="", encoding="utf-8") if arguments.csv else sys.stdout as stream:
        writer = csv.writer(stream)
        writer.writerow(header(model))
        for row in rows(model, listing.find(arguments.images)):
            writer.writerow(row)
            unread += bool(row[3])
    return int(unread > 0)


if __name__ == "__main__":
    sys.exit(main())
