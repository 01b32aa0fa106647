"""Assign groups of images to parts by shares, independent of their order; the docstring of `splits` gives the rule."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd


def hashes(values: pd.Series, seed: int) -> pd.Series:
    """Return a hash of the seed and each value: their order depends on nothing else."""
    return values.map(lambda value: hashlib.sha256(f"{seed}:{value}".encode()).hexdigest())


def assign_groups(
    table: pd.DataFrame,
    shares: Sequence[float],
    names: Sequence[str],
    *,
    stratify: Sequence[str],
    seed: int,
    kept: pd.Series | None = None,
) -> pd.Series:
    """Assign groups to the parts `names` by `shares`: settled ones, then those of several images, then single ones."""
    codes, classes = pd.factorize(table["label"], sort=True)  # sums of floats depend on the order of the classes
    settled = np.full(len(table), -1) if kept is None else pd.Index(names).get_indexer(kept)
    in_line = in_order(table, stratify, seed)
    is_single = [len(rows) == 1 and settled[rows[0]] < 0 for rows in in_line]
    first = [rows for rows, single in zip(in_line, is_single, strict=True) if not single]
    first.sort(key=lambda rows: settled[rows].max() < 0)
    parts = np.full(len(table), -1)
    target_shares = np.tile(np.asarray(shares, float), (len(classes), 1))
    _hand_out(first, codes, target_shares, settled, parts)

    is_assigned = parts >= 0
    lacking = target_shares * np.bincount(codes)[:, None]
    np.subtract.at(lacking, (codes[is_assigned], parts[is_assigned]), 1)
    lacking = np.where(target_shares > 0, np.maximum(lacking, 1e-9), 0)
    singles = [rows for rows, single in zip(in_line, is_single, strict=True) if single]
    _hand_out(singles, codes, lacking / lacking.sum(axis=1, keepdims=True), settled, parts)
    return pd.Series(np.asarray(names, dtype=object)[parts], index=table.index, name="part")


def fill(
    table: pd.DataFrame, parts: pd.Series, requested_parts: Sequence[str], seed: int, kept: pd.Series | None
) -> pd.Series:
    """Move a group of every class to each requested part without one, where the class has enough groups."""
    groups = table.groupby("group").agg(label=("label", "first"), labels=("label", "nunique"), size=("label", "size"))
    groups["part"] = parts.groupby(table["group"]).first()
    groups["free"] = groups["labels"] == 1
    if kept is not None:
        groups["free"] &= (kept == "").groupby(table["group"]).all()
    has = pd.crosstab(table["label"], parts).reindex(columns=list(requested_parts), fill_value=0)
    enough = table.groupby("label")["group"].nunique() >= len(requested_parts)
    key = hashes(table["sha256"], seed).groupby(table["group"]).min()
    moved: dict[str, str] = {}
    for label in has.index[(has == 0).any(axis=1) & enough.reindex(has.index)]:
        own = groups[groups["free"] & (groups["label"] == label)].assign(key=key).sort_values(["size", "key"])
        where = own["part"].copy()
        for part in [part for part in requested_parts if has.loc[label, part] == 0]:
            most = where.value_counts().reindex(list(requested_parts), fill_value=0)
            spare = where.index[where == most.idxmax()]
            if most.max() < 2 or not len(spare):
                break
            moved[spare[0]] = where[spare[0]] = part
    return parts.mask(table["group"].isin(moved), table["group"].map(moved))


def _hand_out(
    groups: list[np.ndarray], codes: np.ndarray, shares: np.ndarray, settled: np.ndarray, parts: np.ndarray
) -> None:
    """Write into `parts` (images,) the part of each group in turn: the one that most lacks its classes.

    Args:
        groups: row positions of each group.
        codes: the class of each row.
        shares: array of shape (classes, parts).
        settled: the part of each row that is already fixed, or -1.
    """
    owed = np.zeros_like(shares)
    owed_by_all = np.zeros(shares.shape[1])  # breaks ties, so that small classes do not all go to the same part
    for rows in groups:
        classes, sizes = np.unique(codes[rows], return_counts=True)
        due = sizes[:, None] * shares[classes]
        owed[classes] += due
        owed_by_all += due.sum(axis=0)
        part = settled[rows].max()
        if part < 0:
            score = sizes @ owed[classes] + 1e-6 * owed_by_all
            part = int(np.argmax(np.where(shares[classes].sum(axis=0) > 0, score, -np.inf)))
        owed[classes, part] -= sizes
        owed_by_all[part] -= len(rows)
        parts[rows] = part


def in_order(table: pd.DataFrame, stratify: Sequence[str], seed: int) -> list[np.ndarray]:
    """Return the groups as arrays of row positions, in the order in which they are assigned."""
    strata = table[["label", *stratify]].astype(str).agg("\0".join, axis=1)
    facts = pd.DataFrame({"group": table["group"], "key": hashes(table["sha256"], seed), "stratum": strata})
    line = facts.groupby("group").agg(size=("key", "size"), key=("key", "min"), stratum=("stratum", "min"))
    line.loc[line["size"] > 1, "stratum"] = ""
    order = line.sort_values(["size", "stratum", "key"], ascending=[False, True, True]).index
    rows = facts.reset_index(drop=True).groupby("group").indices
    return [rows[name] for name in order]
