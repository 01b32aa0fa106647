"""The two phases of one run: which gives the run's model."""

import math

import pandas as pd

JOINED = "join"  # the phase of a history that is several joined runs, instead of phase 2


def better_phase(head: pd.DataFrame, fine_tune: pd.DataFrame | None, monitor: str = "val_loss") -> dict:
    """Return which phase gives the run's model: the one whose model is better on validation, never on test.

    The default is the validation loss, which counts how sure each prediction was. On a validation part of a few
    hundred images it separates two models, where accuracy changes in steps of a whole image. If the two phases
    minimise different losses (label smoothing or focal loss in one of them), use "val_accuracy". Equal values keep
    the head: fine-tuning then gained nothing.

    Args:
        head, fine_tune: the row of each phase's history that belongs to its model, as `saving.read_kept` returns it;
            no rows, or None, if it was not trained.
        monitor: a column of both; lower is better if its name holds "loss", otherwise higher.

    Returns:
        {"phase": "head" or "fine_tune", "monitor", "head", "fine_tune" (values, or None), "sentence"}.
    """
    histories = {"head": head, "fine_tune": fine_tune}
    trained = {name: table for name, table in histories.items() if table is not None and len(table)}
    best = dict.fromkeys(histories) | {name: _best(table, monitor, name) for name, table in trained.items()}
    words = monitor.replace("val_", "validation ").replace("_", " ")
    if not trained:
        raise ValueError("neither phase was trained: both histories are empty")
    if best["head"] is None:
        phase, words = "fine_tune", f"its {words} is {best['fine_tune']:.4f}"
        sentence = f"Phase 1 was not trained, so phase 2 is the run's model: {words}."
    elif best["fine_tune"] is None:
        sentence, phase = f"Only phase 1 was trained: its {words}, {best['head']:.4f}, is the run's model.", "head"
    else:
        better = best["fine_tune"] < best["head"] if "loss" in monitor else best["fine_tune"] > best["head"]
        better &= not math.isclose(best["fine_tune"], best["head"], rel_tol=1e-6)  # one is in float32, one may not be
        phase = "fine_tune" if better else "head"
        joined = set(fine_tune.get("phase", ())) == {JOINED}
        what, second = ("Joining runs", "the joined model") if joined else ("Fine-tuning", "phase 2")
        change = f"{words} went from {best['head']:.4f} (phase 1) to {best['fine_tune']:.4f} ({second})"
        sentence = (
            f"{what} helped: the {change}, so {second} is the run's model."
            if better
            else f"{what} did not help: the {change}, so phase 1 is the run's model."
        )
    return {"phase": phase, "monitor": monitor, **best, "sentence": sentence}


def _best(history: pd.DataFrame, monitor: str, phase: str) -> float:
    if monitor not in history or history[monitor].notna().sum() == 0:
        raise ValueError(f"the history of {phase} has no values of {monitor}; it has {', '.join(history.columns)}")
    return float(history[monitor].min() if "loss" in monitor else history[monitor].max())
