"""The proof that a bundle predicts what the Keras model predicts: in a new process, on files, without Thaw."""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.core import words
from helpers.evaluation import comparison, tables
from helpers.export.carried import measure
from helpers.export.formats import FORMATS

ALIKE = 1e-3  # below this spread of probabilities over the images, no comparison can fail
MOST_NAMED = 3  # images in an error
TIMED = 20  # images that time two threads
WITHOUT = ("helpers", "tensorflow", "keras", "torch", "jax")


class ParityError(ValueError):
    """A format that does not predict what the Keras model predicts."""


@dataclass(frozen=True)
class Parity:
    """How far one format is from the Keras model on the same files.

    Attributes:
        format: its name.
        images: how many were classified.
        largest, mean: difference of a probability, in absolute value.
        distance: largest difference of the distance that decides novelty; 0 if the run does not look for it.
        same_answers: share of images with the same most probable class, and as novel as for Keras.
        accuracy, keras_accuracy: shares of correct answers.
        difference: of the two, format minus Keras: value, low, high (95 %, paired bootstrap).
        megabytes: of the files of the network.
        milliseconds, milliseconds_2_threads: median time of one image, without reading it.
        peak_mb: most memory of the process, with Python and the reading of images.
        load_seconds: until it is ready for the first image, with imports.
    """

    format: str
    images: int
    largest: float
    mean: float
    distance: float
    same_answers: float
    accuracy: float
    keras_accuracy: float
    difference: dict[str, float]
    megabytes: float
    milliseconds: float
    milliseconds_2_threads: float
    peak_mb: float
    load_seconds: float


def ask(bundle: Path, kind: str, files: list[Path], threads: int = 1) -> tuple[np.ndarray, dict[str, float]]:
    """Classify files with a bundle in a process that can import neither Thaw nor, for most formats, TensorFlow.

    Returns:
        The outputs of the network, float64 (files, classes [+ 1]), from `Model.raw`, and load_seconds, milliseconds
        and peak_mb of that process.

    Raises:
        ParityError: the process failed; the message holds its last line.
    """
    without = [name for name in WITHOUT if kind != "keras" or name == "helpers"]
    with tempfile.TemporaryDirectory() as place:
        request, answer = Path(place, "request.json"), Path(place, "answer.npy")
        content = {"kind": kind, "threads": threads, "files": [str(file) for file in files], "without": without}
        request.write_text(json.dumps(content), encoding="utf-8")
        command = [sys.executable, "-I", "-B", measure.__file__, str(bundle), str(request), str(answer)]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=place, check=False)
        if ran.returncode:
            last = (ran.stderr.strip().splitlines() or [f"it ended with {ran.returncode}"])[-1]
            raise ParityError(f"{kind}: the bundle fails in a process without Thaw: {words.shorten(last, 300)}")
        return np.load(answer), json.loads(ran.stdout.strip().splitlines()[-1])


def compare(
    bundle: Path, kind: str, files: list[Path], expected: np.ndarray, labels: list[str], class_names: list[str]
) -> tuple[Parity, np.ndarray]:
    """Return how far a format is from the Keras model, and its outputs, (files, classes [+ 1]).

    Args:
        bundle: the folder.
        kind: the format.
        files: images, as users have them.
        expected: outputs of the Keras model for them, (files, classes [+ 1]), from `prediction.asking`.
        labels: their true classes.
        class_names: in the model's order.

    Raises:
        ParityError: the bundle fails, or these images cannot separate a wrong model from a correct one.
    """
    count = len(class_names)
    if np.ptp(expected[:, :count], axis=0).max() < ALIKE:
        raise ParityError(
            f"The model gives all {len(files)} images the same probabilities, so they prove nothing. Train it first."
        )
    outputs, one = ask(bundle, kind, files)
    if wrong := np.flatnonzero(~np.isfinite(outputs).all(axis=1)).tolist():
        raise ParityError(f"{kind} is not written: it answers {files[wrong[0]].name} with values that are not numbers.")
    _, two = ask(bundle, kind, files[:TIMED], threads=2)
    names = [str(file) for file in files]
    chances = expected[:, :count], _whole(outputs[:, :count])
    both = [tables.predictions_table(names, labels, of_one, class_names) for of_one in chances]
    paired = comparison.compare(*both, class_names)
    distance = np.abs(outputs - expected)
    size = sum(path.stat().st_size for path in FORMATS[kind].parts(bundle))
    return Parity(
        format=kind,
        images=len(files),
        largest=float(distance[:, :count].max()),
        mean=float(distance[:, :count].mean()),
        distance=float(distance[:, count:].max(initial=0)),
        same_answers=float(_is_same(outputs, expected, count).mean()),
        accuracy=paired["second"],
        keras_accuracy=paired["first"],
        difference=paired["difference"],
        megabytes=size / 1e6,
        milliseconds=one["milliseconds"],
        milliseconds_2_threads=two["milliseconds"],
        peak_mb=one["peak_mb"],
        load_seconds=one["load_seconds"],
    ), outputs


