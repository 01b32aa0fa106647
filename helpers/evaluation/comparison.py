"""Two models on the same images, and the two phases of one run: which is better, and is that more than chance?"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from helpers.evaluation import metrics


def compare(
    first: pd.DataFrame, second: pd.DataFrame, class_names: Sequence[str], seed: int = 0, n_bootstrap: int = 2000
) -> dict:
    """Two models on the same pictures: is the difference in accuracy more than chance?

    Only pictures on which the two disagree tell anything: McNemar's test in its exact binomial form (McNemar, 1947;
    recommended for comparing two trained classifiers by Dietterich, 1998), and a paired bootstrap interval.

    Args:
        first, second: predictions of the same pictures, in any order.

    Returns:
        n, first and second (accuracies), difference {"value", "low", "high"} (second minus first), only_first_right,
        only_second_right, p_value, and a plain `sentence`.

    Raises:
        ValueError: the two tables are not of the same pictures with the same labels.
    """
    metrics.parse(first, class_names)
    metrics.parse(second, class_names)
    if first["path"].duplicated().any() or set(first["path"]) != set(second["path"]) or len(first) != len(second):
        raise ValueError(
            "the two sets of predictions are not of the same pictures; compare runs that share a test part"
        )
    first, second = first.set_index("path").sort_index(), second.set_index("path").sort_index()
    if not first["label"].equals(second["label"]):
        raise ValueError("the two sets of predictions give the same pictures different labels; compare like with like")
    right = [(table["label"] == table["predicted"]).to_numpy() for table in (first, second)]
    gain = right[1].astype(float) - right[0]
    truth = pd.factorize(first["label"])[0]
    draws = np.concatenate([weights @ gain for weights in metrics.resamples(truth, seed, n_bootstrap)]) / len(gain)
    low, high = np.quantile(draws, [(1 - metrics.LEVEL) / 2, (1 + metrics.LEVEL) / 2])
    lost, won = int((gain < 0).sum()), int((gain > 0).sum())
    p_value = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    verdict = "more than chance explains" if p_value < 1 - metrics.LEVEL else "within what chance explains"
    return {
        "n": len(gain),
        "first": float(right[0].mean()),
        "second": float(right[1].mean()),
        "difference": {"value": float(gain.mean()), "low": float(low), "high": float(high)},
        "only_first_right": lost,
        "only_second_right": won,
        "p_value": p_value,
        "sentence": f"The second is right on {won} pictures that the first gets wrong, and wrong on {lost} that the "
        f"first gets right: {100 * gain.mean():+.1f} points of accuracy, {verdict} "
        f"(exact McNemar test, p = {p_value:.2g}).",
    }


def better_phase(head: pd.DataFrame, fine_tune: pd.DataFrame | None, monitor: str = "val_loss") -> dict:
    """Which phase gives the run's model: the one whose best epoch is better on the validation part, never on test.

    The default is the validation loss: it counts how sure each prediction was, so on a validation part of a few
    hundred pictures it tells two models apart where accuracy moves in steps of a whole picture. Where the two phases
    minimise different losses (label smoothing or focal loss in one of them), use "val_accuracy". Equal values keep
    the head: fine-tuning then gained nothing.

    Args:
        head, fine_tune: history.csv of each phase; no rows, or None, if it was not trained.
        monitor: a column of both; lower is better if its name holds "loss", otherwise higher.

    Returns:
        {"phase": "head" or "fine_tune", "monitor", "head", "fine_tune" (best values, or None), "sentence"}.
    """
    histories = {"head": head, "fine_tune": fine_tune}
    trained = {name: table for name, table in histories.items() if table is not None and len(table)}
    best = dict.fromkeys(histories) | {name: _best(table, monitor, name) for name, table in trained.items()}
    words = monitor.replace("val_", "validation ").replace("_", " ")
    if not trained:
        raise ValueError("neither phase was trained: both histories are empty")
    if best["head"] is None:
        phase, words = "fine_tune", f"its best {words} is {best['fine_tune']:.4f}"
        sentence = f"Phase 1 was not trained, so phase 2 is the run's model: {words}."
    elif best["fine_tune"] is None:
        sentence, phase = f"Only phase 1 was trained: its best {words}, {best['head']:.4f}, is the run's model.", "head"
    else:
        better = best["fine_tune"] < best["head"] if "loss" in monitor else best["fine_tune"] > best["head"]
        phase = "fine_tune" if better else "head"
        change = f"{words} went from {best['head']:.4f} (phase 1) to {best['fine_tune']:.4f} (phase 2)"
        sentence = (
            f"Fine-tuning helped: the best {change}, so phase 2 is the run's model."
            if better
            else f"Fine-tuning did not help: the best {change}, so phase 1 is the run's model."
        )
    return {"phase": phase, "monitor": monitor, **best, "sentence": sentence}


def _best(history: pd.DataFrame, monitor: str, phase: str) -> float:
    if monitor not in history or history[monitor].notna().sum() == 0:
        raise ValueError(f"the history of {phase} has no values of {monitor}; it has {', '.join(history.columns)}")
    return float(history[monitor].min() if "loss" in monitor else history[monitor].max())
