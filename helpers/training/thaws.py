"""The steps of phase 2: what thaws when, and how each step trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import pandas as pd

from helpers.compute import hardware
from helpers.core import notebooks, words
from helpers.models import unfreezing
from helpers.training import compiling

FIELDS = ("unfreeze", "epochs", "learning_rate", "optimizer", "schedule", "batch_size")


@dataclass
class Step:
    """One thawing and the epochs after it; the fields are those of 04's parameters.

    Attributes:
        begin: epochs before this step, those of phase 1 included.
        phase: what history.csv calls it: "fine_tune", and "fine-tune 2", "fine-tune 3" ... for those that follow.
    """

    unfreeze: str | int | float | dict
    epochs: int
    learning_rate: float
    optimizer: str | dict
    schedule: str | dict
    batch_size: int
    begin: int
    phase: str

    @property
    def end(self) -> int:
        """Epochs when this step is done: `fit`'s epochs."""
        return self.begin + self.epochs

    @property
    def span(self) -> dict[str, int]:
        """What `fit` wants to know of this step."""
        return {"initial_epoch": self.begin, "epochs": self.end}

    @property
    def about(self) -> dict[str, Any]:
        """What `fitting.callbacks` wants to know of this step."""
        return {name: getattr(self, name) for name in ("phase", "begin", "end", "optimizer", "schedule")}


def plan(steps: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any], begin: int = 0) -> list[Step]:
    """Return the steps of phase 2, one where `steps` is empty; what a step leaves out is the stage's own parameter.

    Args:
        steps: dicts of any of FIELDS.
        parameters: the stage's parameters.
        begin: epochs of phase 1.

    Raises:
        ValueError: an unknown key, or a value that the parameter of that name could not have.
    """
    found: list[Step] = []
    for number, given in enumerate(steps or [{}], 1):
        _check(given, number)
        values = {name: given.get(name, parameters[name]) for name in FIELDS}
        phase = "fine_tune" if number == 1 else f"fine-tune {number}"
        found.append(Step(**values, begin=found[-1].end if found else begin, phase=phase))
    return found


def _check(given: Mapping[str, Any], number: int) -> None:
    unknown = [name for name in given if name not in FIELDS]
    if unknown:
        raise ValueError(f"steps {number}: there is no {unknown[0]!r}.{words.did_you_mean(str(unknown[0]), FIELDS)}")
    if problems := notebooks.problems(notebooks.find_stage("fine_tune"), dict(given)):
        raise ValueError(f"steps {number}: " + "; ".join(problems))


def table(steps: Sequence[Step]) -> pd.DataFrame:
    """Return the steps as a table, one row each, from the first epoch to the last."""
    table = pd.DataFrame([vars(step) | {"from epoch": step.begin + 1, "to": step.end} for step in steps])
    return table.rename(columns={"phase": "step"}).set_index("step")[["from epoch", "to", *FIELDS]]


def trainable(model: keras.Model, steps: Sequence[Step]) -> pd.DataFrame:
    """Return the table of `unfreezing.unfreeze` for each step; `model` is left as the last step has it."""
    tables = {step.phase: unfreezing.unfreeze(model, step.unfreeze) for step in steps}
    return next(iter(tables.values())) if len(tables) == 1 else pd.concat(tables, names=["step"])


def rates(steps: Sequence[Step], images: int) -> pd.DataFrame:
    """Return the planned learning rate by epoch, as `compiling.rates`, with the column phase.

    Args:
        steps: of `plan`.
        images: training images an epoch.
    """
    found = []
    for step in steps:
        batches = hardware.steps(images, step.batch_size)
        rate = compiling.schedule(step.schedule, step.learning_rate, epochs=step.epochs, steps=batches)
        by_epoch = compiling.rates(rate, epochs=step.epochs, steps=batches, begin=step.begin)
        found.append(by_epoch.assign(phase=step.phase))
    return pd.concat(found, ignore_index=True)


def optimizer(step: Step, model: keras.Model, *, steps: int, layer_decay: float = 1.0) -> keras.optimizers.Optimizer:
    """Return the optimiser of a step, with its schedule and each layer's share of the learning rate.

    Args:
        step: of `plan`.
        model: the classifier, thawed.
        steps: batches an epoch.
        layer_decay: rate of each thawed layer as a share of that of the layer above it, see `unfreezing.layer_shares`.
    """
    rate = compiling.schedule(step.schedule, step.learning_rate, epochs=step.epochs, steps=steps)
    shares = unfreezing.layer_shares(model, layer_decay) if layer_decay < 1 else None
    return compiling.optimizer(step.optimizer, rate, shares=shares)
