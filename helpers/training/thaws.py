"""The thaws of phase 2: which layers thaw when, how each thaw trains, and how several train in a row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import pandas as pd

from helpers.compute import frontier, hardware
from helpers.core import notebooks, words
from helpers.models import adapters, unfreezing
from helpers.training import compiling, datasets, feeds, fitting, saving, transforms

FIELDS = ("unfreeze", "epochs", "learning_rate", "optimizer", "schedule", "batch_size")


@dataclass
class Thaw:
    """One thaw and the epochs after it; the first six fields are those of 04's parameters.

    Attributes:
        begin: epochs before this thaw, those of phase 1 included: `fit`'s initial_epoch.
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
        """Epochs when this thaw is done: `fit`'s epochs."""
        return self.begin + self.epochs


def plan(steps: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any], begin: int = 0) -> list[Thaw]:
    """Return the thaws of phase 2, one if `steps` is empty; a step without a key takes the stage's parameter.

    Args:
        steps: dicts of any of FIELDS.
        parameters: the stage's parameters.
        begin: epochs of phase 1.

    Raises:
        ValueError: an unknown key, or a value that the parameter of that name could not have.
    """
    thaws: list[Thaw] = []
    for number, changes in enumerate(steps or [{}], 1):
        _check(changes, number)
        values = {name: changes.get(name, parameters[name]) for name in FIELDS}
        phase = "fine_tune" if number == 1 else f"fine-tune {number}"
        thaws.append(Thaw(**values, begin=thaws[-1].end if thaws else begin, phase=phase))
    return thaws


def _check(changes: Mapping[str, Any], number: int) -> None:
    unknown = [name for name in changes if name not in FIELDS]
    if unknown:
        raise ValueError(f"steps {number}: there is no {unknown[0]!r}.{words.did_you_mean(str(unknown[0]), FIELDS)}")
    if problems := notebooks.problems(notebooks.find_stage("fine_tune"), dict(changes)):
        raise ValueError(f"steps {number}: " + "; ".join(problems))


def table(thaws: Sequence[Thaw]) -> pd.DataFrame:
    """Return the thaws as a table, one row each, from the first epoch to the last."""
    rows = pd.DataFrame([vars(thaw) | {"from epoch": thaw.begin + 1, "to": thaw.end} for thaw in thaws])
    return rows.rename(columns={"phase": "thaw"}).set_index("thaw")[["from epoch", "to", *FIELDS]]


def rates(thaws: Sequence[Thaw], images: int) -> pd.DataFrame:
    """Return the planned learning rate by epoch, as `compiling.rates`, with the column phase.

    Args:
        thaws: of `plan`.
        images: training images an epoch.
    """
    tables = []
    for thaw in thaws:
        batches = hardware.steps(images, thaw.batch_size)
        rate = compiling.schedule(thaw.schedule, thaw.learning_rate, epochs=thaw.epochs, steps=batches)
        by_epoch = compiling.rates(rate, epochs=thaw.epochs, steps=batches, begin=thaw.begin)
        tables.append(by_epoch.assign(phase=thaw.phase))
    return pd.concat(tables, ignore_index=True)


def optimizer(thaw: Thaw, model: keras.Model, *, steps: int, layer_decay: float = 1.0) -> keras.optimizers.Optimizer:
    """Return the optimiser of a thaw, with its schedule and each layer's share of the learning rate.

    Args:
        thaw: of `plan`.
        model: the classifier, thawed.
        steps: batches an epoch.
        layer_decay: rate of each thawed layer as a share of that of the layer above it, see `unfreezing.layer_shares`.
    """
    rate = compiling.schedule(thaw.schedule, thaw.learning_rate, epochs=thaw.epochs, steps=steps)
    shares = unfreezing.layer_shares(model, layer_decay) if layer_decay < 1 else None
    return compiling.optimizer(thaw.optimizer, rate, shares=shares)


def train(
    thaws: Sequence[Thaw],
    model: keras.Model,
    train: datasets.Folder,
    val: datasets.Folder,
    *,
    out: Path,
    augment: transforms.Augmentation | None,
    parameters: Mapping[str, Any],
) -> None:
    """Train all thaws but the last, each from the best weights of all before it, as the cells of 04 train one.

    A finished thaw is not trained again. At the end `model` has the best weights, and is thawed as by the last of them.

    Args:
        thaws: of `plan`, without the last.
        model: the classifier.
        train, val: the images.
        out: the stage's folder, where the best weights after each are kept until `saving.save`.
        augment: as `transforms.make` returns it.
        parameters: the stage's parameters.
    """
    for thaw in thaws:
        unfreezing.unfreeze(model, thaw.unfreeze)
        best = saving.best_after(out, thaw.end)
        if not best.is_file():
            _fit(thaw, model, train, val, out, augment, parameters)
            if saving.best_epoch(saving.read_history(out), parameters["monitor"])["epoch"] <= thaw.begin:
                saving.bare(model).load_weights(saving.best_after(out, thaw.begin))
            adapters.merge(model)
            saving.save_weights(saving.bare(model), best)
        saving.bare(model).load_weights(best)


def _fit(thaw, model, train, val, out: Path, augment, parameters: Mapping[str, Any]) -> None:
    """Do what the cells of 04 do for the last thaw."""
    with hardware.scope():
        adapters.add(model, parameters["adapter"], seed=parameters["seed"])
    draws = {"seed": parameters["seed"], "augment": augment}
    batches = {"batch_size": thaw.batch_size, "balanced": parameters["imbalance"] == "balanced_batches"}
    sizes = {name: parameters[name] for name in ("views", "cache_gb")}
    cut = frontier.cut(model)
    banks = feeds.fill_banks(cut, train, val, folder=out.parent / "cache", **draws, **sizes)
    feed = (
        feeds.from_banks(cut, banks, seed=parameters["seed"], **batches)
        if banks
        else feeds.whole_model(model, train, val, **draws, **batches)
    )
    with hardware.scope():
        feed.model.compile(
            optimizer=optimizer(thaw, model, steps=feed.steps, layer_decay=parameters["layer_decay"]),
            loss=compiling.loss(parameters["loss"], parameters["label_smoothing"]),
            metrics=compiling.metrics(parameters["monitor"]),
            steps_per_execution=feed.steps_per_execution,
        )
    watched = {name: parameters[name] for name in ("monitor", "patience", "stop_smoothed", "profile_steps")}
    callbacks = fitting.callbacks(
        out,
        phase=thaw.phase,
        images=len(train),
        begin=thaw.begin,
        end=thaw.end,
        optimizer=thaw.optimizer,
        schedule=thaw.schedule,
        **watched,
    )
    with hardware.batch_that_fits(feed.model, feed.train, thaw.batch_size):
        feed.model.fit(
            feed.train,
            validation_data=feed.val,
            initial_epoch=thaw.begin,
            epochs=thaw.end,
            class_weight=fitting.class_weights(train.labels, parameters["imbalance"]),
            callbacks=[feed.clock, *callbacks],
            shuffle=False,
            verbose=fitting.verbosity(),
        )
    if not parameters["keep_cache"]:
        feed.remove_cache()
