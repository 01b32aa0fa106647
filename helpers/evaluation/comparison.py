"""Two models on the same images: which is better, and is that more than chance?"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from helpers.evaluation import entries as entries_of
from helpers.evaluation import metrics, tables

ALIKE = "no difference shown"  # as a verdict


def compare(
    first: pd.DataFrame, second: pd.DataFrame, class_names: Sequence[str], seed: int = 0, n_bootstrap: int = 2000
) -> dict:
    """Return whether the difference in accuracy of two models on the same images is more than chance.

    Only images on which the two disagree count: McNemar's test in its exact binomial form (McNemar, 1947;
    recommended for comparing two trained classifiers by Dietterich, 1998), and a paired bootstrap interval.

    Args:
        first, second: predictions of the same images, in any order.

    Returns:
        n, first and second (accuracies), difference {"value", "low", "high"} (second minus first), only_first_right,
        only_second_right, p_value, and a plain `sentence`.

    Raises:
        ValueError: the two tables are not of the same images with the same labels.
    """
    tables.parse(first, class_names)
    tables.parse(second, class_names)
    if first["path"].duplicated().any() or set(first["path"]) != set(second["path"]) or len(first) != len(second):
        raise ValueError("the two sets of predictions are not of the same images; compare runs that share a test part")
    first, second = first.set_index("path").sort_index(), second.set_index("path").sort_index()
    if not first["label"].equals(second["label"]):
        raise ValueError("the two sets of predictions give images different labels; compare runs with equal labels")
    right = [(table["label"] == table["predicted"]).to_numpy() for table in (first, second)]
    gain = right[1].astype(float) - right[0]
    truth = pd.factorize(first["label"])[0]
    draws = np.concatenate([weights @ gain for weights in metrics.resamples(truth, seed, n_bootstrap)]) / len(gain)
    low, high = np.quantile(draws, metrics.ENDS)
    lost, won = int((gain < 0).sum()), int((gain > 0).sum())
    p_value = _exact(won, lost)
    verdict = "more than chance explains" if p_value < 1 - metrics.LEVEL else "within what chance explains"
    return {
        "n": len(gain),
        "first": float(right[0].mean()),
        "second": float(right[1].mean()),
        "difference": {"value": float(gain.mean()), "low": float(low), "high": float(high)},
        "only_first_right": lost,
        "only_second_right": won,
        "p_value": p_value,
        "sentence": f"The second is right on {won} images that the first gets wrong, and wrong on {lost} that the "
        f"first gets right: {100 * gain.mean():+.1f} points of accuracy, {verdict} "
        f"(exact McNemar test, p = {p_value:.2g}).",
    }


def against_the_first(
    entries: Sequence[entries_of.Entry], paths: Sequence[str], *, seed: int = 0, n_bootstrap: int = 2000
) -> pd.DataFrame:
    """Return each entry compared with the first one on the same images.

    The interval of a difference is a percentile bootstrap in which both entries are resampled by the same images, those
    of one group together; over several entries the intervals are wider, so that they hold together in 95 of 100 cases
    (Bonferroni). Where an entry has several runs, its metrics are means over them. McNemar's exact test is for single
    runs only; over several entries its p-values are adjusted by Holm (1979).

    Args:
        entries: from `entries.grouped`; the others are compared with the first.
        paths: of the images, from `entries.same_images`.
        seed: of the resamples.
        n_bootstrap: resamples.

    Returns:
        Columns entry, metric, first, value, difference (value minus first) with low and high, p_value (of accuracy, NaN
        for entries of several runs) and verdict: better, worse, or "no difference shown" where the interval holds 0 or
        the test does not separate the two.
    """
    names = entries[0].runs[0].class_names
    every = [[_of(run, paths, names) for run in entry.runs] for entry in entries]
    truth = every[0][0][0]
    groups = [entries[0].runs[0].groups[path] for path in paths]
    scores = [[metrics.Scores(*parts) for parts in members] for members in every]
    draws: list[list[dict]] = [[] for _ in entries]
    for weights in metrics.resamples(truth, seed, n_bootstrap, groups):
        for number, members in enumerate(scores):
            draws[number].append(_mean([one.of(weights) for one in members]))
    once = [_mean([one.of(np.ones((1, len(truth)))) for one in members]) for members in scores]
    rows, tail = [], metrics.ENDS[0] / max(1, len(entries) - 1)
    for number, entry in enumerate(entries[1:], start=1):
        p_value = _mcnemar(every[0], every[number])
        for name in entries_of.SHOWN:
            first, value = float(once[0][name][0]), float(once[number][name][0])
            gains = np.concatenate([own[name] - base[name] for own, base in zip(draws[number], draws[0], strict=True)])
            low, high = (float(end) for end in np.quantile(gains, [tail, 1 - tail]))
            p = p_value if name == "accuracy" else np.nan
            rows.append([entry.name, name, first, value, value - first, low, high, p, _verdict(name, low, high)])
    columns = ["entry", "metric", "first", "value", "difference", "low", "high", "p_value", "verdict"]
    table = pd.DataFrame(rows, columns=columns)
    table["p_value"] = _holm(table["p_value"].to_numpy())
    table.loc[table["p_value"] >= 1 - metrics.LEVEL, "verdict"] = ALIKE
    return table


def sentences(table: pd.DataFrame, first: str) -> list[str]:
    """Return a sentence for each entry of a table of `against_the_first`."""
    lines = []
    for row in table[table["metric"] == "accuracy"].itertuples():
        test = f", p = {row.p_value:.2g} by McNemar's test" if np.isfinite(row.p_value) else ""
        lines.append(
            f"{row.entry} against {first}: {100 * row.difference:+.1f} points of accuracy ({100 * row.low:+.1f} to"
            f" {100 * row.high:+.1f}{test}): {row.verdict}."
        )
    return lines


def changed_sides(one: entries_of.Run, other: entries_of.Run, paths: Sequence[str], n: int = 24) -> pd.DataFrame:
    """Return images that only one run classifies correctly, the most confident first, equally many of each kind.

    Returns:
        Columns file (the resized image), label, first and second (what each predicted), and why, in words.
    """
    tables_of = [run.predictions.set_index("path").loc[list(paths)] for run in (one, other)]
    right = [(table["label"] == table["predicted"]).to_numpy() for table in tables_of]
    sure = np.max([table[one.class_names].to_numpy(float).max(axis=1) for table in tables_of], axis=0)
    parts = []
    for why, chosen in (
        (f"only {one.name} is right", right[0] & ~right[1]),
        (f"only {other.name} is right", right[1] & ~right[0]),
    ):
        rows = np.flatnonzero(chosen)[np.argsort(-sure[chosen], kind="stable")][: max(1, n // 2)]
        parts.append(pd.DataFrame({
            "file": [one.shown[paths[row]] for row in rows],
            "label": tables_of[0]["label"].to_numpy()[rows],
            "first": tables_of[0]["predicted"].to_numpy()[rows],
            "second": tables_of[1]["predicted"].to_numpy()[rows],
            "why": why,
        }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def _of(run: entries_of.Run, paths: Sequence[str], names: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return truth, predicted class and probabilities of a run's images, with the classes in the order of `names`."""
    table = run.predictions.set_index("path").loc[list(paths)].reset_index()
    truth, probabilities = tables.parse(table, names)
    return truth, tables.picked(table, names), probabilities


