"""What `compile` gets: schedules by epoch, optimisers and losses by name, each layer's share, labels of both kinds."""

import keras
import numpy as np
import pytest

from helpers.compute import bank
from helpers.models import unfreezing
from helpers.training import compiling, fitting

S4 = {"name": "table", "below": {7: 1e-3, 8: 5e-4, 16: 5e-5}, "then": 1e-5}


def rates(spec, rate=0.1, epochs=20, steps=3):
    table = compiling.rates(compiling.schedule(spec, rate, epochs=epochs, steps=steps), epochs=epochs, steps=steps)
    assert table["epoch"].to_list() == list(range(1, epochs + 1))
    return table["learning_rate"].to_numpy()


# Learning rates


@pytest.mark.parametrize("below", [S4["below"], {"16": 5e-5, "7": 1e-3, "8": 5e-4}], ids=["", "as papermill hands it"])
def test_the_table_of_stanford_cars(below):
    expected = [1e-3] * 7 + [5e-4] + [5e-5] * 8 + [1e-5] * 4
    np.testing.assert_allclose(rates(S4 | {"below": below}), expected, rtol=1e-6)


def test_the_steps_of_kenyan_food():
    found = rates({"name": "step", "every": 10, "factor": 0.1**0.5}, rate=1e-4, epochs=35)
    np.testing.assert_allclose(found, 1e-4 * 0.1 ** (np.arange(35) // 10 / 2), rtol=1e-5)


def test_constant_and_plateau_begin_as_they_are():
    assert set(rates("constant")) == set(rates({"name": "plateau", "patience": 3})) == {0.1}
    (callback,) = compiling.plateau({"name": "plateau", "factor": 0.2, "patience": 5}, "val_accuracy")
    assert (callback.factor, callback.patience, callback.monitor, callback.mode) == (0.2, 5, "val_accuracy", "max")
    assert compiling.plateau("cosine", "val_loss") == []


def test_a_cosine_falls_to_a_hundredth():
    expected = 0.1 * (0.99 * (1 + np.cos(np.pi * np.arange(20) / 20)) / 2 + 0.01)
    np.testing.assert_allclose(rates("cosine"), expected, rtol=1e-4)
    warm = rates({"name": "cosine", "warmup_epochs": 4})
    np.testing.assert_allclose(warm[:5], 0.001 + 0.099 * np.arange(5) / 4, rtol=1e-5)
    assert (np.diff(warm[4:]) < 0).all() and warm[-1] < 0.01


def test_one_cycle_rises_and_falls_below_its_start():
    found = rates({"name": "one_cycle", "peak_epoch": 6})
    assert found[0] == pytest.approx(0.1 / 25) and np.argmax(found) == 6 and found[6] == pytest.approx(0.1)
    assert (np.diff(found[:7]) > 0).all() and (np.diff(found[6:]) < 0).all() and found[-1] < found[0]
    assert np.argmax(rates("one_cycle")) == 5


# Optimisers


@pytest.mark.parametrize("name", compiling.OPTIMIZERS)
def test_optimizers_are_those_of_keras(name):
    made = compiling.optimizer(name, 0.25)
    assert type(made).__name__.lower() == name and float(made.learning_rate) == 0.25


def test_arguments_reach_the_class():
    spec = {"name": "sgd", "nesterov": True, "clipnorm": 1.0, "weight_decay": 1e-4, "use_ema": True}
    config = compiling.optimizer(spec, 0.1).get_config()
    assert {key: config[key] for key in spec if key != "name"} == {key: spec[key] for key in spec if key != "name"}
    assert config["momentum"] == 0.9 and compiling.optimizer({"name": "sgd", "momentum": 0.0}, 1).momentum == 0.0
    assert compiling.optimizer({"name": "adam", "epsilon": 0.1}, 0.1).epsilon == 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compiling.optimizer("adamm", 0.1), "optimizer: there is no 'adamm'. Did you mean adam"),
        (
            lambda: compiling.optimizer({"name": "sgd", "momentun": 1}, 0.1),
            "no argument 'momentun'. Did you mean moment",
        ),
        (lambda: compiling.optimizer({"momentum": 0.9}, 0.1), "there is no None. There are: adam"),
        (lambda: compiling.optimizer({"name": "adam", "clipnorm": "1"}, 0.1), "numbers, true or false"),
        (lambda: compiling.optimizer({"name": "sgd", "momentum": 2.0}, 0.1), "sgd refused its arguments"),
        (lambda: rates("cosin"), "schedule: there is no 'cosin'. Did you mean cosine"),
        (lambda: rates({"name": "constant", "factor": 1}), "constant has no argument 'factor'. It takes none"),
        (lambda: rates({"name": "cosine", "warmup_epochs": 20}), "would rise for 20 epochs, but there are only 20"),
        (lambda: rates({"name": "table", "below": {7: 1e-3}}), "a table is"),
        (lambda: rates(S4 | {"below": {"seven": 1e-3}}), "epochs are whole numbers; got seven"),
        (lambda: rates(S4 | {"then": 0}), "above 0; got 0"),
        (lambda: rates({"name": "step", "every": 0}), "schedule.every must be a number of at least 1"),
        (lambda: rates({"name": "plateau", "factor": 2.0}), "plateau refused its arguments"),
        (lambda: compiling.loss("focall"), "loss: there is no 'focall'. Did you mean focal"),
        (lambda: compiling.loss({"name": "cross_entropy", "gamma": 2}), "cross_entropy has no argument 'gamma'"),
        (lambda: compiling.loss({"name": "focal", "gamma": -1}), "loss.gamma must be a number of at least 0"),
    ],
)
def test_what_is_wrong_is_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def tiny_classifier():
    """Three layers as a backbone, and a head."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    value = inputs
    for name in ("block1", "block2", "block3"):
        value = keras.layers.Dense(4, name=name)(value)
    body, outer = keras.Model(inputs, value, name="backbone"), keras.Input((4,))
    return keras.Model(outer, keras.layers.Dense(3, activation="softmax", name="probabilities")(body(outer)))


@pytest.mark.parametrize("name", compiling.OPTIMIZERS)
def test_deeper_layers_move_by_the_decayed_rate(name):
    """The gradients are equal everywhere, so that the moves differ by the shares alone."""
    model = tiny_classifier()
    unfreezing.unfreeze(model, "block2")
    weights, shares = model.trainable_variables, unfreezing.layer_shares(model, 0.5)
    optimizer = compiling.optimizer({"name": name, "weight_decay": 0.0}, 0.01, shares=shares)
    for _ in range(3):
        before = [np.array(weight) for weight in weights]
        optimizer.apply([keras.ops.ones_like(weight) for weight in weights], weights)
        moved = [np.mean(old - new) for old, new in zip(before, weights, strict=True)]
        assert {weight.path.split("/")[0] for weight in weights} == {"block2", "block3", "probabilities"}
        depth = {"probabilities": 0, "block3": 1, "block2": 2}
        expected = [moved[-1] * 0.5 ** depth[weight.path.split("/")[0]] for weight in weights]
        np.testing.assert_allclose(moved, expected, rtol=1e-3)


def test_weight_decay_is_shared_out_too():
    model = tiny_classifier()
    unfreezing.unfreeze(model, "all")
    weights = [weight for weight in model.trainable_variables if weight.path.endswith("kernel")]
    before = [np.array(weight) for weight in weights]
    optimizer = compiling.optimizer(
        {"name": "sgd", "weight_decay": 0.1}, 0.5, shares=unfreezing.layer_shares(model, 0.5)
    )
    optimizer.apply([keras.ops.zeros_like(weight) for weight in weights], weights)
    for old, new, share in zip(before, weights, [0.125, 0.25, 0.5, 1.0], strict=True):
        np.testing.assert_allclose(new, old * (1 - 0.1 * 0.5 * share), rtol=1e-5)


# Losses and metrics

SHARES = np.eye(3, dtype="float32")[[0, 1, 2, 1]]
FOUND = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6], [0.05, 0.9, 0.05]], "float32")


@pytest.mark.parametrize("labels", [SHARES.argmax(axis=1), SHARES], ids=["indices", "shares"])
def test_losses_by_hand(labels):
    p, smooth = (SHARES * FOUND).sum(axis=1), SHARES * 0.7 + 0.1
    expected = {
        (): -np.log(p),
        ("cross_entropy", 0.3): -(smooth * np.log(FOUND)).sum(axis=1),
        ("focal",): -0.25 * np.log(p) * (1 - p) ** 2,
    }
    for choice, losses in expected.items():
        assert float(compiling.loss(*choice)(labels, FOUND)) == pytest.approx(losses.mean(), rel=1e-5)
    focal = compiling.loss({"name": "focal", "gamma": 1.0, "alpha": [1.0, 1.0, 3.0]})(labels, FOUND)
    assert float(focal) == pytest.approx((-np.log(p) * (1 - p) * [1, 1, 3, 1]).mean(), rel=1e-5)


def test_metrics_take_both_kinds_of_labels():
    expected = {"accuracy": 0.75, "macro_f1": (2 / 3 + 2 / 3 + 1) / 3}
    for monitor in ("val_macro_f1", "val_auc"):
        for labels in (SHARES.argmax(axis=1), SHARES):
            found = {}
            for metric in compiling.metrics(monitor):
                metric.update_state(labels, FOUND)
                found[metric.name] = float(metric.result())
            for name in found.keys() & expected.keys():
                assert found[name] == pytest.approx(expected[name], abs=1e-5)
            assert list(found) == ["accuracy", monitor.removeprefix("val_")]


def test_shares_that_are_blended_count_by_their_larger_part():
    (accuracy,) = compiling.metrics()
    accuracy.update_state(np.array([[0.3, 0.7, 0.0]], "float32"), np.array([[0.1, 0.8, 0.1]], "float32"))
    assert float(accuracy.result()) == 1.0


# Classes of unequal size


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Two overlapping classes, 180 to 20, as a bank of one view."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [180, 20])
    features = rng.normal(size=(200, 4)).astype("float32")
    features[:, 0] += labels * 1.5
    return bank.Bank(features[None], labels.astype("int32"), tmp_path_factory.mktemp("bank"))


def share_called_rare(unequal, *, loss="cross_entropy", class_weight=None, probabilities=None):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, activation="softmax")])
    model.compile(compiling.optimizer("adam", 0.05), compiling.loss(loss), steps_per_execution=7)
    data, clock = unequal.batches(32, seed=0, probabilities=probabilities)
    model.fit(data, epochs=12, callbacks=[clock], class_weight=class_weight, shuffle=False, verbose=0)
    return float(np.mean(model.predict(unequal.activations[0], verbose=0)[:, 1]))


def test_each_way_to_even_out_classes_shows(unequal):
    """Without any, a class is predicted as often as it occurs; each of them makes the rare one more likely."""
    none = share_called_rare(unequal)
    assert none == pytest.approx(0.1, abs=0.04)
    weighted = share_called_rare(unequal, class_weight=fitting.class_weights(unequal.labels))
    chances = 1.0 / np.bincount(unequal.labels)[unequal.labels] / 2
    balanced = share_called_rare(unequal, probabilities=chances)
    focal = share_called_rare(unequal, loss={"name": "focal", "gamma": 4.0})
    assert weighted == pytest.approx(balanced, abs=0.06) and min(weighted, balanced) > 0.3
    assert focal > none + 0.05  # easy images, which are of the common class, count less
