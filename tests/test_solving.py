"""The head that is solved directly: the optimum that another solver finds, folded into an ordinary Keras model."""

from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from helpers.compute import bank
from helpers.core import notebooks
from helpers.models import classifier
from helpers.training import checks, compiling, features, feeds, saving, solving


def activations(classes: int, views: int = 2, images: int = 90, width: int = 12, seed: int = 0):
    """Features of unequal size and place, one of them constant, that tell the classes apart, though not wholly."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    values = rng.normal(size=(views, images, width)) + 0.8 * np.eye(classes, width)[labels]
    values = values * np.geomspace(0.1, 10, width) + np.linspace(-5, 5, width)
    values[..., -1] = 3
    return values.astype(np.float16), labels


def banks_of(classes: int):
    train, labels = activations(classes)
    val, val_labels = activations(classes, views=1, images=60, seed=1)
    return (
        feeds.Banks(bank.Bank(train, labels, Path("a")), bank.Bank(val, val_labels, Path("b"))),
        labels,
        val_labels,
    )


def head_on(banks: feeds.Banks, classes: int) -> keras.Model:
    """A head whose features are standardised by the banks."""
    inputs = keras.Input(banks.train.activations.shape[2:])
    value = keras.layers.BatchNormalization(center=False, scale=False, epsilon=1e-6, name="head_scale")(inputs)
    value = keras.layers.Dropout(0.2)(value)
    model = keras.Model(inputs, keras.layers.Dense(classes, activation="softmax", name="probabilities")(value))
    assert "12 features are standardised" in features.standardise(model, None, banks, None)
    return model


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("imbalance", ["none", "class_weight"])
def test_the_solution_is_the_optimum_and_the_model_predicts_by_it(classes, imbalance, tmp_path):
    banks, labels, val_labels = banks_of(classes)
    model = head_on(banks, classes)
    path = solving.solve(model, banks, labels, val_labels, tmp_path, monitor="val_auc", imbalance=imbalance)
    assert pd.read_csv(tmp_path / "solver.csv")["val_auc"].between(0.5, 1).all()
    assert path["chosen"].sum() == 1 and path.loc[path["chosen"], "val_loss"].item() == path["val_loss"].min()
    assert (np.diff(path["strength"]) > 0).all() and (np.diff(path["loss"]) < 0).all()

    strength = path.loc[path["chosen"], "strength"].item()
    raw = banks.train.activations.astype(np.float64)
    mean, spread = raw.mean(axis=(0, 1)), raw.std(axis=(0, 1))
    spread[spread < 1e-6] = 1
    x, targets = ((raw - mean) / spread).reshape(-1, 12), np.eye(classes)[np.tile(labels, 2)]
    counts = np.bincount(labels)
    weights = np.tile((len(labels) / (classes * counts) if imbalance != "none" else np.ones(classes))[labels], 2) / 2

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Of a softmax with a ridge on its kernel: scikit-learn's own for several classes, written out."""
        kernel, bias = flat[:-classes].reshape(12, classes), flat[-classes:]
        logits = x @ kernel + bias
        logits -= logits.max(axis=1, keepdims=True)
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        scale = 2.0 if classes == 2 else 1.0  # two classes: the ridge is on the difference of their columns
        value = -strength * (weights * np.log((shares * targets).sum(axis=1))).sum() + scale * (kernel**2).sum() / 2
        error = strength * weights[:, None] * (shares - targets)
        return value, np.concatenate([(x.T @ error + scale * kernel).ravel(), error.sum(axis=0)])

    found = minimize(objective, np.zeros(13 * classes), jac=True, method="L-BFGS-B", options={"maxiter": 5000}).x
    logits = x @ found[:-classes].reshape(12, classes) + found[-classes:]
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predicted = model.predict(raw.reshape(-1, 12), verbose=0)
    assert np.abs(predicted - expected).max() < 0.01
    if imbalance == "none":
        loss = -np.log((predicted * targets).sum(axis=1)).mean()
        assert loss == pytest.approx(path.loc[path["chosen"], "loss"].item(), abs=1e-4)


def test_the_same_images_give_the_same_head(tmp_path):
    banks, labels, val_labels = banks_of(3)
    first, second = head_on(banks, 3), head_on(banks, 3)
    paths = [
        solving.solve(model, banks, labels, val_labels, tmp_path).drop(columns="seconds") for model in (first, second)
    ]
    assert paths[0].equals(paths[1])
    for one, other in zip(first.get_weights(), second.get_weights(), strict=True):
        assert (one == other).all()


