"""What `compile` and `fit` are given: optimisers, class weights, and the callbacks that record, resume and stop."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
from sklearn.utils.class_weight import compute_class_weight

from helpers import runs

OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    "adamw": keras.optimizers.AdamW,
    "sgd": keras.optimizers.SGD,
    "rmsprop": keras.optimizers.RMSprop,
}
HISTORY_COLUMNS = ("epoch", "phase", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds")


def optimizer(name: str, learning_rate: Any, **settings: Any) -> keras.optimizers.Optimizer:
    """Return the Keras optimiser `name`; "sgd" has momentum 0.9.

    Args:
        name: a key of OPTIMIZERS.
        learning_rate: a number or a keras.optimizers.schedules.LearningRateSchedule.
        settings: further arguments of the Keras class.
    """
    if name == "sgd":
        settings = {"momentum": 0.9} | settings
    return OPTIMIZERS[name](learning_rate=learning_rate, **settings)


def schedule(name: str, learning_rate: float, *, steps: int, warmup_steps: int = 0) -> Any:
    """Return a learning rate for `steps` steps: "constant", or "cosine" falling to a hundredth of the start."""
    if name == "constant":
        return learning_rate
    start = learning_rate / 100 if warmup_steps else learning_rate
    return keras.optimizers.schedules.CosineDecay(
        start,
        decay_steps=max(steps - warmup_steps, 1),
        alpha=0.01,
        warmup_target=learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )


def class_weights(labels: np.ndarray) -> dict[int, float]:
    """Return scikit-learn's "balanced" weight of each class, n / (classes * n of the class), as `fit` takes them."""
    classes = np.unique(labels)
    weights = compute_class_weight("balanced", classes=classes, y=labels)
    return dict(zip(classes.tolist(), weights.tolist(), strict=True))


def verbosity() -> int:
    """Return `fit`'s verbose: a bar when a person runs the notebook; headless nothing, since `Recorder` prints."""
    return 0 if os.environ.get(runs.PROGRESS_VARIABLE) else 1


def first_epoch(out: Path, default: int = 0) -> int:
    """Return the epoch at which a training in `out` goes on: the last one backed up, else `default`."""
    backups = sorted((out / "backup").glob("epoch-*.weights.h5"))
    return int(backups[-1].name[6:12]) if backups else default


def callbacks(
    out: Path, *, phase: str, images: int, last_epoch: int, monitor: str = "val_loss", patience: int = 0
) -> list[keras.callbacks.Callback]:
    """Return the callbacks of a phase, in the order in which they must run.

    Args:
        out: the stage's folder: history.csv and logs/ go there, and backup/ until `finish` removes it.
        phase: "head" or "fine_tune".
        images: training images an epoch, for the images/s.
        last_epoch: the epoch count at which this phase ends.
        monitor: the metric that decides which epoch is best, "val_loss" or "val_accuracy".
        patience: stop after so many epochs without a better `monitor`; 0 never stops early.
    """
    file, mode = str(out / "backup" / "best.weights.h5"), "min" if monitor.endswith("loss") else "max"
    best = keras.callbacks.ModelCheckpoint(
        file, monitor=monitor, mode=mode, save_best_only=True, save_weights_only=True
    )
    stopping = keras.callbacks.EarlyStopping(monitor=monitor, mode=mode, patience=patience or last_epoch + 1)
    return [
        Recorder(out, phase=phase, images=images, last_epoch=last_epoch),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.TensorBoard(str(out / "logs"), write_graph=True),
        best,
        stopping,
        Backup(out, best=best, stopping=stopping),
    ]


def load_best(model: keras.Model, out: Path, monitor: str = "val_loss") -> str:
    """Give the trained `model` the weights of its best epoch and return a sentence about it.

    Raises:
        ValueError: the loss was not a number in any epoch.
    """
    file, history = out / "backup" / "best.weights.h5", read_history(out)
    if history[monitor].isna().all():
        raise ValueError(f"There is no epoch whose {monitor} is a number. Take a smaller learning_rate.")
    model.load_weights(file)
    row = history.loc[history[monitor].idxmin() if monitor.endswith("loss") else history[monitor].idxmax()]
    return (
        f"Best of {len(history)} epochs by {monitor}: epoch {row['epoch']:.0f},"
        f" validation accuracy {row['val_accuracy']:.4f}, validation loss {row['val_loss']:.4f}"
    )


