"""Checks of a recipe that only Keras can make: names and arguments of what trains, and layers to thaw.

`child.ask` calls `problems` in a separate process before a run.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from helpers.core import child, words
from helpers.models import adapters, backbones, classifier, unfreezing
from helpers.models import levels as levels_of
from helpers.training import compiling, fitting, profiling, solving, thaws, throughput, transforms


def check(stage: str, parameters: Mapping[str, Any]) -> None:
    """Check what stage "head" or "fine_tune" trains with, before anything slow starts.

    Args:
        stage: its name.
        parameters: its parameters.

    Raises:
        ValueError: something is unknown or out of range; the message lists all of it.
    """
    if lines := _problems(stage, parameters):
        raise ValueError("\n".join(lines))


def _problems(stage: str, parameters: Mapping[str, Any]) -> list[str]:
    checks: list[Callable[[], Any]] = [
        lambda: compiling.loss(parameters["loss"], parameters["label_smoothing"]),
        lambda: parameters["stop_smoothed"] and _smoothed(parameters),
        lambda: profiling.check(parameters["profile_steps"]),
        lambda: _augmentation(parameters),
    ]
    if stage == "head":
        checks += [
            lambda: classifier.output_settings(parameters["output"]),
            lambda: classifier.check_dense(parameters["dense"]),
            lambda: parameters["epochs"] and solving.is_solved(parameters),
            lambda: throughput.check(parameters["measure_seconds"]),
            lambda: compiling.optimizer(parameters["optimizer"], 1.0),
            lambda: _schedule(parameters, parameters["epochs"]),
        ]
        return _raised(checks)
    try:
        plan = thaws.plan(parameters["steps"], parameters)
    except ValueError as error:
        return [str(error), *_raised(checks)]
    checks.append(lambda: adapters.rank(parameters["adapter"]))
    for thaw in plan:
        checks.append(lambda thaw=thaw: compiling.optimizer(thaw.optimizer, 1.0))
        checks.append(lambda thaw=thaw: _schedule(vars(thaw) | {"monitor": parameters["monitor"]}, thaw.epochs))
    return _raised(checks)


def _augmentation(parameters: Mapping[str, Any]) -> None:
    choices = [parameters[name] for name in ("augmentation", "flip", "mix")]
    transforms.make(*("none" if what == "same" else what for what in choices))
    mixes = parameters["mix"] not in ("none", "same")
    if mixes and parameters["imbalance"] == "balanced_batches" and parameters["views"]:
        raise ValueError("mix: views are blended before batches are drawn, so balanced_batches needs views: 0.")


def _smoothed(parameters: Mapping[str, Any]) -> None:
    unknown = [key for key in parameters["stop_smoothed"] if key not in ("alpha", "gain", "epochs")]
    if unknown:
        hint = words.did_you_mean(str(unknown[0]), ("alpha", "gain", "epochs"))
        raise ValueError(f"stop_smoothed has no {unknown[0]!r}.{hint}")
    fitting.SmoothedStopping(parameters["monitor"], **parameters["stop_smoothed"])


def _schedule(parameters: Mapping[str, Any], epochs: int) -> None:
    compiling.schedule(parameters["schedule"], parameters["learning_rate"], epochs=epochs, steps=100)
    compiling.plateau(parameters["schedule"], parameters["monitor"])


def _raised(checks: list[Callable[[], Any]]) -> list[str]:
    messages = []
    for run in checks:
        try:
            run()
        except (ValueError, TypeError) as error:
            messages.append(str(error))
    return list(dict.fromkeys(messages))


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
        adapter: what phase 2 trains instead of the thawed layers' own weights, see `adapters.takers`.
    """
    messages = []
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
            messages.append(f"{name}: {error}")
    try:
        levels_of.read(body, "all" if levels == "auto" else levels, "mean")
    except ValueError as error:
        messages.append(f"head.levels: {error}")
    return messages


def problems(image_size: int, head: Mapping[str, Any], fine_tune: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the parameters of both phases together.

    Args:
        image_size: pixels.
        head: parameters of the stage head.
        fine_tune: parameters of the stage fine_tune.
    """
    messages = [f"head: {problem}" for problem in _problems("head", head)]
    messages += [f"fine_tune: {problem}" for problem in _problems("fine_tune", fine_tune)]
    layers = {"fine_tune.unfreeze": fine_tune["unfreeze"]}
    computes = head["views"] and head["epochs"] and not head["from_run"]
    if computes and head["next_unfreeze"] != fine_tune["unfreeze"]:  # otherwise it is checked already, or never used
        layers["head.next_unfreeze"] = head["next_unfreeze"]
    for number, step in enumerate(fine_tune["steps"], 1):
        layers |= {f"fine_tune.steps {number}: unfreeze": step["unfreeze"]} if "unfreeze" in step else {}
    return messages + check_layers(head["backbone"], image_size, layers, head["levels"], fine_tune["adapter"])


if __name__ == "__main__":
    child.answer(problems)
