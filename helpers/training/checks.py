"""Checks of a recipe that only Keras can make: names and arguments of what trains, and layers to thaw.

`child.ask` calls `problems` in a process of its own before a run.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from helpers.core import child, words
from helpers.models import adapters, backbones, classifier, unfreezing
from helpers.models import levels as levels_of
from helpers.training import compiling, fitting, profiling, solving, thaws, throughput, transforms


def check(stage: str, parameters: Mapping[str, Any]) -> None:
    """Check what stage "head" or "fine_tune" trains with, before anything takes time.

    Args:
        stage: its name.
        parameters: its parameters.

    Raises:
        ValueError: something is unknown or out of range; the message lists all of it.
    """
    if found := _problems(stage, parameters):
        raise ValueError("\n".join(found))


def _problems(stage: str, given: Mapping[str, Any]) -> list[str]:
    checks: list[Callable[[], Any]] = [
        lambda: compiling.loss(given["loss"], given["label_smoothing"]),
        lambda: given["stop_smoothed"] and _smoothed(given),
        lambda: profiling.check(given["profile_steps"]),
        lambda: _augmentation(given),
    ]
    if stage == "head":
        checks += [
            lambda: classifier.output_settings(given["output"]),
            lambda: classifier.check_dense(given["dense"]),
            lambda: given["epochs"] and solving.is_solved(given),
            lambda: throughput.check(given["measure_seconds"]),
            lambda: compiling.optimizer(given["optimizer"], 1.0),
            lambda: _schedule(given, given["epochs"]),
        ]
        return _raised(checks)
    try:
        plan = thaws.plan(given["steps"], given)
    except ValueError as error:
        return [str(error), *_raised(checks)]
    checks.append(lambda: adapters.rank(given["adapter"]))
    for thaw in plan:
        checks.append(lambda thaw=thaw: compiling.optimizer(thaw.optimizer, 1.0))
        checks.append(lambda thaw=thaw: _schedule(vars(thaw) | {"monitor": given["monitor"]}, thaw.epochs))
    return _raised(checks)


def _augmentation(given: Mapping[str, Any]) -> None:
    wanted = [given[name] for name in ("augmentation", "flip", "mix")]
    transforms.make(*("none" if what == "same" else what for what in wanted))
    if given["mix"] not in ("none", "same") and given["imbalance"] == "balanced_batches" and given["views"]:
        raise ValueError("mix: views are blended before batches are drawn, so balanced_batches needs views: 0.")


def _smoothed(given: Mapping[str, Any]) -> None:
    unknown = [key for key in given["stop_smoothed"] if key not in ("alpha", "gain", "epochs")]
    if unknown:
        hint = words.did_you_mean(str(unknown[0]), ("alpha", "gain", "epochs"))
        raise ValueError(f"stop_smoothed has no {unknown[0]!r}.{hint}")
    fitting.SmoothedStopping(given["monitor"], **given["stop_smoothed"])


def _schedule(given: Mapping[str, Any], epochs: int) -> None:
    compiling.schedule(given["schedule"], given["learning_rate"], epochs=epochs, steps=100)
    compiling.plateau(given["schedule"], given["monitor"])


def _raised(checks: list[Callable[[], Any]]) -> list[str]:
    found = []
    for one in checks:
        try:
            one()
        except (ValueError, TypeError) as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def check_layers(
    backbone: str,
    image_size: int,
    choices: Mapping[str, Any],
    levels: str | Sequence[str] = "top",
    adapter: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return what is wrong with choices of what to unfreeze and to read, tried on a backbone with random weights.

    Args:
        backbone: its name.
        image_size: pixels.
        choices: the name of a parameter -> its value, see `unfreezing.unfreeze`.
        levels: what the head reads, see `classifier.build`.
        adapter: what phase 2 trains in place of the thawed layers' own weights, see `adapters.takers`.
    """
    found = []
    try:
        body = backbones.build(backbone, image_size, "none")
    except (ValueError, ImportError) as error:
        return [f"head.backbone: {error}"]
    for name, what in choices.items():
        try:
            unfreezing.unfreeze(body, what)
            if adapter and name.startswith("fine_tune."):
                adapters.takers(body, adapter)
        except ValueError as error:
            found.append(f"{name}: {error}")
    try:
        levels_of.read(body, "all" if levels == "auto" else levels, "mean")
    except ValueError as error:
        found.append(f"head.levels: {error}")
    return found


def problems(image_size: int, head: Mapping[str, Any], fine_tune: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the parameters of both phases together.

    Args:
        image_size: pixels.
        head: parameters of the stage head.
        fine_tune: parameters of the stage fine_tune.
    """
    found = [f"head: {problem}" for problem in _problems("head", head)]
    found += [f"fine_tune: {problem}" for problem in _problems("fine_tune", fine_tune)]
    layers = {"fine_tune.unfreeze": fine_tune["unfreeze"]}
    computes = head["views"] and head["epochs"] and not head["from_run"]
    if computes and head["next_unfreeze"] != fine_tune["unfreeze"]:  # else it is checked already, or never used
        layers["head.next_unfreeze"] = head["next_unfreeze"]
    for number, step in enumerate(fine_tune["steps"], 1):
        layers |= {f"fine_tune.steps {number}: unfreeze": step["unfreeze"]} if "unfreeze" in step else {}
    return found + check_layers(head["backbone"], image_size, layers, head["levels"], fine_tune["adapter"])


if __name__ == "__main__":
    child.answer(problems)
