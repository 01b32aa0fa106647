"""What notebooks, kernels and imports cost in `make demo`, and what forked kernels save of it.

    python benchmarks/overhead.py

The demo's recipe runs twice from the beginning, each time in a folder of runs of its own: with an ordinary kernel for
each stage, and with kernels that are forks of one process that has imported the libraries. papermill notes how long
every cell took. The rest of a stage's time is the kernel's start and end and the writing of the notebook. The rest of
the whole is the command itself, with fingerprints and the report. Figures are overhead too: without notebooks there
would be none. A cell that computes and draws counts as work.
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
from helpers.pipeline import kernels, recipes

KINDS = ("kernel", "imports", "figures", "work")
WAYS = {"ordinary kernels": "no", "forked kernels": "yes"}
DRAWING = "helpers.reports"


def main() -> None:
    """Run the recipe in both ways, print where the time went, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/elpv.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="STAGE.PARAMETER=VALUE")
    arguments = parser.parse_args()
    print(setting.machine())
    recipe, seconds = recipes.load(arguments.recipe, arguments.overrides), {}
    for way, forked in WAYS.items():
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "helpers.cli.main", "run", arguments.recipe]
            command += [part for override in arguments.overrides for part in ("--set", override)]
            variables = os.environ | {"THAW_RUNS": place, kernels.SWITCH: forked}
            begin = time.perf_counter()
            subprocess.run(command, env=variables, cwd=project.ROOT, check=True)
            seconds[way] = time.perf_counter() - begin
            by_stage = {name: stage_seconds(Path(place) / recipe.name / name) for name in recipe.chain()}
        conclude(way, seconds[way], by_stage)
    ordinary, forked = seconds.values()
    print(f"\nordinary {ordinary:.0f} s, forked {forked:.0f} s: ratio {ordinary / forked:.2f}")


def stage_seconds(folder: Path) -> dict[str, float]:
    """Return the seconds of a finished stage by kind."""
    seconds = dict.fromkeys(KINDS, 0.0)
    cells = nbformat.read(folder / "notebook.ipynb", as_version=4).cells
    packages = packages_of(cells)
    for cell in cells:
        seconds[kind_of(cell, packages)] += cell.metadata.get("papermill", {}).get("duration") or 0.0
    seconds["kernel"] = disk.read_json(folder / stages.STAGE_FILE)["seconds"] - sum(seconds.values())
    return seconds


def packages_of(cells: list) -> dict[str, str]:
    """Return the package of each module of the project that a notebook imports, by the module's name."""
    nodes = [node for cell in cells if cell.cell_type == "code" for node in ast.walk(ast.parse(cell.source))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module.startswith("helpers")]
    return {alias.asname or alias.name: node.module for node in imports for alias in node.names}


def kind_of(cell, packages: dict[str, str]) -> str:
    """Return what a cell is for: imports, figures, or work."""
    if cell.cell_type != "code":
        return "work"
    tree = ast.parse(cell.source)
    if all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body):
        return "imports"
    used = {packages.get(node.id) for node in ast.walk(tree) if isinstance(node, ast.Name)} - {None}
    return "figures" if used == {DRAWING} else "work"


def conclude(way: str, seconds: float, by_stage: dict[str, dict[str, float]]) -> None:
    """Print the seconds of every stage and kind, and the overhead as a share of all."""
    print(f"\n{way:<18}" + "".join(f"{kind:>10}" for kind in KINDS) + f"{'all':>10}")
    for name, kinds in by_stage.items():
        print(f"{name:<18}" + "".join(f"{kinds[kind]:>10.1f}" for kind in KINDS) + f"{sum(kinds.values()):>10.1f}")
    total = {kind: sum(kinds[kind] for kinds in by_stage.values()) for kind in KINDS}
    command = seconds - sum(total.values())
    print(f"{'thaw itself':<18}{'':>40}{command:>10.1f}")
    print(f"{'all':<18}" + "".join(f"{total[kind]:>10.1f}" for kind in KINDS) + f"{seconds:>10.1f}")
    overhead = seconds - total["work"]
    shares = [100 * part / seconds for part in (overhead, overhead - total["figures"])]
    print(f"Notebooks, kernels, imports and the command took {shares[0]:.1f} %, without the figures {shares[1]:.1f} %.")


if __name__ == "__main__":
    main()