def test_more_views_than_memory_holds_are_left_out(monkeypatch, capsys, tmp_path):
    banks, labels, val_labels = banks_of(3)
    with monkeypatch.context() as patch:
        patch.setattr(solving, "ROWS", 100)
        solving.solve(head_on(banks, 3), banks, labels, val_labels, tmp_path)
    assert "Of 2 views, 1 are used" in capsys.readouterr().out
    monkeypatch.setattr(solving, "free_memory", lambda: 1.5 * 90 * 12 * 4 / solving.SHARE_OF_RAM)
    solving.solve(head_on(banks, 3), banks, labels, val_labels, tmp_path)
    assert "Of 2 views, 1 are used" in capsys.readouterr().out
    monkeypatch.setattr(solving, "free_memory", lambda: 0)
    with pytest.raises(ValueError, match=r"GB of free memory for 90 images\. Take solver: gradient"):
        solving.solve(head_on(banks, 3), banks, labels, val_labels, tmp_path)


def test_without_a_cache_there_is_nothing_to_solve(tmp_path):
    with pytest.raises(ValueError, match="no room for the cache"):
        solving.solve(head_on(banks_of(3)[0], 3), None, np.zeros(3), np.zeros(3), tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dense": [8]}, "dense: hidden layers are trained by gradients"),
        ({"mix": "mixup"}, "mix: blended images"),
        ({"loss": "focal"}, "loss: only the cross entropy"),
        ({"loss": {"name": "focal"}}, "loss: only the cross entropy"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"imbalance": "balanced_batches"}, "class_weight does the same"),
        ({"output": {"l2": 1e-3}}, "output: its strength is chosen on validation"),
        ({"views": 0}, "views"),
    ],
)
def test_what_needs_gradients_is_refused_or_trained_with_them(given, said):
    defaults = {name: p.default for name, p in notebooks.find_stage("head").settings.items()}
    assert solving.is_solved(defaults | {"solver": "auto"}) and not solving.is_solved(defaults | {"solver": "gradient"})
    assert not solving.is_solved(defaults | {"solver": "auto"} | given)
    with pytest.raises(ValueError, match=said):
        checks.check("head", defaults | {"solver": "logistic"} | given)


@pytest.mark.parametrize("pool", ["mean", "mean_max", "mean_std"])
def test_pooled_features_are_what_they_are_called(pool, small_backbone, tmp_path):
    model = classifier.build("any", 3, image_size=32, weights="none", pool=pool)
    images = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3)).astype("float32")
    maps = model.get_layer("backbone")(images).numpy()
    features = keras.Model(model.input, model.get_layer("head_dropout").input)(images).numpy()
    other = {"mean_max": lambda: maps.max(axis=(1, 2)), "mean_std": lambda: np.sqrt(maps.var(axis=(1, 2)) + 1e-5)}
    expected = [maps.mean(axis=(1, 2)), *([other[pool]()] if pool in other else [])]
    assert np.allclose(features, np.concatenate(expected, axis=1), atol=1e-5)
    model.save(tmp_path / "model.keras")
    assert np.allclose(keras.models.load_model(tmp_path / "model.keras")(images), model(images), atol=1e-6)


def test_an_unknown_pool_is_told(small_backbone):
    with pytest.raises(ValueError, match="choose one of mean, mean_max, mean_std"):
        classifier.build("any", 3, image_size=32, weights="none", pool="median")


def test_03_solves_the_head_and_04_goes_on_from_it(by_hand, small_backbone, resized, tmp_path):
    """Through the notebooks: one row of history, the path in a file, and phase 2 from epoch 2 on."""
    at = {"images": str(resized), "out": str(tmp_path / "head")}
    left = by_hand("head", **at, solver="logistic", pool="mean_std", views=2, flip="horizontal", next_unfreeze="block3")
    history = saving.read_history(tmp_path / "head")
    assert len(history) == 1 and left["best"].startswith("Solved along") and history["learning_rate"].isna().all()
    path = pd.read_csv(tmp_path / "head/solver.csv")
    chosen = path[path["chosen"]].iloc[0]
    assert history["val_loss"].item() == pytest.approx(chosen["val_loss"], abs=2e-3)

    model, val = left["model"], left["val"]
    model.compile(loss=compiling.loss(), metrics=["accuracy"])
    loss, accuracy = model.evaluate(np.concatenate([*val.pixels]), val.labels, verbose=0)
    assert loss == pytest.approx(history["val_loss"].item(), abs=2e-3)
    assert accuracy == pytest.approx(history["val_accuracy"].item(), abs=1e-6)

    at = {"images": str(resized), "head": str(tmp_path / "head"), "out": str(tmp_path / "fine_tune")}
    by_hand("fine_tune", **at, unfreeze="block3", epochs=2, views=2, batch_size=8, learning_rate=1e-4)
    assert list(saving.read_history(tmp_path / "fine_tune")["epoch"]) == [2, 3]