def save(model: keras.Model, out: Path, images: np.ndarray) -> Path:
    """Save the whole model as out/model.keras, prove that it predicts the same when loaded, and remove the backup.

    Args:
        model: the classifier.
        out: the stage's folder.
        images: a few images, (n, H, W, 3), to compare the predictions on.

    Raises:
        RuntimeError: the loaded model predicts something else.
    """
    path = out / "model.keras"
    model.save(path)
    expected, found = (m.predict_on_batch(images) for m in (model, keras.models.load_model(path)))
    if not np.allclose(expected, found, atol=1e-5):
        raise RuntimeError(f"{path} does not predict what was trained: off by {np.abs(expected - found).max():.2g}.")
    shutil.rmtree(out / "backup", ignore_errors=True)
    return path


def read_history(out: Path) -> pd.DataFrame:
    """Return history.csv: one row an epoch, columns as HISTORY_COLUMNS; epochs count from 1 and go on in phase 2."""
    return pd.read_csv(out / "history.csv", float_precision="round_trip")


class Recorder(keras.callbacks.Callback):
    """Writes a row of history.csv, a line of output and a line of progress after each epoch."""

    def __init__(self, out: Path, *, phase: str, images: int, last_epoch: int):
        super().__init__()
        self.file, self.phase, self.images, self.last_epoch = out / "history.csv", phase, images, last_epoch

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.begun = time.time()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        seconds = time.time() - self.begun
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        row = {"epoch": epoch + 1, "phase": self.phase, "learning_rate": rate, "seconds": round(seconds, 3)} | (
            logs or {}
        )
        frame = pd.DataFrame([row]).reindex(columns=HISTORY_COLUMNS)
        frame.to_csv(self.file, mode="a", header=not self.file.exists(), index=False)
        shown = {name: row[name] for name in ("loss", "accuracy", "val_loss", "val_accuracy") if name in row}
        if not verbosity():
            figures = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            print(f"epoch {epoch + 1:>3} of {self.last_epoch}  {figures}  {self.images / seconds:,.0f} images/s")
        runs.report_progress(epoch + 1, self.last_epoch, unit="epoch", label="", rate=self.images / seconds, **shown)


class Backup(keras.callbacks.BackupAndRestore):
    """BackupAndRestore with a backup of one file: no kill can leave weights and an epoch that do not belong together.

    It also brings back what Keras leaves out: the best value and the waiting count of the other callbacks, by replaying
    history.csv to them, and the random numbers of dropout, by letting each epoch's follow from its number.
    """

    def __init__(self, out: Path, *, best: keras.callbacks.ModelCheckpoint, stopping: keras.callbacks.EarlyStopping):
        super().__init__(str(out / "backup"), delete_checkpoint=False)
        self.out, self.best, self.stopping = out, best, stopping

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        for state, seed in self.random_states:
            state.assign([*np.random.SeedSequence([seed, epoch]).generate_state(1), 0])

    def on_train_begin(self, logs: dict | None = None) -> None:
        states = [value for value in self.model.variables if value.path.endswith("seed_generator_state")]
        self.random_states = [(state, int(keras.ops.convert_to_numpy(state)[0])) for state in states]
        epoch, history = first_epoch(self.out), self.out / "history.csv"
        if not epoch:
            history.unlink(missing_ok=True)
            return
        rows = read_history(self.out)
        rows = rows[rows["epoch"] <= epoch]
        runs.write_text(history, rows.to_csv(index=False))
        self.model.optimizer.build(self.model.trainable_variables)
        self.model.load_weights(self._file(epoch))
        self.model._initial_epoch = epoch
        for row in rows.to_dict("records"):
            self.stopping.on_epoch_end(row["epoch"] - 1, row)
        if self.model.stop_training:  # `fit` would ask only after one more epoch
            self.model._initial_epoch = self.params["epochs"]
        values = rows[self.best.monitor]
        self.best.best = values.min() if self.best.monitor.endswith("loss") else values.max()

    def _save_model(self) -> None:
        self.out.joinpath("backup").mkdir(exist_ok=True)
        temporary = self.out / "backup" / "writing.weights.h5"
        self.model.save_weights(temporary, overwrite=True)
        os.replace(temporary, self._file(self._current_epoch))
        for old in self.out.glob("backup/epoch-*.weights.h5"):
            if old != self._file(self._current_epoch):
                old.unlink()

    def _file(self, epoch: int) -> Path:
        return self.out / "backup" / f"epoch-{epoch:06d}.weights.h5"
