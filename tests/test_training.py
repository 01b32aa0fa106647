"""Training: what is recorded, and that a training which was killed ends as if nothing had happened."""

import io
import os
import shutil
import signal
from contextlib import redirect_stdout

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from keras.src.saving import saving_lib

from helpers.compute import frontier
from helpers.core import disk, progress
from helpers.core.mended import keras_saving
from helpers.evaluation import selection
from helpers.models import unfreezing
from helpers.training import compiling, fitting, profiling, saving, thaws

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
    keras_saving.correct()  # as `hardware.prepare` does in a notebook
    monkeypatch.setenv(progress.PROGRESS_VARIABLE, str(tmp_path / "progress.jsonl"))


@pytest.fixture(scope="module")
def data():
    """Three classes that can be learned, but not at once."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(3), 20)
    features = rng.normal(size=(60, 8)).astype("float32") + np.eye(3, 8, dtype="float32")[labels] * 1.5
    return features, labels


def make_model(rate=0.05, optimizer="adam", schedule="cosine", monitor="val_loss"):
    """A new model, as in a new process, with dropout so that training draws random numbers."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((8,))
    value = keras.layers.Dense(16, activation="relu")(inputs)
    value = keras.layers.Dropout(0.5)(value)
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(value))
    rate = compiling.schedule(schedule, rate, epochs=EPOCHS, steps=5)
    model.compile(compiling.optimizer(optimizer, rate), compiling.loss(), metrics=compiling.metrics(monitor))
    return model


def train(out, data, *, kill=None, place=0, begin=0, rate=0.05, model=None, **options):
    """Train in a folder; return the model, its history and the folder. `kill` ends it before its time."""
    out.mkdir(exist_ok=True)
    compiled = {name: options[name] for name in ("optimizer", "schedule", "monitor") if name in options}
    model, (x, y) = model or make_model(rate, **compiled), data
    row = fitting.callbacks(out, phase="head", images=50, begin=begin, end=begin + EPOCHS, **options)
    row.insert(place, kill or keras.callbacks.Callback())
    batches = tf.data.Dataset.from_tensor_slices((x[:50], y[:50])).batch(10)
    settings = {"initial_epoch": begin, "epochs": begin + EPOCHS, "shuffle": False, "verbose": 0}
    model.fit(batches, validation_data=(x[50:], y[50:]), callbacks=row, **settings)
    return model, saving.read_history(out), out


