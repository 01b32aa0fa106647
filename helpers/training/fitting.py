"""What `fit` is given: class weights, and the callbacks that record, resume and stop; and what it leaves."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
import pandas as pd
from sklearn.utils.class_weight import compute_class_weight

from helpers.compute import hardware, ranks
from helpers.core import runs
from helpers.training import compiling, profiling, thaws

HISTORY_COLUMNS = ("epoch", "phase", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds")
HISTORY_TYPES = dict.fromkeys(HISTORY_COLUMNS, float) | {"epoch": int, "phase": str}


def class_weights(labels: np.ndarray) -> dict[int, float]:
    """Return scikit-learn's "balanced" weight of each class, n / (classes * n of the class), as `fit` takes them."""
    classes = np.unique(labels)
    weights = compute_class_weight("balanced", classes=classes, y=labels)
    return dict(zip(classes.tolist(), weights.tolist(), strict=True))


def verbosity() -> int:
    """Return `fit`'s verbose: a bar when a person runs the notebook; headless nothing, since `Recorder` prints."""
    return 0 if os.environ.get(runs.PROGRESS_VARIABLE) else 1


def first_epoch(out: Path, default: int = 0) -> int:
    """Return the epoch at which a training in `out` goes on: the last one backed up after `default`, else `default`."""
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
    """Return the callbacks of a phase, in the order in which they must run; when `fit` ends, the best weights are back.

    Args:
        out: the stage's folder: history.csv and logs/ go there, and backup/ until `save` removes it.
        phase: what history.csv calls it: "head" or "fine_tune".
        images: training images an epoch, for the images/s.
        begin, end: epochs before this phase, and after it: `fit`'s initial_epoch and epochs.
        monitor: the metric that decides which epoch is best, e.g. "val_loss" or "val_accuracy".
        patience: stop after so many epochs without a better `monitor`; 0 never stops early.
        stop_smoothed: arguments of `SmoothedStopping` but for the monitor; nothing does without.
        optimizer, schedule: as `compiling` got them; some need a callback.
        profile_steps: first and last step that the TensorFlow Profiler looks at.
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
            _save_weights(_bare(model), after)
        _bare(model).load_weights(after)


def _bare(model: keras.Model) -> keras.Model:
    """Return the same layers as a model that was never compiled, so that no optimiser is saved or asked for."""
    return keras.Model(model.input, model.output, name=model.name)


def _save_weights(model: keras.Model, path: Path) -> None:
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


class Recorder(keras.callbacks.Callback):
    """Writes a row of history.csv, a line of output and a line of progress after each epoch."""

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
        others = [name for name in row if name not in HISTORY_COLUMNS]
        frame = pd.DataFrame([row]).reindex(columns=[*HISTORY_COLUMNS, *others])
        earlier = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        runs.write_text(self.file, earlier + frame.to_csv(header=not earlier, index=False))
        shown = {name: row[name] for name in ("loss", "accuracy", "val_loss", "val_accuracy") if name in row}
        if not verbosity():
            figures = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            print(f"epoch {epoch + 1:>3} of {self.last_epoch}  {figures}  {self.images / seconds:,.0f} images/s")
        runs.report_progress(epoch + 1, self.last_epoch, unit="epoch", label="", rate=self.images / seconds, **shown)


class Best(keras.callbacks.ModelCheckpoint):
    """ModelCheckpoint of the best weights that gives them back to the model when the training ends."""

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        with uninterrupted():
            super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs: dict | None = None) -> None:
        if os.path.isfile(self.filepath):
            with uninterrupted():
                self.model.load_weights(self.filepath)


class SmoothedStopping(keras.callbacks.Callback):
    """Stops when the exponential moving average of a metric has not improved enough for some epochs.

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
    """BackupAndRestore with a backup of one file: no kill can leave weights and an epoch that do not belong together.

    It also brings back what Keras leaves out: the state of the other callbacks, by replaying history.csv to them, and
    the random numbers of dropout, by letting each epoch's follow from its number. What it does not bring back is the
    learning rate: that is what the model was compiled with, less what a plateau has taken off, so that it can be
    changed by hand.
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
        for state, seed in self.random_states:  # so that a next step draws what it would in a new process
            state.assign([seed, 0])

    def on_train_begin(self, logs: dict | None = None) -> None:
        states = [value for value in self.model.variables if value.path.endswith("seed_generator_state")]
        self.random_states = [(state, int(keras.ops.convert_to_numpy(state)[0])) for state in states]
        epoch, history = first_epoch(self.out, self.begin), self.out / "history.csv"
        self.model._initial_epoch = epoch
        rows = read_history(self.out) if history.is_file() else pd.DataFrame({"epoch": []})
        rows = rows[rows["epoch"] <= epoch]
        if rows.empty:
            history.unlink(missing_ok=True)
        else:
            runs.write_text(history, rows.to_csv(index=False))
        if epoch == self.begin:
            Path(self.best.filepath).unlink(missing_ok=True)  # an earlier step's
        else:
            self._restore(epoch, rows[rows["epoch"] > self.begin])

    def _restore(self, epoch: int, rows: pd.DataFrame) -> None:
        optimizer = self.model.optimizer
        with hardware.scope():
            optimizer.build(self.model.trainable_variables)
        for row in rows.to_dict("records"):
            for watcher in self.watchers:
                watcher.on_epoch_end(row["epoch"] - 1, dict(row))
        if self.model.stop_training:  # `fit` would ask only after one more epoch
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
        _save_weights(self.model, self._file(self._current_epoch))
        for old in self.out.glob("backup/epoch-*.weights.h5"):
            if old != self._file(self._current_epoch):
                old.unlink()

    def _file(self, epoch: int) -> Path:
        return self.out / "backup" / f"epoch-{epoch:06d}.weights.h5"
