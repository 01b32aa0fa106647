"""What a training leaves: the history, the best weights, a model that was loaded again and predicts the same."""

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

from helpers.compute import hardware, ranks
from helpers.training import compiling, thaws

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
    """Give the trained `model` the weights of its best epoch, also when `fit` was interrupted, and say which it was.

    Args:
        model: what was trained: the suffix above the frozen frontier, or the whole classifier.
        out: the stage's folder.
        monitor: as in `callbacks`.
        whole: the classifier, needed where several steps were trained: the best epoch may be of an earlier one.

    Raises:
        ValueError: the loss was not a number in any epoch.
    """
    history = read_history(out)
    row = best_epoch(history, monitor)
    earlier = sorted(out.glob("backup/after-*.weights.h5"))
    if earlier and row["epoch"] <= int(earlier[-1].name[6:12]):
        _bare(whole).load_weights(earlier[-1])
    else:
        model.load_weights(out / "backup" / "best.weights.h5")
    return (
        f"Best of {len(history)} epochs by {monitor}: epoch {row['epoch']:.0f},"
        f" validation accuracy {row['val_accuracy']:.4f}, validation loss {row['val_loss']:.4f}"
    )


def remaining(
    plan: Sequence[thaws.Step], model: keras.Model, out: Path, monitor: str = "val_loss"
) -> Iterator[thaws.Step]:
    """Yield the steps of a plan that are still to be trained, each when `model` has the best weights of all before it.

    Args:
        plan: from `thaws.plan`.
        model: the classifier.
        out: the stage's folder, where the weights after each of several steps are kept until `save`.
        monitor: what decides which epoch is best.
    """
    for step in plan:
        before, after = (out / "backup" / f"after-{epoch:06d}.weights.h5" for epoch in (step.begin, step.end))
        if not after.is_file():
            yield step
            if step is plan[-1]:
                return
            if best_epoch(read_history(out), monitor)["epoch"] <= step.begin:
                _bare(model).load_weights(before)
            save_weights(_bare(model), after)
        _bare(model).load_weights(after)


def _bare(model: keras.Model) -> keras.Model:
    """Return the same layers as a model that was never compiled, so that no optimiser is saved or asked for."""
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
    """Put a KeyboardInterrupt off until the block ends: a weights file left open could not be written again."""
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
    """Save the whole model as out/model.keras, prove that it predicts the same when loaded, and remove the backup.

    It is saved without optimiser and loss, so that plain Keras loads it. Where several ranks trained it, each computes
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
    bare = _bare(model)
    for layer in bare._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = False  # only TensorFlow could load it; `hardware.share` sets it
    bare.save(path)
    images = np.asarray(images[:2])  # called as they are: to compile both graphs would take longer than all the rest
    models = (bare, hardware.load(path))
    expected, found = (keras.ops.convert_to_numpy(each(images, training=False)) for each in models)
    if not np.allclose(expected, found, atol=hardware.tolerance()):
        raise RuntimeError(f"{path} does not predict what was trained: off by {np.abs(expected - found).max():.2g}.")
    shutil.rmtree(out / "backup", ignore_errors=True)
    return path


def read_history(out: Path) -> pd.DataFrame:
    """Return history.csv: one row an epoch, columns as HISTORY_COLUMNS; epochs count from 1 and go on in phase 2.

    learning_rate is that of the epoch's first step.
    """
    return pd.read_csv(out / "history.csv", float_precision="round_trip", dtype=HISTORY_TYPES)
