"""Thaw against plain Keras and plain PyTorch: the same recipe, images and weights, the same machine, one after another.

    python benchmarks/recipe_speed.py
    python benchmarks/recipe_speed.py --against torch

The recipe is system S1's: a head for 50 epochs at 1e-2, then block 7 for 50 more at 1e-4, with augmentation, here on
EfficientNet-Lite0 and solar cells of ELPV, as many as two cores can train on in plain Keras within minutes.

Thaw's time is that of its stages 03 and 04 from the first to the last second: kernels, imports, figures, saving. The
others' is that of one process, from its start to the end of training (plain_keras.py and plain_torch.py say how they
are tuned). All begin at the same resized images, choose epoch and phase by the validation loss, and are then tested on
the same images, which are not part of the time. Nothing is extrapolated. Processor time is compared too, since other
work on the machine disturbs the clock more. Before PyTorch trains, its network must answer as that of Keras does.

PyTorch is installed the first time into an environment of the benchmarks' own, runs/.torch; or name a Python that has
torch, efficientnet-lite-pytorch, numpy and pillow with --torch.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import setting

from helpers.core import machine, project
from helpers.models.families import efficientnet_lite

TRAINING = ("head", "fine_tune")
RIVALS = {"keras": "plain Keras", "torch": "plain PyTorch"}
WANTED = {"plain Keras": 15, "plain PyTorch": 5}  # times as fast
SAME = 1e-3  # the most that the logits of one network may differ between two libraries
MEASURED = {
    "seconds": "training, all of it (s, mean)",
    "epochs": "of which epochs (s, mean)",
    "processor": "processor time, all cores (s, mean)",
}


def main() -> None:
    """Run all sides for each seed and print the times, their ratios and the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=500, help="training images")
    parser.add_argument("--val", type=int, default=80, help="validation images")
    parser.add_argument("--test", type=int, default=1500, help="test images; more make the accuracies more certain")
    parser.add_argument("--epochs", type=int, default=50, help="of each phase")
    parser.add_argument("--views", type=int, default=5, help="augmented versions of each image that Thaw makes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--against", nargs="+", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--torch", default="", help="a Python with torch and efficientnet-lite-pytorch")
    arguments = parser.parse_args()
    parts = (arguments.train, arguments.val, arguments.test)
    print(f"{setting.machine()}\n{' + '.join(map(str, parts))} images, {arguments.epochs} + {arguments.epochs} epochs")
    commands = {RIVALS[rival]: command(rival, arguments.torch) for rival in dict.fromkeys(arguments.against)}
    times, right = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["THAW_RUNS"] = str(folder / "runs")
        source = setting.cells(folder / "cells", sum(parts))
        for seed in arguments.seeds:
            recipe = setting.s1(
                folder, source, f"seed{seed}", parts=parts, epochs=arguments.epochs, views=arguments.views, seed=seed
            )
            setting.run(recipe, until="resize")
            if RIVALS["torch"] in commands and not times:
                largest = difference(recipe, {RIVALS["keras"]: command("keras")} | commands, folder)
                print(f"Untrained, Keras' and PyTorch's ImageNet logits differ by {largest:.0e} at most", flush=True)
            tables = {name: folder / f"{number}.csv" for number, name in enumerate(commands)}
            times.append({"Thaw": thaw_side(recipe)})
            times[-1] |= {name: rival_side(recipe, commands[name], tables[name]) for name in commands}
            right.append(correct(recipe, tables))
            texts = [f"{name} {side['seconds']:.0f} s" for name, side in times[-1].items()]
            texts = [f"{one}, {100 * side.mean():.2f} %" for one, side in zip(texts, right[-1].values(), strict=True)]
            print(f"seed {seed}: {'; '.join(texts)}", flush=True)
    conclude(times, right)


def command(rival: str, python: str = "") -> list[str]:
    """Return what starts the script that trains without Thaw.

    Args:
        rival: a key of RIVALS.
        python: for PyTorch, a Python that has it; "" for the benchmarks' own.
    """
    started_by = setting.torch_python(python) if rival == "torch" else sys.executable
    return [started_by, str(Path(__file__).with_name(f"plain_{rival}.py"))]


def thaw_side(recipe) -> dict[str, float]:
    """Train and test with Thaw; return the seconds of the training stages, of their epochs alone, and of all cores."""
    measured = setting.run(recipe)
    run = project.runs_folder() / recipe.name
    histories = [pd.read_csv(run / stage / "history.csv") for stage in TRAINING]
    return {
        "seconds": sum(measured[stage]["seconds"] for stage in TRAINING),
        "epochs": sum(history["seconds"].sum() for history in histories),
        "processor": sum(measured[stage]["processor"] for stage in TRAINING),
    }


def rival_side(recipe, started_by: list[str], predictions: Path | None) -> dict:
    """Train without Thaw in a process of its own; test if `predictions` names a file for the results."""
    times = ask(started_by, plain_task(recipe) | {"predictions": str(predictions or "")})
    return times | {"seconds": times["ended"], "by_epoch": times["epochs"], "epochs": times["ended"] - times["began"]}


def plain_task(recipe) -> dict:
    """Return the recipe as the scripts that train without Thaw take it."""
    head, fine_tune = recipe.resolved("head"), recipe.resolved("fine_tune")
    return {
        "images": str(project.runs_folder() / recipe.name / "resize"),
        "image_size": recipe.resolved("resize")["image_size"],
        "weights": str(efficientnet_lite.weights_file("efficientnet_lite0")),
        "epochs": head["epochs"],
        "rates": [head["learning_rate"], fine_tune["learning_rate"]],
        "unfreeze": fine_tune["unfreeze"],
        "dropout": head["dropout"],
        "flip": head["flip"],
        "seed": head["seed"],
        "bfloat16": machine.multiplies_bfloat16(),
    }


def ask(started_by: list[str], task: dict) -> dict:
    """Start a script that trains without Thaw, and return the JSON that it prints last."""
    environment = os.environ | {"PYTHONPATH": str(project.ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    task = json.dumps(task | {"begin": time.time()})
    process = subprocess.run([*started_by, task], env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{started_by[-1]} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def difference(recipe, commands: dict[str, list[str]], folder: Path) -> float:
    """Return by how much the logits of the rivals' networks, not yet trained, differ on validation images at most.

    Raises:
        ValueError: by more than SAME, so they are two networks.
    """
    logits = []
    for name, started_by in commands.items():
        ask(started_by, plain_task(recipe) | {"logits": str(folder / f"{name}.npy")})
        logits.append(np.load(folder / f"{name}.npy"))
    most = float(np.abs(logits[0] - logits[1]).max())
    if not most <= SAME:
        raise ValueError(
            f"The ImageNet logits of {' and '.join(commands)} differ by {most:.2g}, expected {SAME:g} at most: they are"
            " two networks, and their times mean nothing. Compare their weights, padding and preprocessing."
        )
    return most


def correct(recipe, predictions: dict[str, Path]) -> dict[str, np.ndarray]:
    """Return which test images Thaw and its rivals got right, in the same order."""
    ours = project.runs_folder() / recipe.name / "evaluate" / "predictions.csv"
    tables = {name: pd.read_csv(path).set_index("path") for name, path in ({"Thaw": ours} | predictions).items()}
    order = tables["Thaw"].index
    return {name: (table["label"] == table["predicted"])[order].to_numpy(float) for name, table in tables.items()}


def conclude(times: list[dict[str, dict]], right: list[dict[str, np.ndarray]]) -> None:
    """Print the means, the ratios of the times and the differences of the accuracies with their intervals."""
    thaw, *rivals = times[0]
    means = {name: {key: np.mean([sides[name][key] for sides in times]) for key in MEASURED} for name in times[0]}
    print(f"\n{'':<38}{thaw:>10}" + "".join(f"{name:>16}{'ratio':>7}" for name in rivals))
    for key, title in MEASURED.items():
        ours = means[thaw][key]
        columns = "".join(f"{means[name][key]:>16.1f}{means[name][key] / ours:>7.1f}" for name in rivals)
        print(f"{title:<38}{ours:>10.1f}{columns}")
    answers = {name: 100 * np.concatenate([sides[name] for sides in right]) for name in right[0]}
    columns = "".join(f"{answers[name].mean():>14.2f} %{'':>7}" for name in rivals)
    print(f"{'test accuracy (mean)':<38}{answers[thaw].mean():>8.2f} %{columns}\n")
    for name in rivals:
        ratio = means[name]["seconds"] / means[thaw]["seconds"]
        gain = answers[thaw] - answers[name]
        margin = 1.96 * gain.std() / np.sqrt(len(gain))
        print(
            f"Thaw is {ratio:.1f} times as fast as {name} (wanted: {WANTED[name]}). Its test accuracy differs by"
            f" {gain.mean():+.2f} points,\n95 % interval {gain.mean() - margin:+.2f} to {gain.mean() + margin:+.2f}"
            " (wanted: -0.5 or better)."
        )


if __name__ == "__main__":
    main()
