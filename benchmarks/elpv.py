"""Accuracy on ELPV under the published protocol, mean of several seeds: python benchmarks/elpv.py

Each seed is another split (75 : 25, stratified by probability and module type), another initial head and another order.
Every run uses the same notebooks as `thaw run recipes/elpv_full.yaml`; validation chooses epoch and phase.
Published (Deitsch et al., Solar Energy 185, 2019): SVM 82.44 %, VGG-19 88.42 %.
"""

import argparse
import statistics

from rich.console import Console

from helpers.cli import terminal
from helpers.core import disk, project
from helpers.pipeline import recipes

NAMES = ("accuracy", "balanced_accuracy", "macro_f1")


def main() -> None:
    """Run each seed and print its figures, then their mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/elpv_full.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="STAGE.PARAMETER=VALUE")
    arguments = parser.parse_args()
    console, rows = Console(highlight=False, soft_wrap=True), []
    for seed in arguments.seeds:
        seeds = [f"{stage}.seed={seed}" for stage in ("split", "head", "fine_tune")]
        recipe = recipes.load(arguments.recipe, [*arguments.overrides, *seeds])
        recipe.name = f"{recipe.name}-seed{seed}"
        terminal.run(recipe, console)
        metrics = disk.read_json(project.runs_folder() / recipe.name / "evaluate" / "metrics.json")
        rows.append([metrics[name]["value"] for name in NAMES])
    console.print(f"\n{'seed':<8}" + "".join(f"{name:>20}" for name in NAMES))
    for seed, values in zip(arguments.seeds, rows, strict=True):
        console.print(f"{seed:<8}" + "".join(f"{100 * value:>18.2f} %" for value in values))
    means = [statistics.mean(column) for column in zip(*rows, strict=True)]
    console.print(f"{'mean':<8}" + "".join(f"{100 * value:>18.2f} %" for value in means))
    console.print("Published: VGG-19 88.42 %, SVM 82.44 % accuracy.")


if __name__ == "__main__":
    main()
