"""What a sweep is going to do: each stage once, however many members need it, and what that will take."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from helpers.core import disk, notebooks, project, stages
from helpers.pipeline import chain, fingerprints, housekeeping, planning, recipes
from helpers.pipeline.sweeps import files


@dataclass
class Unit:
    """A stage that is to be made once.

    Attributes:
        step: of the first member that needs it.
        needs: the folders of the stages that it reads and that are to be made too.
        recipe: of that member.
        members: names of all members that need it.
        until: epochs after which it is paused, to resume later; 0 for never.
    """

    step: planning.Step
    needs: set[Path]
    recipe: recipes.Recipe
    members: list[str] = field(default_factory=list)
    until: int = 0

    @property
    def name(self) -> str:
        """Return the stage and the member, or how many members share it."""
        shared = f"for {len(self.members)} members" if len(self.members) > 1 else self.members[0]
        return f"{self.step.stage.name} {shared}"


@dataclass(frozen=True)
class Plan:
    """A sweep as stages; nothing is made yet.

    Attributes:
        sweep: the sweep.
        chains: the steps of each member.
        units: what is to be made, by its folder, each after what it reads.
        until: epochs after which the last stages are paused, 0 for never; paused members are not complete.
    """

    sweep: files.Sweep
    chains: dict[str, list[planning.Step]]
    units: dict[Path, Unit]
    until: int = 0

    @property
    def stages(self) -> int:
        """Return how many stages the members' runs are made of, each counted once."""
        return len({step.folder for steps in self.chains.values() for step in steps})

    @property
    def alone(self) -> int:
        """Return how many stages the members would be made of if they shared none."""
        return sum(len(steps) for steps in self.chains.values())


def plan(sweep: files.Sweep) -> Plan:
    """Return the stages of all members.

    Raises:
        planning.StageError, ValueError: as `chain.plan`.
    """
    chains: dict[str, list[planning.Step]] = {}
    units: dict[Path, Unit] = {}
    for member in sweep.members:
        chains[member.name] = chain.plan(member.recipe, last=sweep.last).steps
        for step in chains[member.name]:
            if step.state == "to do":
                needs = {folder for folder in step.input_folders.values() if folder in units}
                units.setdefault(step.folder, Unit(step, needs, member.recipe)).members.append(member.name)
    return Plan(sweep, chains, units)


@dataclass(frozen=True)
class Estimate:
    """What some stages will take, by stages of the same kind that the store holds.

    Attributes:
        seconds: of those that can be estimated, one after the other.
        size: bytes that their results will take.
        unknown: stages of which none was made here yet.
    """

    seconds: float
    size: float
    unknown: list[str]


def estimate(steps: list[planning.Step]) -> Estimate:
    """Estimate the time and disk of making these steps: as long as the most similar ones in the store took.

    Trainings are taken in proportion to their epochs. Caches are not in the figure for the disk.
    """
    records = _made(project.runs_folder() / housekeeping.STORE)
    seconds = size = 0.0
    unknown = []
    for step in steps:
        if similar := _most_similar(step.parameters, records.get(step.stage.name, [])):
            seconds += median(record["seconds"] * _times(step.parameters, record["parameters"]) for record in similar)
            size += median(record["size"] for record in similar)
        elif step.stage.name not in unknown:
            unknown.append(step.stage.name)
    return Estimate(seconds, size, unknown)


def _made(store: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records of the stages in the store, by the stage's name."""
    records: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(store.glob(f"*/{stages.STAGE_FILE}")):
        record = disk.read_json(path)
        if record.get("status") == "done" and "ingredients" in record:
            parameters, size = record["ingredients"]["parameters"], sum(f[0] for f in record["files"].values())
            entry = {"parameters": parameters, "seconds": record["seconds"], "size": size}
            records.setdefault(record["stage"], []).append(entry)
    return records


def _most_similar(parameters: dict[str, Any], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records with the fewest other parameters; epochs, which are counted, do not count as other ones."""

    def differences(record: dict[str, Any]) -> int:
        before = record["parameters"]
        ignored = {files.EPOCHS, *fingerprints.DECIDE_NOTHING}
        return sum(before.get(name) != value for name, value in parameters.items() if name not in ignored)

    counted = [(differences(record), record) for record in records]
    fewest = min((count for count, _ in counted), default=0)
    return [record for count, record in counted if count == fewest]


def _times(parameters: dict[str, Any], before: dict[str, Any]) -> float:
    return (
        parameters[files.EPOCHS] / before[files.EPOCHS]
        if parameters.get(files.EPOCHS) and before.get(files.EPOCHS)
        else 1.0
    )


def by_stage(planned: Plan) -> Iterator[tuple[str, int, int]]:
    """Yield for each stage its name, how many different ones the members need, and how many are to be made."""
    for name in notebooks.stages():
        folders = {step.folder for steps in planned.chains.values() for step in steps if step.stage.name == name}
        if folders:
            yield name, len(folders), len(folders & planned.units.keys())
