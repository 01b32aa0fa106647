"""Each system's recipe end to end, to its report: python benchmarks/systems.py (or `make systems`)

The systems' own data sets are in no package registry and their networks take hours without a GPU. So every recipe is
run unchanged except for three things: the images are those of the built-in set `textile`, smaller, and arranged in the
form that the recipe reads (folders, a CSV, train and test halves, boxes, unlabelled images); EfficientNet-Lite0
replaces the backbone; and each phase has few epochs. The accuracy says nothing about the systems; the check is that the
recipe runs. Everything is made again in runs/systems/; S4's variants share their common stages.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from helpers.cli import terminal, two_stage
from helpers.core import disk, project, words
from helpers.data import images, sources
from helpers.pipeline import recipes

UNLABELLED = 20  # images that are only predicted
EPOCHS = {"head": 4, "fine_tune": 2}
UNFREEZE = {"s3_butterflies": "block6"}  # the others name what EfficientNet-Lite0 has too
TWO_STAGES = "s5_kenyan_food"
SUBMISSIONS = {"s2_dogs": "id,*", "s5_kenyan_food": "id,class"}


def main() -> None:
    """Run each recipe and print a line about it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600, help="of textile's 2,000, equally many of every class")
    parser.add_argument("--size", type=int, default=160, help="pixels of the square images")
    parser.add_argument("names", nargs="*", help="recipes, e.g. s4_cars; all by default")
    arguments = parser.parse_args()
    console, paths = Console(highlight=False, soft_wrap=True), sorted((project.ROOT / "recipes").glob("s[1-5]*.yaml"))
    paths += sorted((project.ROOT / "recipes" / "s4").glob("*.yaml"))
    os.environ["THAW_RUNS"] = str(project.resolve(os.environ.get("THAW_RUNS", "runs")) / "systems")
    shutil.rmtree(project.runs_folder(), ignore_errors=True)
    lines = []
    for path in paths:
        name = recipes.load(path).name
        if arguments.names and name not in arguments.names:
            continue
        place = project.runs_folder() / ".data" / name
        recipe = recipes.load(path, changes(path, place, arguments.images, arguments.size))
        recipe.published = {}  # which is about other images
        start = time.time()
        terminal.run(recipe, console)
        lines.append(f"{name:<18} {result(recipe)}, {time.time() - start:.0f} s")
        if name in SUBMISSIONS:
            lines[-1] += f"; {submission(name, place / 'test', SUBMISSIONS[name])}"
        if name == TWO_STAGES:
            first, second, *_ = disk.read_json(project.runs_folder() / name / "evaluate" / "class_names.json")
            page = two_stage.run(str(project.runs_folder() / name), f"[[{first}, {second}]]", console)
            lines[-1] += f"; two stages: {project.display_path(page)}"
        console.print(lines[-1] + "\n", markup=False)
    console.print("\n".join(lines), markup=False)


def changes(path: Path, place: Path, count: int, size: int) -> list[str]:
    """Return the overrides with which a recipe runs on images that are arranged for it below `place`."""
    recipe = recipes.load(path)
    overrides = [*lay_out(recipe, place, count), f"resize.image_size={size}", "head.backbone=efficientnet_lite0"]
    epochs = {stage: min(number, recipe.resolved(stage)["epochs"]) for stage, number in EPOCHS.items()}
    overrides += [f"{stage}.epochs={number}" for stage, number in epochs.items()]
    return overrides + ([f"fine_tune.unfreeze={UNFREEZE[recipe.name]}"] if recipe.name in UNFREEZE else [])


def lay_out(recipe: recipes.Recipe, place: Path, count: int) -> list[str]:
    """Arrange `count` images of textile as links, as the recipe reads its own; return the overrides that name them."""
    textile = sources.read(recipes.Recipe("textile", {"explore": {"source": "textile"}}).resolved("explore"))
    groups = textile.table.groupby("label", sort=True)
    table = groups.head(count // groups.ngroups).reset_index(drop=True)
    if recipe.stages["explore"].get("labels"):
        return _with_labels(recipe, table, textile.root, place)
    halves = recipe.resolved("split")["method"] == "predefined"
    for row, (path, label) in enumerate(zip(table["path"], table["label"], strict=True)):
        if "undersample" in recipe.stages["split"] and label == "global" and row % 4:
            continue  # one class is a quarter of the others
        _link(textile.root / path, place / (("train", "test")[row % 2] if halves else "") / label / Path(path).name)
    return [f"explore.source={place}", *_boxes(recipe, place)]


def _with_labels(recipe: recipes.Recipe, table, root: Path, place: Path) -> list[str]:
    explore, rows = recipe.stages["explore"], []
    (place / "labels.csv").parent.mkdir(parents=True)
    for row, (path, label) in enumerate(zip(table["path"], table["label"], strict=True)):
        name, unlabelled = f"{label}-{Path(path).stem}", row % (len(table) // UNLABELLED) == 0
        _link(root / path, place / ("test" if unlabelled else "train") / f"{name}{explore['suffix']}")
        rows += [] if unlabelled else [(name, label)]
    with open(place / "labels.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([(explore["path_column"], explore["label_column"]), *rows])
    return [f"explore.source={place / 'train'}", f"explore.labels={place / 'labels.csv'}"]


def _boxes(recipe: recipes.Recipe, place: Path) -> list[str]:
    """Write boxes that replace the detector: the middle of every second image, as a car of COCO."""
    if "crop" not in recipe.stages:
        return []
    file, rows = place.with_suffix(".csv"), []
    for path in sorted(place.rglob("*.jpg"))[::2]:
        width, height = images.open_image(path.read_bytes()).size
        rows.append((path.relative_to(place).as_posix(), width // 8, height // 8, width * 3 // 4, height * 3 // 4, 2))
    with open(file, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("path", "x", "y", "width", "height", "class"), *rows])
    return ["crop.detector=", f"crop.boxes={file}"]


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


def result(recipe: recipes.Recipe) -> str:
    """Return the run's accuracy with its interval, after checking that the report is there."""
    run = project.runs_folder() / recipe.name
    if not (run / "report.html").is_file():
        raise RuntimeError(f"{recipe.name} left no report.")
    measured = disk.read_json(run / "evaluate" / "metrics.json")
    value, low, high = (words.percent(measured["accuracy"][key]) for key in ("value", "low", "high"))
    return f"accuracy {value} ({low} to {high}) on {measured['n']} images of {measured['part']}"


def submission(run: str, folder: Path, columns: str) -> str:
    """Predict the unlabelled images as a user would, and return what the submission holds."""
    file = project.runs_folder() / run / "submission.csv"
    command = [sys.executable, "-m", "helpers.cli.main", "predict", str(project.runs_folder() / run), str(folder)]
    subprocess.run(
        [*command, "--csv", str(file), "--columns", columns], check=True, capture_output=True, cwd=project.ROOT
    )
    with open(file, newline="", encoding="utf-8") as stream:
        header, *rows = list(csv.reader(stream))
    if len(rows) != len(list(folder.iterdir())):
        raise RuntimeError(f"{file} has {len(rows)} rows for {len(list(folder.iterdir()))} images.")
    return f"submission: {len(rows)} rows of {', '.join(header)}"


if __name__ == "__main__":
    main()
