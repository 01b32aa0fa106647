"""What `compile` gets: optimiser, learning rate, loss and metrics, each a Keras object with a short name.

A choice is a name, "sgd", or a dict of the name and arguments, {"name": "sgd", "momentum": 0.9}. The error
about an unknown name suggests the nearest one.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import pandas as pd
from keras import ops
from keras.optimizers import schedules

from helpers.compute import hardware
from helpers.core import words

OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    "adamw": keras.optimizers.AdamW,
    "sgd": keras.optimizers.SGD,
    "rmsprop": keras.optimizers.RMSprop,
    "lion": keras.optimizers.Lion,
}
SCHEDULES = {
    "constant": (),
    "cosine": ("warmup_epochs", "alpha"),
    "one_cycle": ("peak_epoch",),
    "plateau": ("monitor", "factor", "patience", "min_delta", "cooldown", "min_lr"),
    "table": ("below", "then"),
    "step": ("every", "factor"),
}
LOSSES = {"cross_entropy": keras.losses.CategoricalCrossentropy, "focal": keras.losses.CategoricalFocalCrossentropy}
NOT_SHARED = {
    "clipnorm": "each would clip its own part of the gradient",
    "global_clipnorm": "each would clip its own part of the gradient",
    "clipvalue": "each would clip its own part of the gradient",
    "gradient_accumulation_steps": "Keras cannot accumulate gradients there",
}  # arguments of optimisers that have another meaning on several devices, or fail
PEAK, RISE, FALL = 0.25, 25, 1e-5  # one cycle: when it peaks, how far below it starts, where it ends (fastai's numbers)


def optimizer(
    spec: str | dict, learning_rate: Any, *, shares: Mapping[int, float] | None = None
) -> keras.optimizers.Optimizer:
    """Return a Keras optimiser; "sgd" has momentum 0.9 by default.

    Args:
        spec: a key of OPTIMIZERS, or a dict of `name` and any argument of the Keras class but the learning rate, e.g.
            {"name": "sgd", "momentum": 0.9, "nesterov": True, "clipnorm": 1.0}.
        learning_rate: a number or a keras.optimizers.schedules.LearningRateSchedule.
        shares: id of a variable -> the share of the learning rate, and of the weight decay, that changes it; 1 for
            those that are not named.

    Raises:
        ValueError: an unknown name or argument, a value that Keras refuses, or an argument of NOT_SHARED where several
            devices train together.
    """
    name, arguments = _choice("optimizer", spec, {name: _arguments(kind) for name, kind in OPTIMIZERS.items()})
    wrong = {key: value for key, value in arguments.items() if not isinstance(value, int | float | None)}
    if wrong:
        raise ValueError(f"optimizer: the arguments of {name} are numbers, true or false; got {wrong}.")
    for key, reason in NOT_SHARED.items() if hardware.mirrors() else ():
        if arguments.get(key) is not None:
            raise ValueError(
                f"optimizer: {key} does not work on {hardware.replicas()} devices together: {reason}. Leave it out, or"
                f" set {hardware.ONE_DEVICE}."
            )
    if name == "sgd":
        arguments = {"momentum": 0.9} | arguments
    rate = float(learning_rate) if isinstance(learning_rate, int) else learning_rate
    kind = OPTIMIZERS[name]
    try:
        plain = kind(learning_rate=rate, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer: {name} refused its arguments: {error}") from None
    return plain if shares is None else _by_shares(plain, shares)(learning_rate=rate, name=name, **arguments)


def _by_shares(plain: keras.optimizers.Optimizer, shares: Mapping[int, float]) -> type:
    """Return the class of `plain` with a separate learning rate for each variable; Keras has one for all."""
    decay = plain.weight_decay

    class ByShares(type(plain)):
        def _share(self, variable: Any) -> float:
            index = self._get_variable_index(variable)
            return shares.get(id(self._trainable_variables[index]), 1.0)

        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            super().update_step(gradient, variable, learning_rate * self._share(variable))

        def _apply_weight_decay(self, variables: Iterable) -> None:
            for variable in variables if decay else ():  # not from self.weight_decay: replicas take turns in here
                self.weight_decay = decay * self._share(variable)
                super()._apply_weight_decay([variable])
            self.weight_decay = decay

    return ByShares


def schedule(spec: str | dict, learning_rate: float, *, epochs: int, steps: int) -> Any:
    """Return the learning rate of a phase: a number, or a Keras schedule that counts steps from the phase's start.

    constant; cosine {warmup_epochs: 0, alpha: 0.01}: falls to the share alpha; one_cycle {peak_epoch}: rises from a
    25th for a quarter of the epochs, then falls to nearly zero; step {every, factor}: times `factor` every so many
    epochs; table {below: {7: 1e-3, 8: 5e-4}, then: 1e-5}: seven epochs at 1e-3, one at 5e-4, the rest at 1e-5; it
    ignores `learning_rate`; plateau: a number, which the callback of `plateau` lowers.

    Args:
        spec: a key of SCHEDULES, or a dict of `name` and arguments.
        learning_rate: the highest rate.
        epochs: passes of the phase.
        steps: batches a pass.

    Raises:
        ValueError: an unknown name or argument, or an impossible value.
    """
    name, arguments = _choice("schedule", spec, SCHEDULES)
    if name == "table":
        return _table(arguments, steps)
    if name == "step":
        every, factor = _number("schedule.every", arguments.get("every", 10), 1), arguments.get("factor", 0.1)
        factor = _number("schedule.factor", factor, 0, above=True)
        return schedules.ExponentialDecay(learning_rate, int(every * steps), factor, staircase=True)
    if name == "cosine":
        warm = _number("schedule.warmup_epochs", arguments.get("warmup_epochs", 0), 0)
        alpha = _number("schedule.alpha", arguments.get("alpha", 0.01), 0)
        return _cosine(learning_rate, learning_rate / 100, warm, alpha, epochs, steps)
    if name == "one_cycle":
        peak = _number("schedule.peak_epoch", arguments.get("peak_epoch", PEAK * epochs), 0)
        return _cosine(learning_rate, learning_rate / RISE, peak, FALL, epochs, steps)
    plateau(spec, "val_loss")
    return float(learning_rate)


def _cosine(peak: float, start: float, warm: float, alpha: float, epochs: int, steps: int) -> Any:
    if warm and warm >= epochs > 0:
        raise ValueError(f"schedule: the rate would rise for {warm:g} epochs, but there are only {epochs}.")
    rising, total = round(warm * steps), epochs * steps
    target = {"warmup_target": peak, "warmup_steps": rising} if rising else {}
    return schedules.CosineDecay(start if rising else peak, max(total - rising, 1), alpha=alpha, **target)


def _table(arguments: Mapping[str, Any], steps: int) -> Any:
    below, then = arguments.get("below"), arguments.get("then")
    if not isinstance(below, dict) or not below or then is None:
        raise ValueError(f"schedule: a table is {{name: table, below: {{epoch: rate}}, then: rate}}; got {arguments}.")
    try:
        rates = dict(sorted((int(str(epoch)), rate) for epoch, rate in below.items()))
    except ValueError:
        raise ValueError(f"schedule.below: the epochs are whole numbers; got {', '.join(map(str, below))}.") from None
    _number("schedule.below", min(rates), 1)
    values = [_number("schedule.table", rate, 0, above=True) for rate in (*rates.values(), then)]
    return schedules.PiecewiseConstantDecay([epoch * steps - 1 for epoch in rates], values)


def plateau(spec: str | dict, monitor: str) -> list[keras.callbacks.Callback]:
    """Return the callback that lowers the rate when `monitor` does not improve; none for the other schedules."""
    name, arguments = _choice("schedule", spec, SCHEDULES)
    if name != "plateau":
        return []
    arguments = {"monitor": monitor} | arguments
    try:
        return [keras.callbacks.ReduceLROnPlateau(mode=better(arguments["monitor"]), **arguments)]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"schedule: plateau refused its arguments: {error}") from None


def better(monitor: str) -> str:
    """Return "min" for a loss, "max" for everything else."""
    return "min" if monitor.endswith("loss") else "max"


def rates(rate: Any, *, epochs: int, steps: int, begin: int = 0) -> pd.DataFrame:
    """Return the columns epoch (from `begin` + 1 on) and learning_rate, in the first step of each epoch.

    Args:
        rate: from `schedule`.
        epochs, steps: as in `schedule`.
        begin: epochs before this phase.
    """
    values = [float(rate(epoch * steps) if callable(rate) else rate) for epoch in range(epochs)]
    return pd.DataFrame({"epoch": range(begin + 1, begin + epochs + 1), "learning_rate": values})


class _OnIndices(keras.losses.Loss):
    """A loss of shares (n, classes) that takes class indices (n,) as well."""

    def __init__(self, inner: keras.losses.Loss):
        super().__init__(name=inner.name)
        self.inner = inner

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self.inner.call(_shares(y_true, y_pred), y_pred)


class _MacroF1(keras.metrics.F1Score):
    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        super().update_state(_shares(y_true, y_pred), y_pred, sample_weight)


class _AUC(keras.metrics.AUC):
    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        super().update_state(_shares(y_true, y_pred), y_pred, sample_weight)


def _shares(y_true: Any, y_pred: Any) -> Any:
    """Return labels as shares of each class, (n, classes) float32; indices (n,) become one-hot."""
    if len(y_true.shape) == len(y_pred.shape):
        return y_true
    return ops.one_hot(ops.cast(y_true, "int32"), y_pred.shape[-1])


def _accuracy(y_true: Any, y_pred: Any) -> Any:
    indices = ops.argmax(y_true, axis=-1) if len(y_true.shape) == len(y_pred.shape) else y_true
    return keras.metrics.sparse_categorical_accuracy(indices, y_pred)


def loss(spec: str | dict = "cross_entropy", label_smoothing: float = 0.0) -> keras.losses.Loss:
    """Return the loss, which takes labels as class indices (n,) or as shares of each class (n, classes).

    Args:
        spec: "cross_entropy", "focal", or {"name": "focal", "gamma": 2.0, "alpha": 0.25}; alpha may be a list with a
            weight for each class.
        label_smoothing: share of a label that goes to all classes equally, 0 to 1.

    Raises:
        ValueError: an unknown name or argument, or a value that Keras refuses.
    """
    name, arguments = _choice("loss", spec, {"cross_entropy": (), "focal": ("gamma", "alpha")})
    for key, value in arguments.items():
        for number in value if isinstance(value, list) and key == "alpha" else [value]:
            _number(f"loss.{key}", number, 0)
    return _OnIndices(LOSSES[name](label_smoothing=label_smoothing, **arguments))


def metrics(monitor: str = "val_loss") -> list[keras.metrics.Metric]:
    """Return the metrics besides the loss: accuracy, and macro F1 or AUC if `monitor` names it.

    They take labels as the loss does. AUC is the mean over the classes, each against the rest.
    """
    metrics: list[keras.metrics.Metric] = [keras.metrics.MeanMetricWrapper(_accuracy, name="accuracy")]
    if monitor == "val_macro_f1":
        metrics.append(_MacroF1(average="macro", name="macro_f1"))
    if monitor == "val_auc":
        metrics.append(_AUC(multi_label=True, name="auc"))
    return metrics


def _choice(what: str, spec: Any, arguments_of: Mapping[str, Sequence[str]]) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of a choice; `arguments_of` holds the arguments that each name takes."""
    arguments = dict(spec) if isinstance(spec, dict) else {"name": spec}
    name = arguments.pop("name", None)
    if name not in arguments_of:
        raise ValueError(f"{what}: there is no {name!r}.{words.did_you_mean(str(name), arguments_of)}")
    for key in arguments:
        if key not in arguments_of[name]:
            hint = words.did_you_mean(str(key), arguments_of[name]) if arguments_of[name] else " It takes none."
            raise ValueError(f"{what}: {name} has no argument {key!r}.{hint}")
    return name, arguments


def _arguments(kind: type) -> list[str]:
    return [name for name in inspect.signature(kind).parameters if name not in ("learning_rate", "name", "kwargs")]


def _number(what: str, value: Any, least: float, *, above: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < least or (above and value <= least):
        raise ValueError(f"{what} must be a number {'above' if above else 'of at least'} {least:g}; got {value!r}.")
    return value
