"""Thaw against plain Keras: the same recipe, the same images, the same machine, one after the other.

    python benchmarks/recipe_speed.py

The recipe is system S1's: a head for 50 epochs at 1e-2, then block 7 for 50 more at 1e-4, with augmentation, here on
EfficientNet-Lite0 and solar cells of ELPV, as many as two cores can train on in plain Keras within minutes.

Thaw's time is that of its stages 03 and 04 from the first to the last second: kernels, imports, figures, saving. Plain
Keras's is that of one process, from its start to the end of training (benchmarks/plain_keras.py says how it was tuned).
Both begin at the same resized images, choose epoch and phase by the validation loss, and are then tested on the same
images, which play no part in the time. Nothing is extrapolated. Processor time is compared too, since other work on the
machine disturbs the clock more.
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

from helpers.core import project

TRAINING = ("head", "fine_tune")
SIDES = ("Thaw", "plain Keras")
MEASURED = {
    "seconds": "training, all of it (s, mean)",
    "epochs": "of which epochs (s, mean)",
    "processor": "processor time, all cores (s, mean)",
}


def main() -> None:
    """Run both sides for each seed and print the times, their ratio and the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=500, help="training images")
    parser.add_argument("--val", type=int, default=80, help="validation images")
    parser.add_argument("--test", type=int, default=1500, help="test images; more make the accuracies surer")
    parser.add_argument("--epochs", type=int, default=50, help="of each phase")
    parser.add_argument("--views", type=int, default=5, help="augmented versions of each image that Thaw makes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    arguments = parser.parse_args()
    parts = (arguments.train, arguments.val, arguments.test)
    print(f"{setting.machine()}\n{' + '.join(map(str, parts))} images, {arguments.epochs} + {arguments.epochs} epochs")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["THAW_RUNS"] = str(folder / "runs")
        source = setting.cells(folder / "cells", sum(parts))
        rows, right = [], []
        for seed in arguments.seeds:
            recipe = setting.s1(
                folder, source, f"seed{seed}", parts=parts, epochs=arguments.epochs, views=arguments.views, seed=seed
            )
            setting.run(recipe, until="resize")
            thaw = thaw_side(recipe)
            keras = keras_side(recipe, folder / "keras.csv")
            rows.append((thaw, keras))
            right.append(correct(recipe, folder / "keras.csv"))
            told = [f"{name} {side['seconds']:.0f} s" for name, side in zip(SIDES, rows[-1], strict=True)]
            told = [f"{one}, {100 * side.mean():.2f} %" for one, side in zip(told, right[-1], strict=True)]
            print(f"seed {seed}: {'; '.join(told)}", flush=True)
        conclude(rows, right)


def thaw_side(recipe) -> dict[str, float]:
    """Train and test with Thaw; return the seconds of the training stages, of their epochs alone, and of all cores."""
    found = setting.run(recipe)
    run = project.runs_folder() / recipe.name
    histories = [pd.read_csv(run / stage / "history.csv") for stage in TRAINING]
    return {
        "seconds": sum(found[stage]["seconds"] for stage in TRAINING),
        "epochs": sum(history["seconds"].sum() for history in histories),
        "processor": sum(found[stage]["processor"] for stage in TRAINING),
    }


def keras_side(recipe, predictions: Path | None) -> dict:
    """Train with plain Keras in a process of its own; test if `predictions` names a file for what it says."""
    command = [sys.executable, str(Path(__file__).with_name("plain_keras.py"))]
    found = other_side(command, plain_task(recipe) | {"predictions": str(predictions or "")})
    return found | {"seconds": found["ended"], "by_epoch": found["epochs"], "epochs": found["ended"] - found["began"]}


def plain_task(recipe) -> dict:
    """Return the recipe as the scripts that train without Thaw take it."""
    head, fine_tune = recipe.resolved("head"), recipe.resolved("fine_tune")
    return {
        "images": str(project.runs_folder() / recipe.name / "resize"),
        "image_size": recipe.resolved("resize")["image_size"],
        "epochs": head["epochs"],
        "rates": [head["learning_rate"], fine_tune["learning_rate"]],
        "unfreeze": fine_tune["unfreeze"],
        "dropout": head["dropout"],
        "flip": head["flip"],
        "seed": head["seed"],
    }


def other_side(command: list[str], task: dict) -> dict:
    """Start a script that trains without Thaw, and return the JSON that it prints last."""
    environment = os.environ | {"PYTHONPATH": str(project.ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    task = json.dumps(task | {"begin": time.time()})
    done = subprocess.run([*command, task], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[-1]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def correct(recipe, predictions: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return which test images Thaw and plain Keras got right, in the same order."""
    ours = pd.read_csv(project.runs_folder() / recipe.name / "evaluate" / "predictions.csv").set_index("path")
    theirs = pd.read_csv(predictions).set_index("path").loc[ours.index]
    return tuple((table["label"] == table["predicted"]).to_numpy(float) for table in (ours, theirs))


def conclude(rows: list[tuple[dict, dict]], right: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Print the means, the ratios of the times and the difference of the accuracies with its interval."""
    print(f"\n{'':<38}" + "".join(f"{name:>14}" for name in SIDES) + f"{'ratio':>8}")
    for key, title in MEASURED.items():
        thaw, keras = (np.mean([side[key] for side in sides]) for sides in zip(*rows, strict=True))
        print(f"{title:<38}{thaw:>14.1f}{keras:>14.1f}{keras / thaw:>8.1f}")
    ours, theirs = (np.concatenate(side) for side in zip(*right, strict=True))
    print(f"{'test accuracy (mean)':<38}{100 * ours.mean():>12.2f} %{100 * theirs.mean():>12.2f} %")
    gain = 100 * (ours - theirs)
    margin = 1.96 * gain.std() / np.sqrt(len(gain))
    thaw, keras = (np.mean([side["seconds"] for side in sides]) for sides in zip(*rows, strict=True))
    print(f"\nThaw is {keras / thaw:.1f} times as fast (wanted: 10).")
    print(
        f"Its test accuracy differs by {gain.mean():+.2f} points, 95 % interval {gain.mean() - margin:+.2f} to"
        f" {gain.mean() + margin:+.2f} (wanted: -0.5 or better)."
    )


if __name__ == "__main__":
    main()
