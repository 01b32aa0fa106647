"""What `fit` gets: class weights, and the callbacks that record, resume and stop."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from sklearn.utils.class_weight import compute_class_weight

from helpers.compute import hardware
from helpers.core import disk, progress
from helpers.training import compiling, profiling, saving


def class_weights(labels: np.ndarray, imbalance: str = "class_weight") -> dict[int, float] | None:
    """Return scikit-learn's "balanced" weight of each class, n / (classes * n of the class), as `fit` takes them.

    Args:
        labels: (n,) class indices.
        imbalance: what evens out classes of unequal size; None is returned unless it is "class_weight".
    """
    if imbalance != "class_weight":
        return None
    classes = np.unique(labels)
    weights = compute_class_weight("balanced", classes=classes, y=labels)
    return dict(zip(classes.tolist(), weights.tolist(), strict=True))


def verbosity() -> int:
    """Return `fit`'s verbose: a bar when a person runs the notebook; nothing when headless, since `Recorder` prints."""
    return 0 if os.environ.get(progress.PROGRESS_VARIABLE) else 1


def first_epoch(out: Path, default: int = 0) -> int:
    """Return the epoch at which a training in `out` resumes: the last backup after `default`, otherwise `default`."""
    backups = sorted((out / "backup").glob("epoch-*.weights.h5"))
    return max(default, int(backups[-1].name[6:12])) if backups else default


def callbacks(
    out: Path,
    *,
    phase: str,
    images: int,
    begin: int = 0,
    end: int,
    monitor: str = "val_loss",
    patience: int = 0,
    stop_smoothed: dict | None = None,
    optimizer: str | dict = "adam",
    schedule: str | dict = "constant",
    profile_steps: Sequence[int] = (),
) -> list[keras.callbacks.Callback]:
    """Return the callbacks of a phase, in the order in which they must run; after `fit` the model has its best weights.

    Args:
        out: the stage's folder: history.csv and logs/ go there, and backup/ until `save` removes it.
        phase: what history.csv calls it: "head" or "fine_tune".
        images: training images an epoch, for the images/s.
        begin, end: epochs before this phase, and after it: `fit`'s initial_epoch and epochs.
        monitor: the metric that decides which epoch is best, e.g. "val_loss" or "val_accuracy".
        patience: epochs without a better `monitor` before it stops; 0 never stops early.
        stop_smoothed: arguments of `SmoothedStopping` except the monitor; an empty dict never stops.
        optimizer, schedule: as in `compiling`; some need a callback.
        profile_steps: first and last step that the TensorFlow Profiler records.
    """
    file, mode = str(out / "backup" / "best.weights.h5"), compiling.better(monitor)
    best = Best(file, monitor=monitor, mode=mode, save_best_only=True, save_weights_only=True)
    watchers = [keras.callbacks.EarlyStopping(monitor=monitor, mode=mode, patience=patience or end + 1)]
    watchers += [SmoothedStopping(monitor, **stop_smoothed)] if stop_smoothed else []
    watchers += compiling.plateau(schedule, monitor)
    averages = isinstance(optimizer, dict) and optimizer.get("use_ema", False)
    average = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)] if averages else []
    return [
        Recorder(out, phase=phase, images=images, last_epoch=end),
        keras.callbacks.TerminateOnNaN(),
        profiling.tensorboard(out / "logs", profile_steps),
        *average,
        best,
        *watchers,
        Backup(out, begin=begin, best=best, watchers=watchers, average=average),
    ]


class Recorder(keras.callbacks.Callback):
    """Write a row of history.csv, a line of output and a line of progress after each epoch."""

    def __init__(self, out: Path, *, phase: str, images: int, last_epoch: int):
        super().__init__()
        self.file, self.phase, self.images, self.last_epoch = out / "history.csv", phase, images, last_epoch

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.begun = time.monotonic()
        self.rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        seconds = time.monotonic() - self.begun
        about = {"epoch": epoch + 1, "phase": self.phase, "learning_rate": self.rate, "seconds": round(seconds, 3)}
        row = about | (logs or {})
        others = [name for name in row if name not in saving.HISTORY_COLUMNS]
        frame = pd.DataFrame([row]).reindex(columns=[*saving.HISTORY_COLUMNS, *others])
        earlier = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        disk.write_text(self.file, earlier + frame.to_csv(header=not earlier, index=False))
        shown = {name: row[name] for name in ("loss", "accuracy", "val_loss", "val_accuracy") if name in row}
        if not verbosity():
            figures = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            print(f"epoch {epoch + 1:>3} of {self.last_epoch}  {figures}  {self.images / seconds:,.0f} images/s")
        progress.report(epoch + 1, self.last_epoch, unit="epoch", label="", rate=self.images / seconds, **shown)


class Best(keras.callbacks.ModelCheckpoint):
    """ModelCheckpoint of the best weights that loads them into the model when the training ends."""

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        with saving.uninterrupted():
            super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs: dict | None = None) -> None:
        if os.path.isfile(self.filepath):
            with saving.uninterrupted():
                self.model.load_weights(self.filepath)


