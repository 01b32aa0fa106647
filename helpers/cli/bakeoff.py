"""The bake-off: which backbone suits a recipe's images, judged by a probe before anything is trained.

The recipe's stages up to the resized images are made as always and shared with its run. The store then keeps
notebooks/bakeoff.ipynb like one of them; it writes its features where the training stages look for theirs.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from rich.console import Console

from helpers.cli import terminal
from helpers.core import notebooks, project, words
from helpers.evaluation import probe
from helpers.models import backbones
from helpers.pipeline import chain, planning, recipes


def run(recipe: recipes.Recipe, names: Sequence[str], console: Console, *, own_size: bool = False) -> Path:
    """Compare backbones on the validation images of `recipe`; the result is runs/<name>/bakeoff.

    Args:
        recipe: a checked recipe. Its `head.backbone` is not used.
        names: the backbones.
        console: where each stage gets a line.
        own_size: give each backbone images of the size that its ImageNet weights were trained at, instead of the
            recipe's.

    Returns:
        The folder of the result.

    Raises:
        ValueError: a backbone is unknown, or the recipe cannot be run.
        planning.StageError: a stage failed.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--backbones: name at least one, and each once; got {', '.join(names) or 'none'}.")
    size, sizes = recipe.resolved(_images())["image_size"], [backbones.spec(name).size for name in names]
    extra_sizes = set(sizes) if own_size else set()
    data = _until_resized(recipe)
    extra_steps = [_at_size(recipe, other) for other in sorted(extra_sizes - {size, None})]
    steps = [*data, *extra_steps, _step(recipe, names, [data[-1], *extra_steps])]
    for event in chain.make(steps, **terminal.following(console)):
        terminal.show_made(event, console)
    return steps[-1].link


def as_text(folder: Path) -> str:
    """Return the ranking in a folder that `run` made as lines for a terminal, what is not available, and the advice."""
    table = pd.read_csv(folder / "bakeoff.csv")
    lines = [f"{'backbone':<24} {'accuracy on validation':<28} {'ms/image':>9} {'memory':>9} {'weights':>9}"]
    for row in table[table["problem"].isna()].itertuples():
        value, low, high = (words.percent(part) for part in (row.accuracy, row.low, row.high))
        accuracy = f"{value} ({low} to {high})"
        lines.append(
            f"{row.backbone:<24} {accuracy:<28} {1e3 / row.images_per_second:>9,.1f} {row.memory_mb:>6,.0f} MB"
            f" {row.model_mb:>6,.0f} MB"
        )
    failed = table[table["problem"].notna()]
    lines += [f"{row.backbone:<24} {row.problem.splitlines()[0]}" for row in failed.itertuples()]
    return "\n".join([*lines, probe.recommendation(table)])


def _images() -> str:
    """Return the stage whose images the notebook reads: those of one size."""
    return notebooks.studies()["bakeoff"].inputs["images"]


def _until_resized(recipe: recipes.Recipe) -> list[planning.Step]:
    steps = planning.plan(recipe)
    names = [step.stage.name for step in steps]
    return steps[: names.index(_images()) + 1]


def _at_size(recipe: recipes.Recipe, size: int) -> planning.Step:
    """Return the step that resizes the recipe's images to another size, linked to beside the recipe's own run."""
    section = recipe.stages.get(_images(), {}) | {"image_size": size}
    step = _until_resized(replace(recipe, stages=recipe.stages | {_images(): section}))[-1]
    # A stage made by hand is in the run itself and has its own size; this one comes from the store.
    return replace(step, link=step.link.parent / "sizes" / str(size) / step.link.name)


def _step(recipe: recipes.Recipe, names: Sequence[str], resized: list[planning.Step]) -> planning.Step:
    """Return the notebook as a step: its inputs are the resized images, in the recipe's size first."""
    study, head = notebooks.studies()["bakeoff"], recipe.resolved("head")
    parameters = {name: p.default for name, p in study.settings.items() if name != "resized"}
    parameters |= {name: head[name] for name in ("next_unfreeze", "cache_gb", "seed")}
    parameters |= {"backbones": list(names), "weights": "none" if head["weights"] == "none" else "imagenet"}
    fingerprints = {f"{_images()} {number}": step.fingerprint for number, step in enumerate(resized)}
    return planning.alone(
        study,
        parameters,
        fingerprints,
        project.runs_folder() / recipe.name / study.name,
        input_folders={"images": resized[0].folder},
        places={"resized": [project.display_path(step.folder) for step in resized[1:]]},
    )
