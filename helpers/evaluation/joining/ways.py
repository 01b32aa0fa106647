"""The ways in which several runs can be one classifier, their scores on validation, and the choice between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import softmax

from helpers.evaluation import selection
from helpers.evaluation.joining import runs as runs_of

ROUNDS = 40  # of the greedy choice of shares
SMALLEST = 1e-7
ENSEMBLES, TWO_STAGE = ("probabilities", "logits", "weights"), ("soft", "hard")


@dataclass(frozen=True)
class Way:
    """One way to join.

    Attributes:
        how: "alone", "probabilities", "logits", "weights", "soft" or "hard".
        shares: of each run, 1 in all; of weights and two stages, the used runs have a share and the rest 0.
        probabilities: on validation, (images, classes).
        val_loss, val_accuracy: on validation.
    """

    how: str
    shares: tuple[float, ...]
    probabilities: np.ndarray
    val_loss: float
    val_accuracy: float


def every(
    members: Sequence[runs_of.Member], scores: Sequence[np.ndarray], val, *, how: str = "auto", weigh: str = "greedy"
) -> list[Way]:
    """Return each way with its scores on validation: each run alone with all classes, then the ways to join them.

    Args:
        members: the run itself first.
        scores: probabilities of each on validation, (images, its classes).
        val: datasets.Folder of the validation part.
        how: "auto": all ways that these runs allow, or one of the ways.
        weigh: "greedy" or "equal" shares, of probabilities and logits.

    Raises:
        ValueError: the runs do not allow this way.
    """
    own = members[0].class_names
    alike = [number for number, one in enumerate(members) if one.class_names == own]
    ways = [_way("alone", _only(len(members), number), scores[number], val.labels) for number in alike]
    stages = [one for one in members if one.class_names != own]
    if stages and how in ENSEMBLES:
        raise ValueError(f"how: {how} joins runs of the same classes; {stages[0].name} has other ones.")
    if not stages and how in TWO_STAGE:
        raise ValueError(f"how: {how} joins two stages, so the runs need other classes than {members[0].name}.")
    if stages:
        return ways + [_two_stage(members, scores, val, kind) for kind in TWO_STAGE if how in ("auto", kind)]
    for of in ("probabilities", "logits"):
        if how in ("auto", of):
            shares = greedy(scores, val.labels, of) if weigh == "greedy" else tuple([1 / len(scores)] * len(scores))
            ways.append(_way(of, shares, mean(scores, shares, of), val.labels))
    if how == "weights" or (how == "auto" and runs_of.share_a_start(members)):
        ways.append(_soup(members, ways[: len(alike)], val))
    return ways


def choose(ways: Sequence[Way]) -> Way:
    """Return the way to join with the lowest loss on validation."""
    return min((way for way in ways if way.how != "alone"), key=lambda way: way.val_loss)


def table(ways: Sequence[Way], members: Sequence[runs_of.Member]) -> pd.DataFrame:
    """Return a row for each way: how, runs (names with shares), val_loss, val_accuracy; the lowest loss first."""
    rows = [
        {"how": way.how, "runs": shown(way, members), "val_loss": way.val_loss, "val_accuracy": way.val_accuracy}
        for way in ways
    ]
    return pd.DataFrame(rows).sort_values("val_loss", kind="stable").reset_index(drop=True)


def shown(way: Way, members: Sequence[runs_of.Member]) -> str:
    """Return the names of the runs that a way uses, with their shares if these differ."""
    used = [(one.name, share) for one, share in zip(members, way.shares, strict=True) if share]
    equal = len({round(share, 6) for _, share in used}) == 1
    return ", ".join(name if equal else f"{name} {share:.2f}" for name, share in used)


def sentence(ways: Sequence[Way], chosen: Way, members: Sequence[runs_of.Member]) -> str:
    """Return one sentence about what joining gains on validation."""
    alone, used = ways[0], sum(share > 0 for share in chosen.shares)
    what = "Two stages" if chosen.how in TWO_STAGE else f"{used} of {len(members)} runs joined"
    return (
        f"{what} ({chosen.how}): validation loss {chosen.val_loss:.4f}, and {alone.val_loss:.4f} of"
        f" {members[0].name} alone; accuracy {chosen.val_accuracy:.4f}, and {alone.val_accuracy:.4f}."
    )


def history(chosen: Way, members: Sequence[runs_of.Member]) -> pd.DataFrame:
    """Return the one row of the joining in the run's history; seconds are those of all its trainings."""
    from helpers.training import saving

    used = [one for one, share in zip(members, chosen.shares, strict=True) if share]
    row = {"epoch": members[0].epochs + 1, "phase": selection.JOINED, "val_loss": chosen.val_loss}
    row |= {"val_accuracy": chosen.val_accuracy, "seconds": sum(one.seconds for one in used)}
    return pd.DataFrame([row]).reindex(columns=[*saving.HISTORY_COLUMNS])


