"""Checks of a recipe that only Keras can make: names and arguments of what trains, and layers to thaw.

``python -m helpers.training.checks CHOICES`` checks a recipe before a run. CHOICES is JSON: image_size, and for the
stages head and fine_tune their parameters. Problems are printed, one a line; the exit code is then 2.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from helpers.core import words
from helpers.models import backbones, classifier, unfreezing
from helpers.training import compiling, fitting, profiling, thaws, throughput, transforms


def check(stage: str, parameters: Mapping[str, Any]) -> None:
    """Check what stage "head" or "fine_tune" trains with, before anything takes time.

    Args:
        stage: its name.
        parameters: its parameters.

    Raises:
        ValueError: something is unknown or out of range; the message lists all of it.
    """
    problems = _problems(stage, parameters)
    if problems:
        raise ValueError("\n".join(problems))


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
            lambda: throughput.check(given["measure_seconds"]),
            lambda: compiling.optimizer(given["optimizer"], 1.0),
            lambda: _schedule(given, given["epochs"]),
        ]
        return _raised(checks)
    try:
        plan = thaws.plan(given["steps"], given)
    except ValueError as error:
        return [str(error), *_raised(checks)]
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
    problems = []
    for one in checks:
        try:
            one()
        except (ValueError, TypeError) as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def check_unfreeze(backbone: str, image_size: int, choices: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with choices of what to unfreeze, tried on a backbone with random weights.

    Args:
        backbone: its name.
        image_size: pixels.
        choices: the name of a parameter -> its value, see `unfreezing.unfreeze`.
    """
    problems = []
    try:
        body = backbones.build(backbone, image_size, "none")
    except (ValueError, ImportError) as error:
        return [f"head.backbone: {error}"]
    for name, what in choices.items():
        try:
            unfreezing.unfreeze(body, what)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return problems


def _main(arguments: list[str]) -> int:
    choices = json.loads(arguments[0])
    head, fine_tune = choices["head"], choices["fine_tune"]
    problems = [f"head: {problem}" for problem in _problems("head", head)]
    problems += [f"fine_tune: {problem}" for problem in _problems("fine_tune", fine_tune)]
    layers = {"fine_tune.unfreeze": fine_tune["unfreeze"]}
    computes = head["views"] and head["epochs"] and not head["from_run"]
    if computes and head["next_unfreeze"] != fine_tune["unfreeze"]:  # else it is checked already, or never used
        layers["head.next_unfreeze"] = head["next_unfreeze"]
    for number, step in enumerate(fine_tune["steps"], 1):
        layers |= {f"fine_tune.steps {number}: unfreeze": step["unfreeze"]} if "unfreeze" in step else {}
    problems += check_unfreeze(head["backbone"], choices["image_size"], layers)
    print("\n".join(problems))
    return 2 if problems else 0


if __name__ == "__main__":
    code = _main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # TensorFlow would take a second to take leave
