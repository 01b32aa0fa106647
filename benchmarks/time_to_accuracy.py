"""Seconds until Thaw, plain Keras and plain PyTorch first reach the best validation accuracy of plain Keras.

    python benchmarks/time_to_accuracy.py

All three begin at the same resized images with the same ImageNet weights, recipe (system S1's, on EfficientNet-Lite0
and solar cells of ELPV) and augmentation; the clock starts with each process, so imports count. The mark is the best
validation accuracy of all epochs of plain Keras. plain_keras.py and plain_torch.py say how these were tuned.

PyTorch is found as in recipe_speed.py.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import recipe_speed
import setting

SIDES = ("Thaw", "plain Keras", "plain PyTorch")


def main() -> None:
    """Run the three sides for each seed and print when each reached the mark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=300, help="training images")
    parser.add_argument("--val", type=int, default=200, help="validation images")
    parser.add_argument("--epochs", type=int, default=25, help="of each phase")
    parser.add_argument("--views", type=int, default=8, help="augmented versions of each image that Thaw makes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9, 10, 11])
    parser.add_argument("--torch", default="", help="a Python with torch and efficientnet-lite-pytorch")
    arguments = parser.parse_args()
    torch = setting.torch_python(arguments.torch)
    parts = (arguments.train, arguments.val, 20)
    print(f"{setting.machine()}")
    print(f"{arguments.train} + {arguments.val} images, {arguments.epochs} + {arguments.epochs} epochs")
    reached = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["THAW_RUNS"] = str(folder / "runs")
        source = setting.cells(folder / "cells", sum(parts))
        for seed in arguments.seeds:
            recipe = setting.s1(
                folder, source, f"seed{seed}", parts=parts, epochs=arguments.epochs, views=arguments.views, seed=seed
            )
            setting.run(recipe, until="resize")
            epochs = [thaw_epochs(recipe), *(rival_epochs(recipe, rival, torch) for rival in ("keras", "torch"))]
            mark = max(accuracy for _, accuracy in epochs[1])
            reached.append([first(side, mark) for side in epochs])
            times = ", ".join(f"{name} {_text(at)}" for name, at in zip(SIDES, reached[-1], strict=True))
            best = ", ".join(f"{100 * max(accuracy for _, accuracy in side):.1f} %" for side in epochs)
            print(f"seed {seed}: mark {100 * mark:.1f} %: {times} (best of each: {best})", flush=True)
    conclude(np.array(reached))


def thaw_epochs(recipe) -> list[tuple[float, float]]:
    """Train with Thaw; return for each epoch the seconds since its start and the validation accuracy."""
    begin, epochs = time.time(), []

    def watch(stage: str, line: dict) -> None:
        if line["unit"] == "epoch" and "val_accuracy" in line["metrics"]:
            epochs.append((line["time"] - begin, line["metrics"]["val_accuracy"]))

    setting.run(recipe, until="fine_tune", watch=watch)
    return epochs


def rival_epochs(recipe, rival: str, python: str) -> list[tuple[float, float]]:
    """Do the same with one of the rivals of recipe_speed.py."""
    command = recipe_speed.command(rival, python)
    return [tuple(epoch[:2]) for epoch in recipe_speed.rival_side(recipe, command, None)["by_epoch"]]


def first(epochs: list[tuple[float, float]], mark: float) -> float:
    """Return the seconds at which the accuracy first reached the mark; infinity if it never did."""
    return next((seconds for seconds, accuracy in epochs if accuracy >= mark - 1e-6), np.inf)


def conclude(reached: np.ndarray) -> None:
    """Print the median times (seeds, sides), how many times Thaw's they are, and how often the mark was reached."""
    print(f"\n{'seconds until the mark':<26}{'median':>10}{'against Thaw':>16}{'reached':>12}")
    medians = np.median(reached, axis=0)  # a side that never gets there counts as the slowest
    for name, median, column in zip(SIDES, medians, reached.T, strict=True):
        ratio = f"{median / medians[0]:.1f} times" if np.isfinite([median, medians[0]]).all() else "-"
        print(f"{name:<26}{_text(median):>10}{ratio:>16}{np.isfinite(column).sum():>7} of {len(column)}")


def _text(seconds: float) -> str:
    return f"{seconds:.0f} s" if np.isfinite(seconds) else "never"


if __name__ == "__main__":
    main()
