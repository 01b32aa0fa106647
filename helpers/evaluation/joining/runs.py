"""The runs that are joined into one classifier, and what must hold so that the joined one is measured fairly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helpers.core import disk, notebooks, project, stages
from helpers.evaluation import selection

PIXELS = ("image_size", "fit", "levels", "crop")  # of resize.json, which decide the pixels of the images


@dataclass(frozen=True)
class Member:
    """One run's trained model.

    Attributes:
        name: of the run.
        folder: of the phase that is better on validation.
        images: the folder of 02_resize that it learned from.
        class_names: in the model's order.
        about: model.json.
        epochs: of both phases.
        seconds: of its training.
        start: the folder of the head from which phase 2 continued; that of the head itself if phase 1 is better.
    """

    name: str
    folder: Path
    images: Path
    class_names: list[str]
    about: dict[str, Any]
    epochs: int
    seconds: float
    start: Path

    def load(self):
        """Return the keras.Model."""
        from helpers.compute import hardware

        return hardware.load(self.folder / "model.keras")

    def __str__(self) -> str:
        return f"{self.name}: the model of {self.folder.name.split('-')[0]}, {len(self.class_names)} classes"


def members(own: Mapping[str, Path], runs: Sequence[str], monitor: str = "val_loss") -> list[Member]:
    """Return the run itself, then the others, each with the phase that is better on validation.

    Args:
        own: the folders of the run's two phases, "head" and "fine_tune".
        runs: names or folders of other runs whose two phases are done.
        monitor: what decides between the phases.

    Raises:
        FileNotFoundError: one of them is not a run whose phases are done.
        ValueError: no other run is named, or one is named twice.
    """
    if not runs or len(set(runs)) < len(runs):
        raise ValueError(f"runs: name at least one other run, each once; got {', '.join(runs) or 'none'}.")
    return [_member("this run", own, monitor), *(_member(name, phases(name), monitor) for name in runs)]


def phases(name: str) -> dict[str, Path]:
    """Return the folders of the two phases of a run; another stage instead of the second one, if the run has it."""
    second = "fine_tune"
    for stage in notebooks.stages().values():
        if stage.replaces == second and stages.status(project.run_folder(name) / stage.name) == "done":
            second = stage.name
    stage_of = {"head": "head", "fine_tune": second}
    return {phase: stages.of_run(name, stage, "model.keras", parameter="runs") for phase, stage in stage_of.items()}


def check(members: Sequence[Member], source: Path) -> None:
    """Raise an error for runs that would make the joined one's numbers wrong, or that do not fit together.

    Args:
        members: the run itself first.
        source: the folder of 02_resize that the run itself reads.

    Raises:
        ValueError: a run has learned from, or was chosen on, an image that this one measures on; it reads its images
            differently; or the classes fit neither an ensemble nor two stages.
    """
    table = disk.read_table(source / "images.csv")
    val, test = (set(table.loc[table["part"] == part, "sha256"]) for part in ("val", "test"))
    about = disk.read_json(source / "resize.json")
    for one in members[1:]:
        own = disk.read_table(one.images / "images.csv")
        learned, chose = (set(own.loc[own["part"] == part, "sha256"]) for part in ("train", "val"))
        if seen := learned & (val | test) | chose & test:
            raise ValueError(
                f"runs: {one.name} has seen {len(seen):,} images, in train or val, that this run measures on. Give both"
                " the same split (split.seed, split.ratio and all else that 01 reads)."
            )
        resizing = disk.read_json(one.images / "resize.json")
        if different := [key for key in PIXELS if resizing.get(key) != about.get(key)]:
            raise ValueError(
                f"runs: {one.name} reads images with {different[0]} {resizing.get(different[0])}, this run with"
                f" {about.get(different[0])}. One model needs one kind of image: resize both the same way."
            )
    if any(one.class_names != members[0].class_names for one in members[1:]):
        by_stage(members)


def by_stage(members: Sequence[Member]) -> tuple[Member, Member, dict[str, Member]]:
    """Return the run with all classes, the one that separates groups, and for each group the one within it.

    Raises:
        ValueError: the runs are not the two stages of this one.
    """
    whole, first, *others = members
    merged = first.about.get("merge", {})
    if not merged:
        raise ValueError(
            f"runs: {first.name} has other classes than this run and merges none (resize.merge). Of two stages, the"
            " first run merges classes, and each other one keeps those of one group (resize.keep)."
        )
    seconds = {}
    for group, names in merged.items():
        fitting = [one for one in others if set(one.class_names) == set(names)]
        if not fitting:
            raise ValueError(f"runs: no run keeps the classes of {group}, {', '.join(names)} (resize.keep).")
        seconds[group] = fitting[0]
    covered = {name for name in first.class_names if name not in merged} | {n for own in merged.values() for n in own}
    if missing := sorted(covered ^ set(whole.class_names)):
        raise ValueError(f"runs: {first.name} and this run do not have the same classes: {', '.join(missing)}.")
    return whole, first, seconds


def groups(members: Sequence[Member]) -> list[list[str]]:
    """Return the groups of a two-stage classifier; none if the runs are an ensemble."""
    return [list(own) for own in members[1].about.get("merge", {}).values()] if len(members) > 1 else []


def share_a_start(members: Sequence[Member]) -> bool:
    """Return whether all models continue from the same head, so that a mean of their weights makes sense."""
    return len({one.start for one in members}) == 1 and all(one.folder != one.start for one in members)


def answers(members: Sequence[Member], val) -> list[np.ndarray]:
    """Return the probabilities of each for the validation images of the run itself, (images, its classes) float32.

    Args:
        members: from `members`.
        val: datasets.Folder.
    """
    from helpers.evaluation import prediction

    return [prediction.probabilities(one.load(), val) for one in members]


def _member(name: str, own: Mapping[str, Path], monitor: str) -> Member:
    from helpers.training import saving

    histories = {phase: saving.read_history(path) for phase, path in own.items()}
    kept = {phase: saving.read_kept(path) for phase, path in own.items()}
    phase = selection.better_phase(kept["head"], kept["fine_tune"], monitor)["phase"]
    folder = own[phase].resolve()
    records = {phase: disk.read_json(path / stages.STAGE_FILE) for phase, path in own.items()}
    return Member(
        name=Path(name).name if Path(name).is_absolute() else name,
        folder=folder,
        images=project.resolve(records["head"]["parameters"]["images"]).resolve(),
        class_names=disk.read_json(folder / "class_names.json"),
        about=disk.read_json(folder / "model.json"),
        epochs=int(max(table["epoch"].max() for table in histories.values() if len(table))),
        seconds=sum(record.get("seconds", 0.0) for record in records.values()),
        start=own["head"].resolve(),
    )
