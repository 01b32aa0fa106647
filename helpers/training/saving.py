"""What a training leaves: the history, the best weights, a model that was loaded again and predicts the same.

Also what replaces a training where there is none: the head of another run, or a head with its random weights.
"""

import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from helpers.compute import graphs, hardware, ranks
from helpers.core import disk, project, stages
from helpers.training import compiling

SOLVED = "solver.csv"  # the path of a head that was solved, in the stage's folder
HISTORY_COLUMNS = ("epoch", "phase", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds")
HISTORY_TYPES = dict.fromkeys(HISTORY_COLUMNS, float) | {"epoch": int, "phase": str}


def best_epoch(history: pd.DataFrame, monitor: str) -> pd.Series:
    """Return the row of a history whose `monitor` is best.

    Raises:
        ValueError: it is not a number in any epoch.
    """
    if history[monitor].isna().all():
        raise ValueError(f"There is no epoch whose {monitor} is a number. Take a smaller learning_rate.")
    find = pd.Series.idxmin if compiling.better(monitor) == "min" else pd.Series.idxmax
    return history.loc[find(history[monitor])]


def load_best(model: keras.Model, out: Path, monitor: str = "val_loss", whole: keras.Model | None = None) -> str:
    """Give `model` the weights of its best epoch, also when `fit` was interrupted, and return a sentence about it.

    Args:
        model: what was trained: the suffix above the frozen frontier, or the whole classifier.
        out: the stage's folder.
        monitor: as in `callbacks`.
        whole: the classifier, needed if several steps were trained: the best epoch may be of an earlier one.

    Raises:
        ValueError: the loss was not a number in any epoch.
    """
    history = read_history(out)
    row = best_epoch(history, monitor)
    earlier = sorted(out.glob("backup/after-*.weights.h5"))
    if earlier and row["epoch"] <= int(earlier[-1].name[6:12]):
        bare(whole).load_weights(earlier[-1])
    else:
        model.load_weights(out / "backup" / "best.weights.h5")
    return (
        f"Best of {len(history)} epochs by {monitor}: epoch {row['epoch']:.0f},"
        f" validation accuracy {row['val_accuracy']:.4f}, validation loss {row['val_loss']:.4f}"
    )


def best_after(out: Path, epoch: int) -> Path:
    """Return the file with the best weights of all epochs up to `epoch`, kept until `save` if several thaws train.

    Args:
        out: the stage's folder.
        epoch: the last one of a thaw.
    """
    return out / "backup" / f"after-{epoch:06d}.weights.h5"


def bare(model: keras.Model) -> keras.Model:
    """Return the same layers as a model that was never compiled, so that no optimiser is saved or needed."""
    return keras.Model(model.input, model.output, name=model.name)


def save_weights(model: keras.Model, path: Path) -> None:
    """Write the weights; the file appears whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name("writing.weights.h5")
    with uninterrupted():
        model.save_weights(temporary, overwrite=True)
    os.replace(temporary, path)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay a KeyboardInterrupt until the block ends: a weights file left open could not be written again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


def save(model: keras.Model, out: Path, images: np.ndarray) -> Path:
    """Save the whole model as out/model.keras and check that it predicts the same when loaded.

    It is saved without optimiser and loss, so that plain Keras loads it. If several ranks trained it, each computes
    alone from here on.

    Args:
        model: the classifier.
        out: the stage's folder.
        images: images, (n, H, W, 3), to compare the predictions on; the first two are taken.

    Raises:
        RuntimeError: the loaded model predicts something else.
    """
    path = out / "model.keras"
    ranks.leave(model)
    plain = bare(model)
    for layer in plain._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = False  # only TensorFlow could load it; `hardware.share` sets it
    plain.save(path)
    images = np.asarray(images[:2])  # called directly: to compile both graphs would take longer than all the rest
    models = (plain, hardware.load(path))
    expected, loaded = (keras.ops.convert_to_numpy(each(images, training=False)) for each in models)
    if not np.allclose(expected, loaded, atol=hardware.tolerance()):
        raise RuntimeError(f"{path} does not predict what was trained: off by {np.abs(expected - loaded).max():.2g}.")
    return path


def remove_backup(out: Path) -> None:
    """Remove the backup that a training resumes from, when nothing can fail any more."""
    shutil.rmtree(out / "backup", ignore_errors=True)


def read_history(out: Path) -> pd.DataFrame:
    """Return history.csv: one row an epoch, columns as HISTORY_COLUMNS; epochs count from 1 and continue in phase 2.

    learning_rate is that of the epoch's first step.
    """
    return pd.read_csv(out / "history.csv", float_precision="round_trip", dtype=HISTORY_TYPES)


def read_kept(out: Path) -> pd.DataFrame:
    """Return the row of history.csv that belongs to the stage's model; no row if nothing was trained.

    It is the best epoch by the stage's own `monitor`, which need not be the best by another one.
    """
    history = read_history(out)
    if len(history) < 2:
        return history
    return history[history["epoch"] == best_epoch(history, _monitor(out))["epoch"]]


def _monitor(out: Path) -> str:
    return disk.read_json(out / stages.STAGE_FILE)["parameters"]["monitor"]


def take(model: keras.Model, text: str, *, class_names: Sequence[str], monitor: str) -> str:
    """Give `model` the weights of another run's head stage, and return a sentence about it.

    Args:
        model: a classifier as `classifier.build` builds it.
        text: the name of a run, its folder, or the folder of a head stage.
        class_names: in the model's order.
        monitor: what chose the epoch of that head, if it was trained by epochs.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: it has another backbone, image size or head, other classes, or another `monitor`.
    """
    folder = _head_of(text)
    names = disk.read_json(folder / "class_names.json")
    if names != list(class_names):
        raise ValueError(f"from_run: {text!r} has the classes {', '.join(names)}; here are {', '.join(class_names)}.")
    if len(read_history(folder)) > 1 and _monitor(folder) != monitor:
        raise ValueError(f"from_run: {text!r} chose its epoch by {_monitor(folder)}. Set head.monitor to that.")
    source = keras.models.load_model(folder / "model.keras", compile=False)
    if difference := _difference(model, source):
        raise ValueError(f"from_run: {text!r} has another model, {difference}. Set the parameters of that run.")
    model.set_weights(source.get_weights())
    return f"The head comes from {project.display_path(folder)}; nothing is trained here."


def _head_of(text: str) -> Path:
    return stages.of_run(text, "head", "model.keras", parameter="from_run")


def _difference(model: keras.Model, source: keras.Model) -> str:
    """Return the first difference between two classifiers, in words; "" if there is none."""
    if model.input_shape != source.input_shape:
        return f"its images are {source.input_shape[1]} x {source.input_shape[2]} pixels"
    pairs = zip(model.layers, source.layers, strict=False)
    for layer, source_layer in pairs:
        if layer.name != source_layer.name or graphs.structure(layer) != graphs.structure(source_layer):
            return f"its layer {source_layer.name} is not the {layer.name} of this one"
    counts = len(source.layers), len(model.layers)
    return "" if counts[0] == counts[1] else f"it has {counts[0]} layers, not {counts[1]}"


def untrained(out: Path, text: str = "") -> str:
    """Write the history.csv of a head that was not trained by epochs, and return the sentence that says so.

    Args:
        out: the stage's folder; if it holds the path of a solver, its choice is the one row of the history.
        text: the run whose head and history are taken; "" for a solved head, or one with its random weights.
    """
    if not text and (out / SOLVED).is_file():
        return _solved(out)
    if not text:
        disk.write_text(out / "history.csv", ",".join(HISTORY_COLUMNS) + "\n")
        return "Nothing was trained: the head keeps its random weights."
    folder = _head_of(text)
    shutil.copyfile(folder / "history.csv", out / "history.csv")
    return f"Taken from {text}: {disk.read_json(folder / stages.STAGE_FILE)['headline']}"


def _solved(out: Path) -> str:
    path = pd.read_csv(out / SOLVED)
    chosen, seconds = path[path["chosen"]].iloc[0], path["seconds"].sum()
    row = chosen.drop(["strength", "chosen"]).to_dict() | {"epoch": 1, "phase": "head", "seconds": seconds}
    others = [name for name in row if name not in HISTORY_COLUMNS]
    frame = pd.DataFrame([row]).reindex(columns=[*HISTORY_COLUMNS, *others])
    disk.write_text(out / "history.csv", frame.to_csv(index=False))
    return (
        f"Solved along {len(path)} strengths in {seconds:.1f} s: C = {chosen['strength']:.2g}, validation accuracy"
        f" {chosen['val_accuracy']:.4f}, validation loss {chosen['val_loss']:.4f}"
    )
