"""A head that is not trained here: taken from another run, or left as it was drawn."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.core import disk, project, stages

if TYPE_CHECKING:
    import keras

HEADER = "epoch,phase,loss,accuracy,val_loss,val_accuracy,learning_rate,seconds\n"


def find(text: str) -> Path:
    """Return the folder of the finished head stage that `text` names.

    Args:
        text: the name of a run, its folder, or the folder of a head stage.

    Raises:
        FileNotFoundError: there is none.
    """
    shelf = project.resolve(os.environ.get("THAW_RUNS", "runs"))
    places = [project.resolve(text), project.resolve(text) / "head", shelf / text / "head"]
    for place in places:
        if (place / "model.keras").is_file() and stages.status(place) == "done":
            return place.resolve()
    known = ", ".join(sorted(path.parent.name for path in shelf.glob("*/head") if path.is_dir())) or "none yet"
    raise FileNotFoundError(
        f"from_run: {text!r} is neither a run with a finished head nor such a head's folder. Runs with one: {known}."
    )


def take(model: "keras.Model", text: str, *, class_names: Sequence[str]) -> str:
    """Give `model` the weights of another run's head stage, and say so.

    Args:
        model: a classifier as `classifier.build` builds it.
        text: as in `find`.
        class_names: in the model's order.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: it has another backbone, image size or head, or other classes.
    """
    import keras

    folder = find(text)
    names = disk.read_json(folder / "class_names.json")
    if names != list(class_names):
        raise ValueError(f"from_run: {text!r} knows the classes {', '.join(names)}; here are {', '.join(class_names)}.")
    giver = keras.models.load_model(folder / "model.keras", compile=False)
    if difference := _difference(model, giver):
        raise ValueError(f"from_run: {text!r} has another model, {difference}. Set the parameters of that run.")
    model.set_weights(giver.get_weights())
    return f"The head comes from {project.display_path(folder)}; nothing is trained here."


def _difference(model: "keras.Model", giver: "keras.Model") -> str:
    """Name the first layer in which two classifiers differ, here and there."""
    from helpers.compute import graphs

    if model.input_shape != giver.input_shape:
        return f"its images are {giver.input_shape[1]} x {giver.input_shape[2]} pixels"
    pairs = zip(model.layers, giver.layers, strict=False)
    for one, other in pairs:
        if one.name != other.name or graphs.structure(one) != graphs.structure(other):
            return f"its layer {other.name} is not the {one.name} of this one"
    counts = len(giver.layers), len(model.layers)
    return "" if counts[0] == counts[1] else f"it has {counts[0]} layers, not {counts[1]}"


def untrained(out: Path, text: str = "") -> str:
    """Write the history.csv of a head that was not trained, and return the sentence that says so.

    Args:
        out: the stage's folder.
        text: the run whose head was taken, and now its history; "" for a head that is as it was drawn.
    """
    if not text:
        disk.write_text(out / "history.csv", HEADER)
        return "Nothing was trained: the head is as it was drawn."
    folder = find(text)
    shutil.copyfile(folder / "history.csv", out / "history.csv")
    return f"Taken from {text}: {disk.read_json(folder / stages.STAGE_FILE)['headline']}"
