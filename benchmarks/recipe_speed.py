"""Thaw against plain Keras: the same recipe, the same images, the same machine, one after the other.

    python benchmarks/recipe_speed.py

The recipe is system S1's: a head for 50 epochs at 1e-2, then block 7 for 50 more at 1e-4, with augmentation, here on
EfficientNet-Lite0 and solar cells of ELPV, as many as two cores can train on in plain Keras within minutes.

Thaw's time is that of its stages 03 and 04 from the first to the last second: kernels, imports, figures, saving. Plain
Keras's is that of one process, from its start to the end of training (benchmarks/plain_keras.py says how it was tuned).
Both begin at the same resized images, choose epoch and phase by the validation loss, and are then tested on the same
images, which play no part in the time. Nothing is extrapolated.
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

from helpers import pipeline, runs

TRAINING = ("head", "fine_tune")


def main() -> None:
    """Run both sides for each seed and print the times, their ratio and the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=300, help="training images")
    parser.add_argument("--val", type=int, default=80, help="validation images")
    parser.add_argument("--test", type=int, default=1500, help="test images; more make the accuracies surer")
    parser.add_argument("--epochs", type=int, default=50, help="of each phase")
    parser.add_argument("--views", type=int, default=8, help="augmented versions of each image that Thaw makes")
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
            rows.append([seed, thaw["seconds"], keras["ended"], keras["ended"] - keras["began"], thaw["epochs"]])
            right.append(correct(recipe, folder / "keras.csv"))
            told = f"Thaw {rows[-1][1]:.0f} s, {100 * right[-1][0].mean():.2f} %"
            print(
                f"seed {seed}: {told}; plain Keras {rows[-1][2]:.0f} s, {100 * right[-1][1].mean():.2f} %", flush=True
            )
        conclude(rows, right)


def thaw_side(recipe) -> dict[str, float]:
    """Train and test with Thaw; return the seconds of the training stages and of their epochs alone."""
    found = setting.run(recipe)
    run = pipeline.runs_folder() / recipe.name
    histories = [pd.read_csv(run / stage / "history.csv") for stage in TRAINING]
    return {
        "seconds": sum(found[stage]["seconds"] for stage in TRAINING),
        "epochs": sum(history["seconds"].sum() for history in histories),
    }


def keras_side(recipe, predictions: Path | None) -> dict:
    """Train with plain Keras in a process of its own; test if `predictions` names a file for what it says."""
    command = [sys.executable, str(Path(__file__).with_name("plain_keras.py"))]
    return other_side(command, plain_task(recipe) | {"predictions": str(predictions or "")})


def plain_task(recipe) -> dict:
    """Return the recipe as the scripts that train without Thaw take it."""
    head, fine_tune = recipe.resolved("head"), recipe.resolved("fine_tune")
    return {
        "images": str(pipeline.runs_folder() / recipe.name / "resize"),
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
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    task = json.dumps(task | {"begin": time.time()})
    done = subprocess.run([*command, task], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[-1]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def correct(recipe, predictions: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return which test images Thaw and plain Keras got right, in the same order."""
    ours = pd.read_csv(pipeline.runs_folder() / recipe.name / "evaluate" / "predictions.csv").set_index("path")
    theirs = pd.read_csv(predictions).set_index("path").loc[ours.index]
    return tuple((table["label"] == table["predicted"]).to_numpy(float) for table in (ours, theirs))


def conclude(rows: list[list[float]], right: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Print the means, the ratio of the times and the difference of the accuracies with its interval."""
    _, thaw, keras, keras_epochs, thaw_epochs = (np.mean(column) for column in zip(*rows, strict=True))
    ours, theirs = (np.concatenate(side) for side in zip(*right, strict=True))
    gain = 100 * (ours - theirs)
    margin = 1.96 * gain.std() / np.sqrt(len(gain))
    print(f"\n{'':<34}{'Thaw':>12}{'plain Keras':>14}")
    print(f"{'training, all of it (s, mean)':<34}{thaw:>12.1f}{keras:>14.1f}")
    print(f"{'of which epochs (s, mean)':<34}{thaw_epochs:>12.1f}{keras_epochs:>14.1f}")
    print(f"{'test accuracy (mean)':<34}{100 * ours.mean():>10.2f} %{100 * theirs.mean():>12.2f} %")
    print(f"\nThaw is {keras / thaw:.1f} times as fast (wanted: 10).")
    print(
        f"Its test accuracy differs by {gain.mean():+.2f} points, 95 % interval {gain.mean() - margin:+.2f} to"
        f" {gain.mean() + margin:+.2f} (wanted: -0.5 or better)."
    )


if __name__ == "__main__":
    main()
