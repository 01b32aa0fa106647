"""A search: members drawn one after the other from what varies, by Optuna, where those before them did well.

The sweep's folder keeps it in `search.db`. Each draw follows from the seed, its number and what is known by then, so an
interruption changes no draw. Members that were begun are made first. With `halving` in the file a member is paused and
compared with those before it, and weak members are stopped (Li et al., "A System for Massively Parallel Hyperparameter
Tuning", MLSys 2020, in the form in which no member waits for others).
"""

import itertools
import math
import random
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from helpers.core import disk, project, stages
from helpers.pipeline import fingerprints, planning
from helpers.pipeline.sweeps import axes, conduct, files, halving, pauses, plans

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

DATABASE, IMPORTANCE, BEST = "search.db", "importance.csv", "best.yaml"
OF = "of"  # the attribute of a study that names its sweep
LEAST_FOR_IMPORTANCE = 10  # finished trials


@dataclass(frozen=True)
class Drawn:
    """A member belongs to the search now, or did when it was interrupted."""

    member: files.Member


@dataclass(frozen=True)
class Scored:
    """A member has its score: its place, such as "3/40", the member, the score and the best one yet."""

    place: str
    member: files.Member
    value: float
    best: float


Event = conduct.Made | conduct.Failed | conduct.Complete | halving.Stopped | Drawn | Scored


def examples(sweep: files.Sweep) -> files.Sweep:
    """Return a search with as many members as it has trials, to check and estimate.

    Those that were drawn already are themselves; the others are spread evenly over what varies.

    Raises:
        ImportError, ValueError, RuntimeError: as `run`.
    """
    drawn: list[files.Member] = []
    if (sweep.folder / DATABASE).is_file():
        with _opened(sweep) as study:
            drawn = [_member(sweep, study, trial.number) for trial in _members(sweep, study)]
    count, order = max(0, sweep.search.trials - len(drawn)), random.Random(sweep.search.seed)
    columns = []
    for axis in sweep.lines:
        column = [_spread(axis, number, count) for number in range(count)]
        order.shuffle(column)
        columns.append(column)
    rows = zip(*columns, strict=True)
    return replace(sweep, members=drawn + [sweep.member(_name(n), row) for n, row in enumerate(rows, len(drawn) + 1)])


def _spread(axis: axes.Axis, number: int, count: int) -> axes.Point:
    if not isinstance(axis, axes.Range):
        return axis[number % len(axis)]
    share = number / max(count - 1, 1)
    if axis.log:
        return axis.at(axis.low * (axis.high / axis.low) ** share)
    return axis.at(axis.low + (axis.high - axis.low) * share)


