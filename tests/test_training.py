"""Training: what is recorded, and that a training which was killed ends as if nothing had happened."""

import os

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from helpers import runs, training

EPOCHS = 8


class Killed(Exception):
    """Stands for a SIGKILL: nothing after it runs, what is on disk stays."""


class Kill(keras.callbacks.Callback):
    """Ends the process, as it were, in a given epoch (from 0) before its first step or at its end."""

    def __init__(self, epoch: int, moment: str):
        super().__init__()
        self.epoch, self.moment, self.now = epoch, moment, None

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        self._kill_in("batch")

    def on_epoch_end(self, epoch, logs=None):
        self._kill_in("end")

    def _kill_in(self, moment):
        if (self.now, self.moment) == (self.epoch, moment):
            raise Killed


@pytest.fixture(autouse=True)
def headless(tmp_path, monkeypatch):
    monkeypatch.setenv(runs.PROGRESS_VARIABLE, str(tmp_path / "progress.jsonl"))


@pytest.fixture(scope="module")
def data():
    """Three classes that can be learned, but not at once."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(3), 20)
    features = rng.normal(size=(60, 8)).astype("float32") + np.eye(3, 8, dtype="float32")[labels] * 1.5
    return features, labels


def make_model(rate=0.05, begin=0, optimizer="adam"):
    """A new model, as in a new process, with dropout so that training draws random numbers."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((8,))
    value = keras.layers.Dense(16, activation="relu")(inputs)
    value = keras.layers.Dropout(0.5)(value)
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(value))
    schedule = training.schedule("cosine", rate, steps=5 * EPOCHS)
    model.compile(training.optimizer(optimizer, schedule), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def train(out, data, *, kill=None, place=0, begin=0, monitor="val_loss", patience=0, **options):
    """Train a new model in a folder; return it, its history and the folder. `kill` ends it before its time."""
    out.mkdir(exist_ok=True)
    model, (x, y) = make_model(**options), data
    row = training.callbacks(
        out, phase="head", images=50, last_epoch=begin + EPOCHS, monitor=monitor, patience=patience
    )
    row.insert(place, kill or keras.callbacks.Callback())
    batches = tf.data.Dataset.from_tensor_slices((x[:50], y[:50])).batch(10)
    settings = {"initial_epoch": begin, "epochs": begin + EPOCHS, "shuffle": False, "verbose": 0}
    model.fit(batches, validation_data=(x[50:], y[50:]), callbacks=row, **settings)
    return model, training.read_history(out), out


@pytest.fixture
def fit(data, tmp_path):
    """Train in the test's own folder."""
    return lambda name="run", **options: train(tmp_path / name, data, **options)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A training that nothing has interrupted, and the sentence about its best epoch."""
    model, history, out = train(tmp_path_factory.mktemp("undisturbed"), data)
    last = model.get_weights()
    sentence = training.load_best(model, out)
    return {"history": history, "last": last, "sentence": sentence, "best": model.get_weights()}


@pytest.fixture
def fit_with_kills(fit):
    """Train, killed at each of the moments in turn, until it ends."""

    def run(*kills, place=0, **options):
        for kill in kills:
            with pytest.raises(Killed):
                fit("killed", kill=kill, place=place, **options)
        return fit("killed", **options)

    return run


def same_history(first, second):
    pd.testing.assert_frame_equal(
        first.drop(columns="seconds"), second.drop(columns="seconds"), check_exact=True, check_dtype=True
    )


def same_weights(model, expected):
    for one, other in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(one, other)


# What is recorded


def test_the_history_has_a_row_an_epoch(fit):
    _, history, out = fit()
    assert tuple(history.columns) == training.HISTORY_COLUMNS
    assert history["epoch"].to_list() == list(range(1, EPOCHS + 1)) and set(history["phase"]) == {"head"}
    assert history["loss"].iloc[-1] < history["loss"].iloc[0] and (history["seconds"] > 0).all()
    assert history["learning_rate"].is_monotonic_decreasing and history["learning_rate"].max() <= 0.05
    assert list((out / "logs").rglob("events*"))


def test_a_history_is_read_as_it_was_written(tmp_path):
    values = np.random.default_rng(0).random(500)
    pd.DataFrame({"epoch": range(500), "loss": values}).to_csv(tmp_path / "history.csv", index=False)
    np.testing.assert_array_equal(training.read_history(tmp_path)["loss"], values)


def test_progress_and_a_line_are_told_each_epoch(fit, tmp_path, capsys):
    fit()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert (
        len(lines) == EPOCHS and lines[2].startswith(f"epoch   3 of {EPOCHS}  loss ") and lines[2].endswith(" images/s")
    )
    assert (tmp_path / "progress.jsonl").read_text().count('"unit": "epoch"') == EPOCHS


def test_a_person_gets_the_bar_of_keras(monkeypatch):
    assert training.verbosity() == 0
    monkeypatch.delenv(runs.PROGRESS_VARIABLE)
    assert training.verbosity() == 1


# The best epoch


@pytest.mark.parametrize("monitor", ["val_loss", "val_accuracy"])
def test_the_best_epoch_is_kept(fit, data, monitor):
    model, history, out = fit(monitor=monitor, rate=0.5)
    best = history[monitor].min() if monitor == "val_loss" else history[monitor].max()
    sentence = training.load_best(model, out, monitor)
    loss, accuracy = model.evaluate(data[0][50:], data[1][50:], verbose=0)
    assert best == pytest.approx(loss if monitor == "val_loss" else accuracy, rel=1e-5)
    assert f"Best of {EPOCHS} epochs by {monitor}: epoch {history.index[history[monitor] == best][0] + 1}," in sentence


def test_early_stopping_waits_for_patience(fit):
    _, history, _ = fit(patience=1, rate=1.0)
    losses = history["val_loss"].to_list()
    assert len(losses) < EPOCHS and losses[-1] >= min(losses[:-1])


def test_numbers_that_are_none_end_the_training_with_a_reason(fit):
    model, history, out = fit(rate=1e30, optimizer="sgd")
    assert len(history) == 1
    with pytest.raises(ValueError, match=r"no epoch .* learning_rate"):
        training.load_best(model, out)


# Killed and continued


def test_equal_seeds_train_equally(fit, undisturbed):
    model, history, _ = fit()
    same_history(history, undisturbed["history"])
    same_weights(model, undisturbed["last"])


@pytest.mark.parametrize(
    ("moment", "place"),
    [
        pytest.param("batch", 0, id="in an epoch"),
        pytest.param("end", 0, id="before the row of history"),
        pytest.param("end", 1, id="between the row and the best weights"),
        pytest.param("end", 5, id="between the best weights and the backup"),
        pytest.param("end", 6, id="after the backup"),
    ],
)
def test_a_kill_at_any_moment_changes_nothing(fit_with_kills, undisturbed, moment, place):
    resumed, history, out = fit_with_kills(Kill(2, moment), place=place)
    same_history(history, undisturbed["history"])
    same_weights(resumed, undisturbed["last"])
    assert training.load_best(resumed, out) == undisturbed["sentence"]
    same_weights(resumed, undisturbed["best"])


def test_many_kills_change_nothing_in_phase_two_either(fit, fit_with_kills):
    whole, expected, _ = fit(begin=10)
    assert expected["epoch"].to_list() == list(range(11, 11 + EPOCHS))
    resumed, history, _ = fit_with_kills(Kill(10, "batch"), Kill(11, "end"), Kill(13, "batch"), begin=10)
    same_history(history, expected)
    same_weights(resumed, whole.get_weights())


@pytest.mark.parametrize("monitor", ["val_loss", "val_accuracy"])
def test_patience_is_remembered(fit, fit_with_kills, monitor):
    _, expected, _ = fit(patience=2, rate=0.1, monitor=monitor)
    assert len(expected) < EPOCHS
    last = len(expected) - 1
    _, history, _ = fit_with_kills(Kill(last - 1, "batch"), Kill(last, "batch"), patience=2, rate=0.1, monitor=monitor)
    same_history(expected, history)


@pytest.mark.parametrize("patience", [0, 1])
def test_a_training_that_had_ended_is_not_trained_again(fit, patience):
    """A cell after `fit` failed: the notebook starts again, and `fit` has nothing left to do."""
    whole, expected, _ = fit(patience=patience, rate=1.0)
    again, history, _ = fit(patience=patience, rate=1.0)
    same_history(expected, history)
    same_weights(again, whole.get_weights())


def test_a_new_training_does_not_go_on_with_an_old_history(fit, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "history.csv").write_text("epoch,loss\n1,0.5\n")
    assert len(fit()[1]) == EPOCHS


# Saving


def test_a_saved_model_predicts_the_same_and_leaves_no_backup(fit, data):
    model, _, out = fit()
    assert (out / "backup").is_dir()
    path = training.save(model, out, data[0])
    np.testing.assert_allclose(keras.models.load_model(path).predict(data[0], verbose=0), model(data[0]), atol=1e-6)
    assert path.name == "model.keras" and not (out / "backup").exists()


# Optimisers, schedules, weights


@pytest.mark.parametrize("name", training.OPTIMIZERS)
def test_optimizers_are_those_of_keras(name):
    made = training.optimizer(name, 0.25)
    assert type(made).__name__.lower() == name and float(made.learning_rate) == 0.25


def test_sgd_has_momentum():
    assert training.optimizer("sgd", 0.1).momentum == 0.9
    assert training.optimizer("sgd", 0.1, momentum=0.0).momentum == 0.0


def test_a_constant_schedule_is_a_number():
    assert training.schedule("constant", 0.1, steps=10) == 0.1


def test_a_cosine_falls_to_a_hundredth():
    rate = training.schedule("cosine", 0.1, steps=100)
    values = [float(rate(step)) for step in range(101)]
    expected = 0.1 * (0.99 * (1 + np.cos(np.pi * np.arange(101) / 100)) / 2 + 0.01)
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert values[0] == pytest.approx(0.1) and values[-1] == pytest.approx(0.001)


def test_a_warm_up_rises_first():
    rate = training.schedule("cosine", 0.1, steps=100, warmup_steps=20)
    values = [float(rate(step)) for step in range(101)]
    assert values[0] == pytest.approx(0.001) and np.argmax(values) == 20 and values[20] == pytest.approx(0.1)
    assert values[-1] == pytest.approx(0.001, rel=0.05)


def test_class_weights_are_the_balanced_ones():
    weights = training.class_weights(np.array([0] * 6 + [1] * 3 + [2] * 1))
    assert weights == pytest.approx({0: 10 / (3 * 6), 1: 10 / (3 * 3), 2: 10 / 3})
    assert all(type(key) is int and type(value) is float for key, value in weights.items())


def test_the_first_epoch_of_a_folder(tmp_path):
    assert training.first_epoch(tmp_path) == 0 and training.first_epoch(tmp_path, 30) == 30
    (tmp_path / "backup").mkdir()
    for epoch in (9, 10):
        (tmp_path / f"backup/epoch-{epoch:06d}.weights.h5").touch()
    assert training.first_epoch(tmp_path, 3) == 10


def test_the_largest_epochs_sort_last(tmp_path):
    (tmp_path / "backup").mkdir()
    for epoch in (9_999, 20_000):
        os.close(os.open(tmp_path / f"backup/epoch-{epoch:06d}.weights.h5", os.O_CREAT))
    assert training.first_epoch(tmp_path) == 20_000
