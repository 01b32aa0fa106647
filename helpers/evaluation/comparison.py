"""Two models on the same images: which is better, and is that more than chance?"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from helpers.evaluation import metrics, tables


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
    tables.parse(first, class_names)
    tables.parse(second, class_names)
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
    low, high = np.quantile(draws, metrics.ENDS)
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
