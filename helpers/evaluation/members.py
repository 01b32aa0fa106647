"""What the members of a sweep, or any runs in one folder, show together: their histories and metrics."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from helpers.core import disk, notebooks, project, words

SWEEP = "sweep.csv"  # what `thaw sweep` writes about its members
STOPPED = "{stage}-stopped.csv"  # the epochs of a training that it stopped early, in the member's run
IMPORTANCE = "importance.csv"  # what a search writes
SEED = "seed"
ABOUT = ("member", "state", "error")
SCORES = ("val_loss", "val_accuracy", "loss_area", "gap", "overfitting", "best_epoch", "epochs", "seconds")
TESTED = ("test_loss", "test_accuracy")
LEVEL = 0.95


def read(folder: str | os.PathLike) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Read the members of a sweep.

    If the folder has no sweep.csv, its members are the runs in it, and what varies is where their recipes differ.

    Args:
        folder: runs/SWEEP.

    Returns:
        The members: one row each with the columns member, state, error, what varies, and `SCORES` and `TESTED` (NaN
        where nothing was trained or measured; see `scores`). The histories: one row an epoch of any member, the
        columns of history.csv, member, and `running`, the epoch counted over the phases. The names of what varies.

    Raises:
        FileNotFoundError: the folder holds no run with a history.
    """
    path = project.resolve(folder)
    runs = sorted(recipe.parent for recipe in path.glob("*/recipe.yaml"))
    histories = {run.name: history for run in runs if len(history := _history(run))}
    if not histories:
        raise FileNotFoundError(
            f"{project.display_path(path)} holds no run with a history. `thaw sweep` makes such a folder; its"
            " members are the runs in it."
        )
    table = disk.read_table(path / SWEEP) if (path / SWEEP).is_file() else _compared(runs)
    varies = [name for name in table if name not in ABOUT]
    for name in varies:
        table[name] = _numbers(table[name])
    rows = [scores(histories[name]) if name in histories else {} for name in table["member"]]
    scored = pd.DataFrame(rows).reindex(columns=SCORES)
    tested = pd.DataFrame([_tested(path / name) for name in table["member"]]).reindex(columns=TESTED)
    every = [histories[name].assign(member=name) for name in table["member"] if name in histories]
    return pd.concat([table, scored, tested], axis=1), pd.concat(every, ignore_index=True), varies


def scores(history: pd.DataFrame) -> dict[str, float]:
    """Return the scores of one member, all of its last phase.

    Args:
        history: one row an epoch: phase, loss, accuracy, val_loss, val_accuracy, seconds.

    Returns:
        val_loss (the lowest), val_accuracy and gap (training less validation accuracy) in that epoch, best_epoch
        (counted from 1 in the phase), loss_area (mean validation loss over the epochs, the area under its curve),
        overfitting (slope of the straight line through validation loss / training loss over the epochs, as in the
        KenyanFood13 study; its sign says if the two separate), epochs and seconds (of all phases). NaN if a loss
        is not a number.
    """
    last = history[history["phase"] == history["phase"].iloc[-1]].reset_index(drop=True)
    scores: dict[str, float] = {"epochs": len(history), "seconds": history["seconds"].sum()}
    losses = last["val_loss"].to_numpy(float)
    if not np.isfinite(losses).any():
        return scores
    best = last.loc[last["val_loss"].idxmin()]
    scores |= {"val_loss": best["val_loss"], "val_accuracy": best["val_accuracy"], "best_epoch": int(best.name) + 1}
    scores |= {"gap": best["accuracy"] - best["val_accuracy"], "loss_area": losses.mean()}
    ratio = losses / last["loss"].to_numpy(float)
    if len(ratio) > 1 and np.isfinite(ratio).all():
        scores["overfitting"] = float(np.polyfit(np.arange(1, len(ratio) + 1), ratio, 1)[0])
    return scores


def leaderboard(members: pd.DataFrame, varies: list[str], monitor: str = "val_loss") -> pd.DataFrame:
    """Return one row for each setting, the best first: means over seeds, with the interval of `monitor` over them.

    Args:
        members: as `read` returns it. Those without a value of `monitor` are left out.
        varies: names of what varies; members of one setting differ in `seed`.
        monitor: a column; lower is better if its name holds "loss".

    Returns:
        What varies except the seed (or member, if nothing else does), seeds, `monitor`, low, high (95 % interval of the
        mean by Student's t; NaN for a single seed), and the means of the other scores.
    """
    keys = settings(varies) or ["member"]
    measured = members[members[monitor].notna()]
    rows = []
    for key, group in measured.groupby(keys, sort=False):
        low, high = interval(group[monitor])
        others = [name for name in (*SCORES, *TESTED) if name != monitor and group[name].notna().any()]
        row = dict(zip(keys, key, strict=True)) | {"seeds": len(group), monitor: group[monitor].mean()}
        rows.append(row | {"low": low, "high": high} | {name: group[name].mean() for name in others})
    table = pd.DataFrame(rows, columns=None if rows else [*keys, "seeds", monitor])
    return table.sort_values(monitor, ascending="loss" in monitor, kind="stable").reset_index(drop=True)


def settings(varies: list[str]) -> list[str]:
    """Return what varies except the seed."""
    return [name for name in varies if name != SEED]


