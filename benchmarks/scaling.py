"""Time and memory of each stage for one, three and ten times the images.

    python benchmarks/scaling.py

The images are solar cells of ELPV, the recipe a short one with both phases. Each stage is a process of its own; its
memory is the most that this process held. A stage whose time grows as the images do takes less than ten times as long
at ten times the images, since its start costs the same.
"""

import argparse
import os
import tempfile
from pathlib import Path

import setting


def main() -> None:
    """Run each size from the beginning and print the growth of every stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=262, help="images at 1 x; ELPV has 2,624 in all")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 3, 10])
    parser.add_argument("--epochs", type=int, default=5, help="of each phase")
    parser.add_argument("--views", type=int, default=4, help="augmented versions of each image")
    arguments = parser.parse_args()
    print(f"{setting.machine()}\n{arguments.images} images, {arguments.epochs} + {arguments.epochs} epochs")
    runs = []
    for factor in arguments.factors:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            os.environ["THAW_RUNS"] = str(folder / "runs")
            source = setting.cells(folder / "cells", factor * arguments.images)
            runs.append(setting.run(recipe(folder, source, arguments.epochs, arguments.views)))
        print(f"{factor} x: {sum(stage['seconds'] for stage in runs[-1].values()):.0f} s", flush=True)
    conclude(arguments.factors, runs)


def recipe(folder: Path, source: Path, epochs: int, views: int):
    """Return a recipe with both phases on EfficientNet-Lite0."""
    content = {"name": "scaling", "explore": {"source": str(source)}, "resize": {"image_size": 224}}
    content["head"] = {"backbone": "efficientnet_lite0", "next_unfreeze": "block7", "epochs": epochs, "views": views}
    content["fine_tune"] = {"unfreeze": "block7", "epochs": epochs, "views": views}
    return setting.recipe(folder, content)


def conclude(factors: list[int], runs: list[dict[str, dict[str, float]]]) -> None:
    """Print seconds and memory of every stage, and the growth from the fewest to the most images."""
    heads = "".join(f"{f'{factor} x':>10}" for factor in factors)
    for what, title, digits in (("seconds", "seconds", 1), ("memory_mb", "peak memory (MB)", 0)):
        print(f"\n{title:<18}{heads}{'growth':>10}")
        for stage in runs[0]:
            _print_row(stage, [run[stage][what] for run in runs], digits)
        together = sum if what == "seconds" else max
        _print_row("all", [together(stage[what] for stage in run.values()) for run in runs], digits)
    times = factors[-1] / factors[0]
    print(f"\nWanted for {times:g} times the images: at most {1.05 * times:g} times the seconds, and the same memory.")


def _print_row(name: str, values: list[float], digits: int) -> None:
    print(f"{name:<18}" + "".join(f"{value:>10,.{digits}f}" for value in values) + f"{values[-1] / values[0]:>9.2f}x")


if __name__ == "__main__":
    main()
