"""The last layer of the head, solved directly: logistic regression on the features of all views, instead of epochs.

The features of an image do not change while the head is fitted, so the best weights of a head without
hidden layers are the solution of a convex problem. scikit-learn's L-BFGS finds it in seconds. Validation
chooses the strength of the regularisation along a path from strong to weak; each solution starts at the last one.
"""

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from helpers.compute import inference
from helpers.core import disk, progress
from helpers.core.machine import free_memory
from helpers.training import compiling, features, feeds, fitting, saving

STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-10, 3))  # scikit-learn's C, from strong to weak
WORSE = 2  # this many strengths in a row without a better one end the path
STEPS = 300  # of L-BFGS at most, for each strength
SHARE_OF_RAM = 0.3  # of the free memory, for the features
ROWS = 20_000  # images times views that are used, to limit the time; the plain view of every image is always used


def why_not(parameters: Mapping[str, Any]) -> str:
    """Return why the head of these parameters cannot be solved, "" if it can.

    Args:
        parameters: those of 03.
    """
    loss = parameters["loss"] if isinstance(parameters["loss"], str) else parameters["loss"].get("name")
    reasons = {
        "dense": bool(parameters["dense"]) and "hidden layers are trained by gradients",
        "mix": parameters["mix"] != "none" and "blended images have no single label",
        "loss": loss != "cross_entropy" and "only the cross entropy is solved",
        "label_smoothing": parameters["label_smoothing"] > 0 and "the solver takes labels without smoothing",
        "imbalance": parameters["imbalance"] == "balanced_batches" and "it has no batches; class_weight does the same",
        "output": any(parameters["output"].values()) and "its strength is chosen on validation",
        "views": parameters["views"] < 1 and "the features of at least the plain view are needed",
    }
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)


def is_solved(parameters: Mapping[str, Any]) -> bool:
    """Return whether 03 solves its head: if `solver` says so, or if it is "auto" and no parameter forbids it.

    Raises:
        ValueError: `solver` is "logistic", and the other parameters need gradients.
    """
    reason = why_not(parameters)
    if parameters["solver"] == "logistic" and reason:
        raise ValueError(f"solver: logistic cannot fit this head. {reason}. Change that, or take solver: gradient.")
    return parameters["solver"] != "gradient" and not reason


def solve(
    model: keras.Model,
    banks: feeds.Banks | None,
    labels: np.ndarray,
    val_labels: np.ndarray,
    out: Path,
    *,
    monitor: str = "val_loss",
    imbalance: str = "none",
) -> pd.DataFrame:
    """Give the last layer of `model` the weights whose validation loss is lowest, and return the path.

    Args:
        model: a classifier whose layer "probabilities" comes right after ``head_scale`` (and dropout), which
            `features.standardise` has set.
        banks: the pooled features of all views, from `feeds.fill_banks`.
        labels, val_labels: class indices of the training and of the validation images.
        out: the stage's folder, which gets the path as solver.csv.
        monitor: a metric of validation to record too, such as "val_auc".
        imbalance: "class_weight" gives each class the same weight.

    Returns:
        One row a strength: strength (scikit-learn's C), loss, accuracy, val_loss, val_accuracy, `monitor`, seconds and
        chosen.

    Raises:
        ValueError: there are no features, or not even those of the plain views fit into memory.
    """
    if banks is None:
        raise ValueError(
            "solver: logistic needs the features of all images, and there was no room for the cache. Set a larger"
            " cache_gb, fewer views, or solver: gradient."
        )
    views = _views_that_fit(banks)
    plain = banks.val.activations[0].astype(np.float32)
    scale, shift = (part.astype(np.float32) for part in inference.scale_and_shift(features.scale_of(model)))
    plain = plain * scale + shift
    inputs = np.concatenate([banks.train.activations[view] * scale + shift for view in range(views)])
    repeated = np.tile(labels, views)
    weights = fitting.class_weights(labels, imbalance)
    weights = np.ones(len(labels)) if weights is None else np.array([weights[label] for label in labels])
    weights = np.tile(weights / views, views)  # an image counts once, with any number of views
    solver, rows, best, best_number = LogisticRegression(max_iter=STEPS, warm_start=True), [], (np.inf, None), 0
    for number, strength in enumerate(STRENGTHS):
        begin = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reaching the last step changes the class of hardly any image
            solver.set_params(C=strength).fit(inputs, repeated, sample_weight=weights)
        solution = _weights(solver)
        row = {"strength": strength} | _measured(_logits(inputs, *solution), repeated, weights)
        scores = _logits(plain, *solution)
        row |= {f"val_{name}": value for name, value in _measured(scores, val_labels).items()}
        row |= _monitored(monitor, scores, val_labels)
        row["seconds"] = round(time.monotonic() - begin, 3)
        rows.append(row)
        progress.report(number + 1, len(STRENGTHS), unit="strength", label="solve the head", val_loss=row["val_loss"])
        if row["val_loss"] < best[0]:
            best, best_number = (row["val_loss"], solution), number
        elif number - best_number >= WORSE:
            break
    model.get_layer("probabilities").set_weights([part.astype(np.float32) for part in best[1]])
    path = pd.DataFrame(rows)
    path = path.assign(chosen=path["val_loss"] == best[0])
    disk.write_text(out / saving.SOLVED, path.to_csv(index=False))
    return path


def _views_that_fit(banks: feeds.Banks) -> int:
    views, images, *shape = banks.train.activations.shape
    if len(shape) != 1:
        raise ValueError(f"solver: logistic needs one row of features an image, got the shape {tuple(shape)}.")
    room = SHARE_OF_RAM * free_memory() / (images * shape[0] * 4)
    if room < 1:
        raise ValueError(
            f"solver: logistic needs {images * shape[0] * 4 / SHARE_OF_RAM / 1e9:.3g} GB of free memory for {images:,}"
            " images. Take solver: gradient."
        )
    fitting = min(views, int(room), max(1, ROWS // images))
    if fitting < views:
        print(f"Of {views} views, {fitting} are used, to limit memory and time.")
    return fitting


def _weights(solver: LogisticRegression) -> tuple[np.ndarray, np.ndarray]:
    """Return kernel (features, classes) and bias (classes,) of the softmax that a solution means."""
    kernel, bias = solver.coef_.T.astype(np.float64), np.asarray(solver.intercept_, np.float64)
    if kernel.shape[1] == 1:  # two classes have one column: its logit is the difference of theirs
        kernel, bias = np.hstack([-kernel, kernel]) / 2, np.array([-bias[0], bias[0]]) / 2
    return kernel, bias


def _logits(features: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    logits = features @ kernel.astype(np.float32) + bias.astype(np.float32)
    return logits - logits.max(axis=1, keepdims=True)


def _measured(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    """Return the mean cross entropy, weighted, and the accuracy."""
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    loss = np.average(losses.astype(np.float64), weights=weights)
    return {"loss": float(loss), "accuracy": float((logits.argmax(axis=1) == labels).mean())}


def _monitored(monitor: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the metric of Keras that `monitor` names, unless it is measured anyway."""
    values = {}
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for metric in compiling.metrics(monitor):
        if isinstance(metric, keras.metrics.Metric) and f"val_{metric.name}" == monitor:
            metric.update_state(keras.ops.one_hot(labels, scores.shape[1]), scores)
            values[monitor] = float(metric.result())
    return values
