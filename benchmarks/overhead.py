"""What notebooks, kernels and imports cost in `make demo`, once it is installed.

    python benchmarks/overhead.py

The demo's recipe is run from the beginning, in a folder of runs of its own. papermill notes how long every cell took:
the rest of a stage's time is the kernel's start and end and the writing of the notebook; the rest of the whole is the
command itself, with fingerprints and the report. Figures are counted as overhead too: without notebooks there
would be none.
"""

import argparse
import ast
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import setting

from helpers.core import disk, project, stages
from helpers.pipeline import recipes

KINDS = ("kernel", "imports", "figures", "work")


def main() -> None:
    """Run the recipe and print where its time went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/elpv.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="STAGE.PARAMETER=VALUE")
    arguments = parser.parse_args()
    print(setting.machine())
    recipe = recipes.load(arguments.recipe, arguments.overrides)
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "helpers.cli.main", "run", arguments.recipe]
        command += [part for override in arguments.overrides for part in ("--set", override)]
        begin = time.perf_counter()
        subprocess.run(command, env=os.environ | {"THAW_RUNS": place}, cwd=project.ROOT, check=True)
        seconds = time.perf_counter() - begin
        stages = {name: stage_seconds(Path(place) / recipe.name / name) for name in recipe.chain()}
    conclude(seconds, stages)


def stage_seconds(folder: Path) -> dict[str, float]:
    """Return the seconds of a finished stage by kind."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for cell in nbformat.read(folder / "notebook.ipynb", as_version=4).cells:
        seconds[kind_of(cell)] += cell.metadata.get("papermill", {}).get("duration") or 0.0
    seconds["kernel"] = disk.read_json(folder / stages.STAGE_FILE)["seconds"] - sum(seconds.values())
    return seconds


def kind_of(cell) -> str:
    """Return what a cell is for: imports, figures, or work."""
    if cell.cell_type != "code":
        return "work"
    tree = ast.parse(cell.source)
    if all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body):
        return "imports"
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return "figures" if "plots" in names else "work"


def conclude(seconds: float, stages: dict[str, dict[str, float]]) -> None:
    """Print the seconds of every stage and kind, and the overhead as a share of all."""
    print(f"\n{'seconds':<14}" + "".join(f"{kind:>10}" for kind in KINDS) + f"{'all':>10}")
    for name, kinds in stages.items():
        print(f"{name:<14}" + "".join(f"{kinds[kind]:>10.1f}" for kind in KINDS) + f"{sum(kinds.values()):>10.1f}")
    total = {kind: sum(kinds[kind] for kinds in stages.values()) for kind in KINDS}
    command = seconds - sum(total.values())
    print(f"{'thaw itself':<14}{'':>40}{command:>10.1f}")
    print(f"{'all':<14}" + "".join(f"{total[kind]:>10.1f}" for kind in KINDS) + f"{seconds:>10.1f}")
    overhead = seconds - total["work"]
    shares = [100 * part / seconds for part in (overhead, overhead - total["figures"])]
    print(f"\nNotebooks, kernels, imports and the command took {shares[0]:.1f} % (wanted: at most 20 %);")
    print(f"without the figures {shares[1]:.1f} %. In all {seconds:.0f} s (wanted: 180).")


if __name__ == "__main__":
    main()