def _mean(parts: list[dict]) -> dict:
    return {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}


def _mcnemar(first: list[tuple], second: list[tuple]) -> float:
    if len(first) > 1 or len(second) > 1:
        return np.nan
    right = [truth == picked for [(truth, picked, _)] in (first, second)]
    return _exact(int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum()))


def _exact(won: int, lost: int) -> float:
    """Return the p-value of McNemar's test in its exact binomial form."""
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _holm(p_values: np.ndarray) -> np.ndarray:
    """Return the p-values adjusted for their number (Holm, 1979); NaN stays."""
    finite = np.flatnonzero(np.isfinite(p_values))
    adjusted, highest = p_values.copy(), 0.0
    for rank, place in enumerate(finite[np.argsort(p_values[finite], kind="stable")]):
        highest = max(highest, min(1.0, (len(finite) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _verdict(name: str, low: float, high: float) -> str:
    if low <= 0 <= high:
        return ALIKE
    return "better" if (low > 0) != (name == "log_loss") else "worse"


def captions(changed: pd.DataFrame) -> list[str]:
    """Return three lines for each image of a table of `changed_sides`."""
    rows = changed.itertuples(index=False)
    return [f"{row.why}\nis {row.label}\n{row.first}, {row.second}" for row in rows]


def headline(table: pd.DataFrame, first: str) -> str:
    """Return the comparison with the entry that is farthest from the first one, as one line."""
    own = table[table["metric"] == "accuracy"]
    return sentences(own.loc[[own["difference"].abs().idxmax()]], first)[0]