def check() -> None:
    """Make sure that Optuna is here.

    Raises:
        ImportError: it is not.
    """
    try:
        import optuna
    except ImportError:
        raise ImportError("search needs an extra: pip install -e '.[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def run(sweep: files.Sweep, make: conduct.Make, pool: Executor, jobs: int, score: halving.Score) -> Iterator[Event]:
    """Draw and make members until there are as many as the search has trials, and yield each event.

    A member whose training fails counts for now; the same search tries it again when it runs the next time.

    Args:
        sweep: a checked sweep with `search`.
        make, pool: as for `conduct.run`.
        jobs: members drawn at a time, and units made at a time.
        score: what ranks a member.

    Raises:
        ValueError: the folder holds another search.
        RuntimeError: another process runs the search, or a stage before the training failed.
    """
    with _opened(sweep) as study:
        from optuna.trial import TrialState

        _settle(sweep, study)
        open_trials: list[int] = []  # trials without a result
        for trial in _members(sweep, study):
            if trial.state.is_finished():
                member = _member(sweep, study, trial.number)
                yield Drawn(member)
                is_whole = trial.state == TrialState.COMPLETE
                yield conduct.Complete(member.name) if is_whole else _stopped(sweep, study, trial.number, member)
            else:
                open_trials.append(trial.number)
        trials, tried = sweep.search.trials, len(_members(sweep, study)) - len(open_trials)
        while open_trials or len(_members(sweep, study)) < trials:
            while len(open_trials) < jobs and len(_members(sweep, study)) < trials:
                open_trials.append(_ask(sweep, study))
            batch = {number: _member(sweep, study, number) for number in open_trials[:jobs]}
            open_trials = open_trials[jobs:]
            yield from map(Drawn, batch.values())
            tried += len(batch)
            if sweep.halving:
                yield from _halve(sweep, study, batch, make, pool, jobs, score)
            planned = plans.plan(replace(sweep, members=list(batch.values())))
            yield from conduct.run(planned, make, pool, jobs)
            for number, member in batch.items():
                _check_begun(member, planned.chains[member.name])
                value = _value(sweep, member, planned.chains[member.name], score)
                if not math.isnan(value):
                    study.tell(number, value)
                    place = f"{tried - len(batch) + list(batch).index(number) + 1}/{trials}"
                    yield Scored(place, member, value, study.best_value)
        _write(sweep, study)


def _halve(
    sweep: files.Sweep,
    study: "Study",
    batch: dict[int, files.Member],
    make: conduct.Make,
    pool: Executor,
    jobs: int,
    score: halving.Score,
) -> Iterator[Event]:
    """Train the members of a batch until each comparison, and remove those from it that fail or are stopped."""
    from optuna.trial import TrialState

    for epochs in halving.rungs(replace(sweep, members=list(batch.values()))):
        planned = halving.until(sweep, list(batch.values()), epochs)
        yield from conduct.run(planned, make, pool, jobs)
        for number, member in list(batch.items()):
            _check_begun(member, planned.chains[member.name])
            value = score(pauses.history(planned.chains[member.name][-1]), epochs)
            if math.isnan(value):  # it is tried again when the search runs the next time
                del batch[number]
                continue
            _report(study, number, epochs, value)
            rank, compared = _rank(sweep, study, number, epochs)
            if rank > max(1, compared // sweep.halving.eta):
                halving.stop(member, planned, epochs)
                study.tell(number, state=TrialState.PRUNED)
                yield _stopped(sweep, study, number, member)
                del batch[number]
        if not batch:
            return


def _report(study: "Study", number: int, epochs: int, value: float) -> None:
    """Note what a trial is worth after some epochs, unless it is on record since an interruption."""
    from optuna.trial import Trial

    trial = study.get_trials(deepcopy=False)[number]
    if epochs not in trial.intermediate_values:
        Trial(study, trial._trial_id).report(value, epochs)  # Optuna returns no trial that was drawn earlier


def _rank(sweep: files.Sweep, study: "Study", number: int, epochs: int) -> tuple[int, int]:
    """Return a trial's rank after so many epochs, and among how many: it and those that were drawn before it."""
    trials = study.get_trials(deepcopy=False)[: number + 1]
    values = [trial.intermediate_values[epochs] for trial in trials if epochs in trial.intermediate_values]
    sign = 1 if sweep.search.falls else -1
    return 1 + sum(sign * other < sign * values[-1] for other in values), len(values)


def _stopped(sweep: files.Sweep, study: "Study", number: int, member: files.Member) -> halving.Stopped:
    epochs = study.get_trials(deepcopy=False)[number].last_step
    return halving.Stopped(member.name, epochs, *_rank(sweep, study, number, epochs))


def _check_begun(member: files.Member, steps: list[planning.Step]) -> None:
    """Raise a StageError if a stage before any training failed: no trial could be trained."""
    for step in itertools.takewhile(lambda step: not step.stage.trains, steps):
        if not (step.folder / stages.STAGE_FILE).is_file():
            raise planning.StageError(
                f"{step.stage.name} of {member.name} failed, before any training, so the search stops here. When the"
                " cause is fixed, the same command resumes."
            )


def _members(sweep: files.Sweep, study: "Study") -> "list[FrozenTrial]":
    """Return the trials that are members; the others drew what one before them had drawn, or were killed meanwhile."""
    first: dict[str, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        if len(trial.params) == len(sweep.lines):
            first.setdefault(repr(sorted(trial.params.items())), trial)
    return list(first.values())


def _settle(sweep: files.Sweep, study: "Study") -> None:
    """Give each trial that is not a member the result of the member like it."""
    from optuna.trial import TrialState

    members = _members(sweep, study)
    numbers = {trial.number for trial in members}
    for trial in study.get_trials():
        if not trial.state.is_finished() and trial.number not in numbers:
            whole = [other for other in members if other.state == TrialState.COMPLETE]
            value = next((other.value for other in whole if other.params == trial.params), None)
            study.tell(trial.number, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)


def _ask(sweep: files.Sweep, study: "Study") -> int:
    """Draw a member that was not there before and return its trial's number; after a repeated draw, a random one."""
    sampler, before = sweep.search.sampler, len(_members(sweep, study))
    while True:
        count = sum(len(trial.params) == len(sweep.lines) for trial in study.get_trials(deepcopy=False))
        study.sampler = _sampler(sampler, sweep.search.seed, count)
        trial = study.ask(_distributions(sweep))
        if len(_members(sweep, study)) > before:
            return trial.number
        _settle(sweep, study)
        sampler = "random"


def _value(sweep: files.Sweep, member: files.Member, steps: list[planning.Step], score: halving.Score) -> float:
    """Return the score of a member, NaN unless all of it was made."""
    if not all((step.folder / stages.STAGE_FILE).is_file() for step in steps):
        return math.nan
    trained = files.trained(member.recipe, sweep.last)
    return score(pauses.history(next(step for step in steps if step.stage.name == trained)), None)


def _write(sweep: files.Sweep, study: "Study") -> None:
    """Write the results of the search: the share of the differences that each thing makes, and the best recipe."""
    from optuna import importance
    from optuna.trial import TrialState

    finished = [trial for trial in _members(sweep, study) if trial.state == TrialState.COMPLETE]
    if not finished:
        return
    if len(finished) >= LEAST_FOR_IMPORTANCE and len({trial.value for trial in finished}) > 1:
        evaluator = importance.FanovaImportanceEvaluator(seed=sweep.search.seed)
        shares = importance.get_param_importances(study, evaluator=evaluator)
        lines = [f'"{name}",{share:.4f}\n' for name, share in shares.items()]
        disk.write_text(sweep.folder / IMPORTANCE, "".join(["parameter,importance\n", *lines]))
    best = min(finished, key=lambda trial: trial.value if sweep.search.falls else -trial.value)
    member = _member(sweep, study, best.number)
    description = f"{member.name}, the best of {len(finished)} by {sweep.search.metric}: {best.value:.4f}"
    recipe = sweep.recipe_of(member, description)
    disk.write_text(sweep.folder / BEST, recipe.as_yaml())


@contextmanager
def _opened(sweep: files.Sweep) -> Iterator["Study"]:
    """Open the search of a sweep, or begin it, and keep other processes from it."""
    check()
    import optuna

    sweep.folder.mkdir(parents=True, exist_ok=True)
    path = sweep.folder / DATABASE
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0):
            study = optuna.create_study(
                storage=f"sqlite:///{path}",
                study_name=sweep.name,
                direction="minimize" if sweep.search.falls else "maximize",
                load_if_exists=True,
            )
            identity = study.user_attrs.get(OF)
            if identity is None:
                study.set_user_attr(OF, _identity(sweep))
            elif identity != _identity(sweep):
                raise ValueError(
                    f"{project.display_path(path)} holds a search of another recipe, metric or other ranges. Take"
                    " another --name, or remove this file to begin again; stages that are made already are kept."
                )
            yield study
    except Timeout:
        raise RuntimeError(f"Another thaw sweep is working on {project.display_path(path)}.") from None


def _identity(sweep: files.Sweep) -> str:
    base = sweep.member("x", []).recipe
    lines = [[vars(axis)] if isinstance(axis, axes.Range) else [vars(point) for point in axis] for axis in sweep.lines]
    halves = [vars(sweep.halving)] if sweep.halving else []
    return fingerprints.fingerprint([base.stages, lines, sweep.search.metric, sweep.last, *halves])


def _sampler(name: str, seed: int, number: int) -> Any:
    """Return what makes the draw of a number: seeded for each on its own, so that an interruption changes none."""
    import numpy as np
    from optuna import samplers

    own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return samplers.RandomSampler(own_seed) if name == "random" else samplers.TPESampler(seed=own_seed)


def _distributions(sweep: files.Sweep) -> dict[str, Any]:
    from optuna import distributions

    by_name: dict[str, Any] = {}
    for axis in sweep.lines:
        if isinstance(axis, axes.Range):
            kind = distributions.IntDistribution if axis.whole else distributions.FloatDistribution
            by_name[axis.key] = kind(axis.low, axis.high, log=axis.log)
        else:
            by_name[_axis_name(axis)] = distributions.CategoricalDistribution([axes.name_of(point) for point in axis])
    return by_name


def _axis_name(axis: list[axes.Point]) -> str:
    return " and ".join(axis[0].labels)


def _name(number: int) -> str:
    return f"trial-{number:03d}"


def _member(sweep: files.Sweep, study: "Study", number: int) -> files.Member:
    members = _members(sweep, study)
    at = [trial.number for trial in members].index(number)
    points = []
    for axis in sweep.lines:
        if isinstance(axis, axes.Range):
            points.append(axis.at(members[at].params[axis.key]))
        else:
            names = [axes.name_of(point) for point in axis]
            points.append(axis[names.index(members[at].params[_axis_name(axis)])])
    return sweep.member(_name(at + 1), points)