@pytest.fixture
def fit(data, tmp_path):
    """Train in the test's own folder."""
    return lambda name="run", **options: train(tmp_path / name, data, **options)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A training that nothing has interrupted, what it printed and reported, and the sentence about its best epoch."""
    folder, printed = tmp_path_factory.mktemp("undisturbed"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setenv(progress.PROGRESS_VARIABLE, str(folder / "progress.jsonl"))
        model, history, out = train(folder / "run", data)
    best, sentence = model.get_weights(), saving.load_best(model, out)
    told = {"printed": printed.getvalue(), "progress": (folder / "progress.jsonl").read_text()}
    return {"history": history, "sentence": sentence, "best": best, "model": model, "out": out} | told


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


# What Keras would do more than once


@pytest.mark.parametrize("optimizer", ["adam", {"name": "adam", "use_ema": True}], ids=["adam", "averaged"])
def test_a_step_is_traced_once(fit, optimizer):
    model, traces = make_model(optimizer=optimizer), []
    step = model.train_step
    model.train_step = lambda data: (traces.append(data), step(data))[1]
    fit(model=model, optimizer=optimizer)
    assert len(traces) == 1


def test_keras_makes_no_layer_to_save_or_load_one(tmp_path, monkeypatch):
    """Keras 3.15 does, until it is corrected; once it does not, `keras_saving` can go."""
    corrected, model, made = saving_lib.get_attr_skipset, make_model(), []
    begin = keras.layers.Layer.__init__
    monkeypatch.setattr(keras.layers.Layer, "__init__", lambda layer, **rest: (made.append(1), begin(layer, **rest))[1])

    def layers_made():
        made.clear()
        model.save_weights(tmp_path / "one.weights.h5", overwrite=True)
        model.load_weights(tmp_path / "one.weights.h5")
        return len(made)

    layers_made()
    assert layers_made() == 0
    monkeypatch.setattr(saving_lib, "get_attr_skipset", corrected.__wrapped__)
    assert layers_made() > 0


# What is recorded


def test_the_history_has_a_row_an_epoch(undisturbed):
    history, out = undisturbed["history"], undisturbed["out"]
    assert tuple(history.columns) == saving.HISTORY_COLUMNS
    assert history["epoch"].to_list() == list(range(1, EPOCHS + 1)) and set(history["phase"]) == {"head"}
    assert history["loss"].iloc[-1] < history["loss"].iloc[0] and (history["seconds"] > 0).all()
    planned = compiling.rates(compiling.schedule("cosine", 0.05, epochs=EPOCHS, steps=5), epochs=EPOCHS, steps=5)
    np.testing.assert_allclose(history["learning_rate"], planned["learning_rate"], rtol=1e-6)
    assert list((out / "logs").rglob("events*"))


def test_a_history_is_read_as_it_was_written(tmp_path):
    values = np.random.default_rng(0).random(500)
    pd.DataFrame({"epoch": range(500), "loss": values}).to_csv(tmp_path / "history.csv", index=False)
    np.testing.assert_array_equal(saving.read_history(tmp_path)["loss"], values)


def test_progress_and_a_line_are_told_each_epoch(undisturbed):
    lines = [line for line in undisturbed["printed"].splitlines() if line.startswith("epoch")]
    assert (
        len(lines) == EPOCHS and lines[2].startswith(f"epoch   3 of {EPOCHS}  loss ") and lines[2].endswith(" images/s")
    )
    assert undisturbed["progress"].count('"unit": "epoch"') == EPOCHS


def test_a_person_gets_the_bar_of_keras(monkeypatch):
    assert fitting.verbosity() == 0
    monkeypatch.delenv(progress.PROGRESS_VARIABLE)
    assert fitting.verbosity() == 1


# The best epoch


@pytest.mark.parametrize("monitor", ["val_loss", "val_macro_f1"])
def test_the_best_epoch_is_kept(fit, data, monitor):
    model, history, out = fit(monitor=monitor, rate=0.5)
    best = history[monitor].min() if monitor == "val_loss" else history[monitor].max()
    found = model.evaluate(data[0][50:], data[1][50:], verbose=0, return_dict=True)
    assert best == pytest.approx(found[monitor.removeprefix("val_")], rel=1e-5), (
        "fit itself gives the best weights back"
    )
    sentence = saving.load_best(model, out, monitor)
    assert f"Best of {EPOCHS} epochs by {monitor}: epoch {history.index[history[monitor] == best][0] + 1}," in sentence


def past(folder, monitor, **columns):
    """Write what a finished stage leaves of its training."""
    folder.mkdir(parents=True)
    (folder / "model.keras").touch()
    disk.write_json(folder / "stage.json", {"status": "done", "parameters": {"monitor": monitor}, "headline": "Done."})
    rows = len(next(iter(columns.values())))
    history = pd.DataFrame(columns | {"epoch": range(1, rows + 1), "phase": "head"})
    history.reindex(columns=[*saving.HISTORY_COLUMNS, "val_auc"]).to_csv(folder / "history.csv", index=False)
    return folder


def test_the_phases_are_compared_by_the_epochs_that_they_kept(tmp_path):
    tuned = past(tmp_path / "tuned", "val_auc", val_auc=[0.90, 0.95, 0.91], val_accuracy=[0.90, 0.86, 0.80])
    head = past(tmp_path / "head", "val_loss", val_auc=[0.90], val_accuracy=[0.87])
    kept = saving.read_kept(tuned)
    assert kept["epoch"].to_list() == [2] and kept["val_accuracy"].to_list() == [0.86]
    choice = selection.better_phase(saving.read_kept(head), kept, "val_accuracy")
    assert choice["phase"] == "head", "0.90 is the accuracy of weights that are gone"
    assert "from 0.8700 (phase 1) to 0.8600 (phase 2)" in choice["sentence"]


def test_a_head_that_another_monitor_chose_is_refused(tmp_path):
    head = past(tmp_path / "other" / "head", "val_auc", val_auc=[0.90, 0.95], val_loss=[0.3, 0.4])
    disk.write_json(head / "class_names.json", ["a", "b", "c"])
    model = make_model()
    model.save(head / "model.keras")
    with pytest.raises(ValueError, match=r"chose its epoch by val_auc\. Set head\.monitor to that"):
        saving.take(model, str(tmp_path / "other"), class_names=["a", "b", "c"], monitor="val_loss")
    saving.take(model, str(tmp_path / "other"), class_names=["a", "b", "c"], monitor="val_auc")


def test_early_stopping_waits_for_patience(fit):
    """Where a cell after `fit` failed, the notebook starts again, and `fit` has nothing left to do."""
    whole, history, _ = fit(patience=1, rate=1.0)
    losses = history["val_loss"].to_list()
    assert len(losses) < EPOCHS and losses[-1] >= min(losses[:-1])
    again, same, _ = fit(patience=1, rate=1.0)
    same_history(history, same)
    same_weights(again, whole.get_weights())


def test_smoothed_stopping_waits_for_a_relative_gain():
    """Expected by hand for alpha 1, where the average is the value: 2 % of the best must be gained within 3 epochs."""

    def last_epoch(values, monitor, **options):
        callback = fitting.SmoothedStopping(monitor, gain=0.02, epochs=3, **options)
        callback.set_model(keras.Sequential())
        callback.on_train_begin()
        for epoch, value in enumerate(values):
            callback.on_epoch_end(epoch, {monitor: value})
            if getattr(callback.model, "stop_training", False):
                return epoch
        return None

    assert last_epoch([1.0, 0.99, 0.981, 0.97, 0.96, 0.955, 0.951], "val_loss", alpha=1.0) == 6
    assert last_epoch([0.5, 0.505, 0.509, 0.511, 0.515, 0.52, 0.522], "val_accuracy", alpha=1.0) is None
    assert last_epoch([0.5, 0.505, 0.509, 0.5099], "val_accuracy", alpha=1.0) == 3
    assert last_epoch([1.0, 0.5, 5.0, 5.0, 5.0], "val_loss", alpha=0.3) == 4, "0.85 is the best average"
    assert last_epoch([1.0, 0.5, 5.0, 0.1, 0.1, 0.1, 0.1], "val_loss", alpha=0.3) == 4


def test_numbers_that_are_none_end_the_training_with_a_reason(fit):
    model, history, out = fit(rate=1e30, optimizer="sgd")
    assert len(history) == 1
    with pytest.raises(ValueError, match=r"no epoch .* learning_rate"):
        saving.load_best(model, out)


# Killed and continued


def test_equal_seeds_train_equally_also_in_a_folder_with_an_old_history(fit, undisturbed, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "history.csv").write_text("epoch,loss\n1,0.5\n")
    model, history, _ = fit()
    same_history(history, undisturbed["history"])
    same_weights(model, undisturbed["best"])


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
    same_weights(resumed, undisturbed["best"])
    assert saving.load_best(resumed, out) == undisturbed["sentence"]
    same_weights(resumed, undisturbed["best"])


def test_many_kills_change_nothing_in_phase_two_either(fit, fit_with_kills):
    whole, expected, _ = fit(begin=10)
    assert expected["epoch"].to_list() == list(range(11, 11 + EPOCHS))
    resumed, history, _ = fit_with_kills(Kill(10, "batch"), Kill(11, "end"), Kill(13, "batch"), begin=10)
    same_history(history, expected)
    same_weights(resumed, whole.get_weights())


def test_patience_is_remembered(fit, fit_with_kills):
    monitor = "val_accuracy"
    _, expected, _ = fit(patience=2, rate=0.1, monitor=monitor)
    assert len(expected) < EPOCHS
    last = len(expected) - 1
    _, history, _ = fit_with_kills(Kill(last - 1, "batch"), Kill(last, "batch"), patience=2, rate=0.1, monitor=monitor)
    same_history(expected, history)


AVERAGED = {"name": "adam", "use_ema": True, "ema_momentum": 0.8}


def test_averaged_weights_are_validated_and_kept_but_not_trained_on(fit, undisturbed, data):
    model, history, out = fit(optimizer=AVERAGED)
    np.testing.assert_allclose(history["loss"], undisturbed["history"]["loss"], rtol=1e-3)
    assert not np.allclose(history["val_loss"], undisturbed["history"]["val_loss"], rtol=1e-2)
    for _ in range(2):  # as `fit` leaves them, and as they are loaded
        loss, _ = model.evaluate(data[0][50:], data[1][50:], verbose=0)
        assert loss == pytest.approx(history["val_loss"].min(), rel=1e-5)
        saving.load_best(model, out)


def test_averages_plateaus_and_smoothed_stopping_survive_kills(fit, fit_with_kills):
    schedule = {"name": "plateau", "factor": 0.5, "patience": 1, "min_delta": 0.05}
    smoothed = {"alpha": 0.5, "gain": 0.05, "epochs": 4}
    options = {"optimizer": AVERAGED, "schedule": schedule, "stop_smoothed": smoothed, "rate": 0.1}
    whole, expected, _ = fit(**options)
    assert 4 < len(expected) < EPOCHS and expected["learning_rate"].nunique() > 2
    resumed, history, _ = fit_with_kills(Kill(1, "end"), Kill(len(expected) - 2, "batch"), place=1, **options)
    same_history(history, expected)
    same_weights(resumed, whole.get_weights())


# By hand


class Stop(Kill):
    """The square in Jupyter."""

    def _kill_in(self, moment):
        if (self.now, self.moment) == (self.epoch, moment):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("schedule", "moment"), [("constant", "batch"), ("cosine", "saving")])
def test_stopped_by_hand_it_goes_on_at_another_rate(fit, monkeypatch, schedule, moment):
    """Also when the square is pressed while weights are written: first the file is finished."""
    interrupted, stop, save = make_model(0.05, schedule=schedule), Stop(4, moment), keras.Model.save_weights
    begun, ended = [], []

    def save_weights(model, path, **options):
        begun.append(path)
        stop._kill_in("saving")
        save(model, path, **options)
        ended.append(path)

    monkeypatch.setattr(keras.Model, "save_weights", save_weights)
    with pytest.raises(KeyboardInterrupt) as kept:  # with its frames, as a notebook keeps them
        fit(kill=stop, model=interrupted, schedule=schedule)
    assert begun == ended
    stop.epoch = None
    interrupted.compile(
        compiling.optimizer("adam", compiling.schedule(schedule, 0.01, epochs=EPOCHS, steps=5)),
        compiling.loss(),
        metrics=compiling.metrics(),
    )
    _, history, _ = fit(model=interrupted, schedule=schedule)
    assert kept.tb and history["epoch"].to_list() == list(range(1, EPOCHS + 1))
    planned = [compiling.schedule(schedule, rate, epochs=EPOCHS, steps=5) for rate in (0.05, 0.01)]
    old, new = (compiling.rates(rate, epochs=EPOCHS, steps=5)["learning_rate"] for rate in planned)
    np.testing.assert_allclose(history["learning_rate"], [*old[:4], *new[4:]], rtol=1e-6)
    assert history["loss"][4:].max() < history["loss"][0], "it did not begin again"


# Several steps


def thawed(out, data, *, steps, kill=None, at=0):
    """Train a plan as 04 does: `thaws.train` all but the last thaw, which is spelled out; `kill` ends number `at`."""
    out.mkdir(exist_ok=True)
    keras.utils.set_random_seed(3)
    inputs, outer = keras.Input((8,)), keras.Input((8,))
    body = keras.Model(inputs, keras.layers.Dense(8, name="block2")(keras.layers.Dense(8, name="block1")(inputs)),
                       name="backbone")  # fmt: skip
    value = keras.layers.Dropout(0.3)(body(outer))
    model = keras.Model(outer, keras.layers.Dense(3, activation="softmax")(value))
    plan, (x, y) = thaws.plan(steps, DEFAULTS, begin=5), data

    def fit(thaw, model, *_):
        cut = frontier.cut(model)
        below = cut.prefix.predict(x, verbose=0) if cut.prefix else x
        cut.suffix.compile(
            thaws.optimizer(thaw, model, steps=5, layer_decay=0.5), compiling.loss(), metrics=compiling.metrics()
        )
        phase = {"phase": thaw.phase, "begin": thaw.begin, "end": thaw.end, "optimizer": thaw.optimizer}
        row = fitting.callbacks(out, images=50, **phase)
        row += [kill] if kill and thaw is plan[at] else []
        batches = tf.data.Dataset.from_tensor_slices((below[:50], y[:50])).batch(thaw.batch_size)
        span = {"initial_epoch": thaw.begin, "epochs": thaw.end}
        cut.suffix.fit(batches, validation_data=(below[50:], y[50:]), callbacks=row, shuffle=False, verbose=0, **span)
        return cut.suffix

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thaws, "_fit", fit)
        thaws.train(plan[:-1], model, x, y, out=out, augment=None, parameters={"monitor": "val_loss"})
    unfreezing.unfreeze(model, plan[-1].unfreeze)
    suffix = fit(plan[-1], model)
    sentence = saving.load_best(suffix, out, whole=model)
    model.compile(loss=compiling.loss(), metrics=[])
    return (
        saving.read_history(out),
        sentence,
        model.evaluate(x[50:], y[50:], verbose=0, return_dict=True)["loss"],
        model.get_weights(),
    )


DEFAULTS = {"unfreeze": "none", "epochs": 3, "learning_rate": 0.05, "optimizer": "adam", "schedule": "constant"}
DEFAULTS |= {"batch_size": 10}
STEPS = [
    {},
    {"unfreeze": "block2", "epochs": 2, "optimizer": "sgd"},
    {"unfreeze": "all", "epochs": 2, "batch_size": 25},
]


def test_several_steps_count_on_and_survive_a_kill(data, tmp_path):
    history, sentence, _, weights = thawed(tmp_path / "whole", data, steps=STEPS)
    assert history["epoch"].to_list() == list(range(6, 13))
    assert history["phase"].to_list() == ["fine_tune"] * 3 + ["fine-tune 2"] * 2 + ["fine-tune 3"] * 2
    with pytest.raises(Killed):
        thawed(tmp_path / "killed", data, steps=STEPS, kill=Kill(9, "batch"), at=1)
    again, same_sentence, _, resumed = thawed(tmp_path / "killed", data, steps=STEPS)
    same_history(again, history)
    assert same_sentence == sentence
    for one, other in zip(resumed, weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_step_that_makes_it_worse_is_undone(data, tmp_path):
    steps = [{}, {"unfreeze": "all", "epochs": 1, "learning_rate": 9.0}]
    history, sentence, loss, _ = thawed(tmp_path, data, steps=steps)
    assert history["val_loss"].iloc[-1] > history["val_loss"].iloc[:3].min() == pytest.approx(loss, rel=1e-5)
    assert "Best of 4 epochs" in sentence


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"unfreze": "all"}, "steps 2: there is no 'unfreze'. Did you mean unfreeze"),
        ({"epochs": 0}, r"steps 2: fine_tune.epochs: expected int in \[1, 10000\], got 0"),
        ({"views": 2}, "steps 2: there is no 'views'"),
    ],
)
def test_a_wrong_step_is_told(step, message):
    with pytest.raises(ValueError, match=message):
        thaws.plan([{}, step], DEFAULTS)


def test_the_plan_is_shown_before_training():
    table = thaws.table(thaws.plan(STEPS, DEFAULTS, begin=5))
    assert table[["from epoch", "to"]].to_numpy().tolist() == [[6, 8], [9, 10], [11, 12]]
    schedule = {"name": "table", "below": {1: 1e-3}, "then": 1e-4}
    rates = thaws.rates(thaws.plan([{}, {"epochs": 2}], DEFAULTS | {"schedule": schedule}, begin=5), images=25)
    np.testing.assert_allclose(rates["learning_rate"], [1e-3, 1e-4, 1e-4, 1e-3, 1e-4], rtol=1e-6)
    assert rates["epoch"].to_list() == [6, 7, 8, 9, 10]


# The profiler


def test_the_profile_names_the_operations(fit):
    _, _, out = fit(profile_steps=[3, 12])
    table = profiling.write_profile(out)
    assert table["op"].str.contains("MatMul").any() and (table["calls"] > 0).all()
    written = pd.read_csv(out / "profile.csv")
    assert written["share"].sum() == pytest.approx(1, abs=0.01) and written["milliseconds"].is_monotonic_decreasing
    calls = written.set_index("op")["calls"]
    assert calls["SoftmaxCrossEntropyWithLogits"] == 12, "ten steps, and the validation after two epochs"
    with pytest.raises(ValueError, match=r"expected \[first, last\] step"):
        profiling.tensorboard(out, [12, 3])


def test_a_training_that_had_ended_is_not_trained_again(fit, undisturbed, tmp_path):
    """A cell after `fit` failed: the notebook starts again, and `fit` has nothing left to do."""
    shutil.copytree(undisturbed["out"], tmp_path / "run")
    again, history, _ = fit()
    same_history(undisturbed["history"], history)
    same_weights(again, undisturbed["best"])


# Saving


def test_a_saved_model_predicts_the_same(undisturbed, data, tmp_path):
    model, out = undisturbed["model"], tmp_path / "run"
    shutil.copytree(undisturbed["out"], out)
    path = saving.save(model, out, data[0])
    np.testing.assert_allclose(keras.models.load_model(path).predict(data[0], verbose=0), model(data[0]), atol=1e-6)
    assert path.name == "model.keras" and (out / "backup").is_dir(), "what follows may still fail"
    saving.remove_backup(out)
    assert not (out / "backup").exists()


# Class weights, epochs


def test_class_weights_are_the_balanced_ones():
    weights = fitting.class_weights(np.array([0] * 6 + [1] * 3 + [2] * 1))
    assert weights == pytest.approx({0: 10 / (3 * 6), 1: 10 / (3 * 3), 2: 10 / 3})
    assert all(type(key) is int and type(value) is float for key, value in weights.items())


def test_the_first_epoch_of_a_folder(tmp_path):
    assert fitting.first_epoch(tmp_path) == 0 and fitting.first_epoch(tmp_path, 30) == 30
    (tmp_path / "backup").mkdir()
    for epoch in (9, 10):
        (tmp_path / f"backup/epoch-{epoch:06d}.weights.h5").touch()
    assert fitting.first_epoch(tmp_path, 3) == 10


def test_the_largest_epochs_sort_last(tmp_path):
    (tmp_path / "backup").mkdir()
    for epoch in (9_999, 20_000):
        os.close(os.open(tmp_path / f"backup/epoch-{epoch:06d}.weights.h5", os.O_CREAT))
    assert fitting.first_epoch(tmp_path) == 20_000