def judge(
    parity: Parity, outputs: np.ndarray, expected: np.ndarray, files: list[Path], tolerance: float, classes: int
) -> str:
    """Return why a format fails its limits, and on which images; "" if it does not.

    Args:
        parity: as `compare` returns it, with `outputs`.
        outputs, expected: of the format and of Keras, (files, classes [+ 1]).
        files: the images.
        tolerance: of quantised formats: the share of answers that may differ, and the accuracy that may be lost.
        classes: how many there are.
    """
    allowed, distance = FORMATS[parity.format].tolerance, np.abs(outputs - expected).max(axis=1)
    if allowed is not None:
        worst = [row for row in np.argsort(-distance) if not distance[row] <= allowed]
        if not worst:
            return ""
        reason = f"probabilities differ from Keras by up to {parity.largest:.2g}"
        reason += f" and distances by up to {parity.distance:.2g}" if parity.distance else ""
        reason += f", where {allowed:g} is allowed"
    else:
        lost, changed = parity.keras_accuracy - parity.accuracy, 1 - parity.same_answers
        if lost <= tolerance and changed <= tolerance and np.isfinite(outputs).all():
            return ""
        other = ~_is_same(outputs, expected, classes)
        worst = [row for row in np.argsort(-distance) if other[row]]
        reason = (
            f"{words.percent(changed)} of the answers differ from Keras and {words.percent(lost)} of accuracy is lost"
        )
        reason += f", where tolerance allows {words.percent(tolerance)} of each"
    named = ", ".join(f"{files[row].name} ({distance[row]:.2g})" for row in worst[:MOST_NAMED])
    return f"{parity.format} is not written: {reason}. It concerns {len(worst):,} of {len(files):,} images: {named}."


def table(parities: list[Parity]) -> pd.DataFrame:
    """Return the certificate as a table for people, a row a format."""
    rows = {
        one.format: {
            "largest difference": f"{one.largest:.2g}",
            "mean": f"{one.mean:.2g}",
            **({"distance": f"{one.distance:.2g}"} if any(each.distance for each in parities) else {}),
            "same answers": words.percent(one.same_answers),
            "accuracy minus Keras": "{value:+.3f} ({low:+.3f} to {high:+.3f})".format(**one.difference),
            "MB": f"{one.megabytes:.1f}",
            "ms an image": f"{one.milliseconds:.1f}",
            "2 threads": f"{one.milliseconds_2_threads:.1f}",
            "peak MB": f"{one.peak_mb:.0f}",
            "start, s": f"{one.load_seconds:.2f}",
        }
        for one in parities
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def as_json(parities: list[Parity]) -> list[dict[str, Any]]:
    """Return the certificate in the form of certificate.json."""
    return [asdict(one) for one in parities]


def _is_same(outputs: np.ndarray, expected: np.ndarray, classes: int) -> np.ndarray:
    """Return which images have the same most probable class and, with novelty, are equally novel, bool (files,)."""
    top, novel = (outputs[:, :classes].argmax(axis=1), outputs[:, classes:] > 0)
    is_top = top == expected[:, :classes].argmax(axis=1)
    return is_top & (novel == (expected[:, classes:] > 0)).all(axis=1)


def _whole(chances: np.ndarray) -> np.ndarray:
    """Return rows that add up to 1 exactly enough for a table: 8-bit outputs do not."""
    return chances / np.maximum(chances.sum(axis=1, keepdims=True), 1e-9)