class SmoothedStopping(keras.callbacks.Callback):
    """Stop when the exponential moving average of a metric has not improved enough for some epochs.

    Args:
        monitor: the metric.
        alpha: share of the newest value in the average (0, 1].
        gain: least improvement that counts, as a share of the best average so far.
        epochs: epochs to wait for it.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, monitor: str, *, alpha: float = 0.3, gain: float = 0.02, epochs: int = 10):
        super().__init__()
        if not 0 < alpha <= 1 or not 0 <= gain < 1 or not (isinstance(epochs, int) and epochs >= 1):
            raise ValueError(
                "stop_smoothed: alpha is a share in (0, 1], gain one in [0, 1), epochs a whole number from 1 on;"
                f" got alpha {alpha!r}, gain {gain!r}, epochs {epochs!r}."
            )
        self.monitor, self.alpha, self.gain, self.epochs = monitor, alpha, gain, epochs
        self.falls = compiling.better(monitor) == "min"

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.average = self.best = None
        self.waited = 0

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        value = (logs or {})[self.monitor]
        self.average = value if self.average is None else self.alpha * value + (1 - self.alpha) * self.average
        if self.best is None or self._is_gain():
            self.best, self.waited = self.average, 0
            return
        self.waited += 1
        if self.waited >= self.epochs:
            self.model.stop_training = True

    def _is_gain(self) -> bool:
        if self.falls:
            return self.average < self.best * (1 - self.gain)
        return self.average > self.best * (1 + self.gain)


class Backup(keras.callbacks.BackupAndRestore):
    """BackupAndRestore with a backup of one file: after a kill, weights and epoch still belong together.

    It also restores what Keras leaves out. It replays history.csv to the other callbacks for their state; the random
    numbers of dropout follow from the number of each epoch. It does not restore the learning rate: that
    is the one that the model was compiled with, minus the reductions of a plateau. So a user can change it.
    """

    def __init__(
        self,
        out: Path,
        *,
        begin: int,
        best: keras.callbacks.ModelCheckpoint,
        watchers: Sequence[keras.callbacks.Callback],
        average: Sequence[keras.callbacks.SwapEMAWeights] = (),
    ):
        super().__init__(str(out / "backup"), delete_checkpoint=False)
        self.out, self.begin, self.best, self.watchers, self.average = out, begin, best, watchers, average

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        for state, seed in self.random_states:
            state.assign([*np.random.SeedSequence([seed, epoch]).generate_state(1), 0])

    def on_train_end(self, logs: dict | None = None) -> None:
        for state, seed in self.random_states:  # so that the next step draws what it would in a new process
            state.assign([seed, 0])

    def on_train_begin(self, logs: dict | None = None) -> None:
        if not self.model.optimizer.built:  # a step that creates variables is traced twice
            with hardware.scope():
                self.model.optimizer.build(self.model.trainable_variables)
        states = [value for value in self.model.variables if value.path.endswith("seed_generator_state")]
        self.random_states = [(state, int(keras.ops.convert_to_numpy(state)[0])) for state in states]
        epoch, history = first_epoch(self.out, self.begin), self.out / "history.csv"
        self.model._initial_epoch = epoch
        rows = saving.read_history(self.out) if history.is_file() else pd.DataFrame({"epoch": []})
        rows = rows[rows["epoch"] <= epoch]
        if rows.empty:
            history.unlink(missing_ok=True)
        else:
            disk.write_text(history, rows.to_csv(index=False))
        if epoch == self.begin:
            Path(self.best.filepath).unlink(missing_ok=True)  # an earlier step's
        else:
            self._restore(epoch, rows[rows["epoch"] > self.begin])

    def _restore(self, epoch: int, rows: pd.DataFrame) -> None:
        optimizer = self.model.optimizer
        for row in rows.to_dict("records"):
            for watcher in self.watchers:
                watcher.on_epoch_end(row["epoch"] - 1, dict(row))
        if self.model.stop_training:  # `fit` would check it only after one more epoch
            self.model._initial_epoch = self.params["epochs"]
        values = rows[self.best.monitor]
        self.best.best = values.min() if compiling.better(self.best.monitor) == "min" else values.max()
        rate = optimizer.learning_rate
        number = float(keras.ops.convert_to_numpy(rate)) if isinstance(rate, keras.Variable) else None
        self.model.load_weights(self._file(epoch))
        if number is not None:
            optimizer.learning_rate = number
        for swap in self.average:
            swap._ema_weights_in_model = True  # as it was at the end of the epoch, when the backup was written

    def _save_model(self) -> None:
        saving.save_weights(self.model, self._file(self._current_epoch))
        for old in self.out.glob("backup/epoch-*.weights.h5"):
            if old != self._file(self._current_epoch):
                old.unlink()

    def _file(self, epoch: int) -> Path:
        return self.out / "backup" / f"epoch-{epoch:06d}.weights.h5"