def interval(values: pd.Series) -> tuple[float, float]:
    """Return the 95 % interval of the mean of a few values by Student's t; NaN for fewer than two."""
    values = values.dropna().to_numpy(float)
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def effects(members: pd.DataFrame, varies: list[str], monitor: str = "val_loss") -> pd.DataFrame:
    """Return the main effect of each value of each thing that varies: the mean of its members minus that of all.

    The interval is that of the mean over these members by Student's t, so what else varies among them widens it.
    A parameter with about as many values as there are members, such as a rate that a search draws, gets no rows.

    Returns:
        Columns factor, value, members, effect, low, high; no rows if fewer than two things remain.
    """
    measured = members[members[monitor].notna()]
    factors = [name for name in settings(varies) if 1 < measured[name].nunique() <= len(measured) / 2]
    rows = []
    for factor in factors if len(factors) > 1 else []:
        for value, group in measured.groupby(factor, sort=False):
            low, high = (end - measured[monitor].mean() for end in interval(group[monitor]))
            effect = group[monitor].mean() - measured[monitor].mean()
            rows.append(
                {"factor": factor, "value": value, "members": len(group), "effect": effect} | {"low": low, "high": high}
            )
    return pd.DataFrame(rows, columns=["factor", "value", "members", "effect", "low", "high"])


def two_way(members: pd.DataFrame, varies: list[str], score: str = "val_accuracy") -> pd.DataFrame | None:
    """Return the mean score as a table of the two things that vary, the first down; None unless they are two."""
    keys = settings(varies)
    if len(keys) != 2 or members[score].isna().all():
        return None
    table = members.pivot_table(index=keys[0], columns=keys[1], values=score, aggfunc="mean", sort=False)
    return table.reindex(index=members[keys[0]].unique(), columns=members[keys[1]].unique())


def importance(folder: str | os.PathLike) -> pd.DataFrame:
    """Return how much each parameter matters in a search: columns parameter and importance, a share of the differences
    (fANOVA).

    There are no rows if the folder holds no search.
    """
    path = project.resolve(folder) / IMPORTANCE
    return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["parameter", "importance"])


def headline(members: pd.DataFrame, board: pd.DataFrame, varies: list[str], monitor: str = "val_loss") -> str:
    """Return `sentence`, and how many members were stopped early, so that nobody takes them for complete ones."""
    stopped = members["state"].str.startswith("stopped").sum()
    early = f" {stopped} of {len(members)} were stopped early: their numbers are of fewer epochs." if stopped else ""
    return sentence(board, varies, monitor) + early


def sentence(board: pd.DataFrame, varies: list[str], monitor: str = "val_loss") -> str:
    """Return in one line which setting is best, and whether the seeds separate it from the second."""
    if board.empty:
        return "No member was trained to a number."
    keys, best = settings(varies) or ["member"], board.iloc[0]
    name = ", ".join(f"{key.rpartition('.')[2]} {_short(best[key])}" for key in keys)
    accuracy = f", accuracy {words.percent(best['val_accuracy'])}" if monitor != "val_accuracy" else ""
    text = f"Best of {len(board)} settings by {monitor}: {name}: {best[monitor]:.4f}{accuracy}"
    if len(board) < 2:
        return f"{text}."
    second = board.iloc[1]
    if best["seeds"] < 2 or second["seeds"] < 2:
        return f"{text}; one seed each, so a small lead may be chance."
    apart = best["high"] < second["low"] or best["low"] > second["high"]
    return f"{text}; its interval over seeds {'is separate from' if apart else 'overlaps'} that of the second."


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _history(run: Path) -> pd.DataFrame:
    trained = [stage.name for stage in notebooks.stages().values() if stage.trains]
    places = [(run / stage / "history.csv", run / STOPPED.format(stage=stage)) for stage in trained]
    paths = [next(filter(Path.is_file, both), None) for both in places]
    parts = [part for path in paths if path and len(part := pd.read_csv(path))]
    if not parts:
        return pd.DataFrame()
    table = pd.concat(parts, ignore_index=True)
    return table.assign(running=np.arange(1, len(table) + 1))


def _tested(run: Path) -> dict[str, float]:
    """Return what was measured on test, {} if nothing was; scores on validation do not count."""
    for path in (run / stage / "metrics.json" for stage in reversed(notebooks.stages())):
        if path.is_file() and (metrics := disk.read_json(path)).get("part") == "test":
            return {"test_loss": metrics["log_loss"]["value"], "test_accuracy": metrics["accuracy"]["value"]}
    return {}


def _numbers(column: pd.Series) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce")
    return column if numbers.isna().any() else numbers


def _compared(runs: list[Path]) -> pd.DataFrame:
    """Return the members of a folder without sweep.csv: each run, and the parameters in which the recipes differ."""
    flat = {}
    for run in runs:
        content = notebooks.read_yaml(run / "recipe.yaml")
        sections = {name: section for name, section in content.items() if isinstance(section, dict)}
        flat[run.name] = {f"{s}.{p}": str(v) for s, section in sections.items() for p, v in section.items()}
    table = pd.DataFrame.from_dict(flat, orient="index").fillna("")
    varies = [name for name in table if table[name].nunique() > 1 and not name.startswith("published.")]
    members = table[varies].rename_axis("member").reset_index()
    return members.assign(state="done", error="")