def greedy(scores: Sequence[np.ndarray], labels: np.ndarray, of: str = "probabilities") -> tuple[float, ...]:
    """Return shares by greedy selection with replacement (Caruana et al., "Ensemble selection", ICML 2004).

    It starts with the best run and repeatedly adds the one that lowers the loss most; the best of all these
    bags counts.

    Args:
        scores: probabilities of each run on validation, (images, classes).
        labels: their classes, integers (images,).
        of: "probabilities" or "logits".
    """
    counts, best, lowest = np.zeros(len(scores)), None, np.inf
    for _ in range(ROUNDS):
        tried = []
        for number in range(len(scores)):
            counts[number] += 1
            tried.append(loss(mean(scores, counts / counts.sum(), of), labels))
            counts[number] -= 1
        counts[int(np.argmin(tried))] += 1
        if min(tried) < lowest - 1e-9:
            best, lowest = counts / counts.sum(), min(tried)
    return tuple(float(share) for share in best)


def mean(scores: Sequence[np.ndarray], shares: Sequence[float], of: str = "probabilities") -> np.ndarray:
    """Return the weighted mean of probabilities, or of their logarithms, turned into probabilities again."""
    stack = np.stack([np.asarray(one, np.float64) for one in scores])
    if of == "probabilities":
        return np.tensordot(np.asarray(shares), stack, axes=1)
    return softmax(np.tensordot(np.asarray(shares), np.log(np.maximum(stack, SMALLEST)), axes=1), axis=1)


def loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean log loss."""
    rows = np.arange(len(labels))
    return float(-np.log(np.maximum(probabilities[rows, labels], SMALLEST)).mean())


def build(chosen: Way, members: Sequence[runs_of.Member]):
    """Return the keras.Model of a way: images (batch, H, W, 3) -> probabilities (batch, classes)."""
    from helpers.models import joined

    used = [(one, share) for one, share in zip(members, chosen.shares, strict=True) if share]
    used.sort(key=lambda pair: -pair[1])  # code that looks into the model, such as novelty, looks into the first
    if chosen.how == "weights":
        return joined.soup([one.load() for one, _ in used])
    if chosen.how in TWO_STAGE:
        return _stages_as_one(members, chosen.how == "hard")
    return joined.mean([one.load() for one, _ in used], [share for _, share in used], chosen.how)


def prove(chosen: Way, probabilities: np.ndarray) -> str:
    """Return a sentence that a joined model predicts what was computed from its runs.

    Args:
        chosen: the way.
        probabilities: of the model on validation, (images, classes).

    Raises:
        RuntimeError: it predicts something else.
    """
    from helpers.compute import hardware

    off = float(np.abs(probabilities - chosen.probabilities).max())
    if off > hardware.tolerance():
        raise RuntimeError(f"The joined model does not predict what its runs predict: off by {off:.2g}.")
    return f"The joined model predicts what its runs predict, to {off:.0e} on {len(probabilities):,} images."


def _way(how: str, shares: tuple[float, ...], probabilities: np.ndarray, labels: np.ndarray) -> Way:
    correct = probabilities.argmax(axis=1) == labels
    return Way(how, shares, probabilities, loss(probabilities, labels), float(correct.mean()))


def _only(count: int, *numbers: int) -> tuple[float, ...]:
    return tuple(1 / len(numbers) if number in numbers else 0.0 for number in range(count))


def _soup(members: Sequence[runs_of.Member], alone: Sequence[Way], val) -> Way:
    """Return the mean of weights; from the best run on, each run is added if it does not raise the loss."""
    from helpers.evaluation import prediction
    from helpers.models import joined

    if not runs_of.share_a_start(members):
        raise ValueError("how: weights makes sense only for runs that continue from the same head of 03.")
    ranked = sorted(range(len(members)), key=lambda number: alone[number].val_loss)
    kept, best = ranked[:1], alone[ranked[0]]
    for number in ranked[1:]:
        models = [members[each].load() for each in (*kept, number)]
        probabilities = prediction.probabilities(joined.soup(models), val)
        tried = _way("weights", _only(len(members), *kept, number), probabilities, val.labels)
        if tried.val_loss <= best.val_loss:
            kept, best = [*kept, number], tried
    return best if best.how == "weights" else _way("weights", best.shares, best.probabilities, val.labels)


def _two_stage(members: Sequence[runs_of.Member], scores: Sequence[np.ndarray], val, kind: str) -> Way:
    """Return P(group) x P(class | group) from the stages."""
    whole, first, seconds = runs_of.by_stage(members)
    outer, names = np.asarray(scores[1], np.float64), first.class_names
    if kind == "hard":
        outer = np.eye(len(names))[outer.argmax(axis=1)]
    probabilities = np.zeros((len(outer), len(whole.class_names)))
    for place, name in enumerate(whole.class_names):
        group = next((group for group, one in seconds.items() if name in one.class_names), name)
        probabilities[:, place] = outer[:, names.index(group)]
        if group in seconds:
            inner = scores[members.index(seconds[group])]
            probabilities[:, place] *= inner[:, seconds[group].class_names.index(name)]
    return _way(kind, _only(len(members), *range(1, len(members))), probabilities, val.labels)


def _stages_as_one(members: Sequence[runs_of.Member], hard: bool):
    from helpers.models import joined

    whole, first, seconds = runs_of.by_stage(members)
    models = {group: one.load() for group, one in seconds.items()}
    names = {group: one.class_names for group, one in seconds.items()}
    return joined.two_stage(first.load(), first.class_names, models, names, whole.class_names, hard=hard)
