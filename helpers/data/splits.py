"""Which image goes to train, val and test: parts that no group straddles, whatever the order of the files.

The rule of "ratio". Groups of several images are dealt first, the largest in front, each to the part that its classes
are owed the most. Single images follow, in one line for each class, stratum by stratum; their shares make up for what
the groups left over. Equals are ordered by a hash of the seed and their content. The next image always goes to the
part that is furthest behind, so a class of n single images has its n p images of a part to within 4/3, and any
stretch of its line, hence every stratum, to within 2. With shares of 0.6, 0.15 and 0.25, a class of two images has
one for train and one for test, and from the fourth on one for val; a class that is a single group is refused.

When a data set grows, no rule without a memory keeps both the shares and every image's part: a part that never
changes can depend on nothing but the image itself. So there are two honest ways. With `previous`, an earlier split is
the memory: its images keep their parts and the new ones are dealt so that the shares are met again. With "hash", a
group's part follows from its own hash alone and so never changes, but shares are right only on average: among n
images a share p is off by about sqrt(n p (1 - p)).
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd

from helpers.core import words

Method = Literal["ratio", "hash", "fixed", "kfold", "predefined"]
PARTS = ("train", "val", "test")
UNUSED = "unused"


def assign(
    table: pd.DataFrame,
    method: Method = "ratio",
    *,
    ratio: Sequence[float] = (0.6, 0.15, 0.25),
    stratify: Sequence[str] = (),
    counts: Sequence[int] = (),
    folds: int = 5,
    fold: int = 1,
    previous: pd.DataFrame | None = None,
    seed: int = 0,
) -> pd.Series:
    """Return the part of every image.

    Args:
        table: the inventory: path, label, split, sha256, group and the columns of `stratify`.
        method: "ratio" and "hash" fill shares; "fixed" takes `counts` images of each class; "kfold" deals `folds`
            equal folds, of which number `fold` is test and the next one val; "predefined" keeps the source's own
            parts and cuts a missing one from train.
        ratio: shares of train, val and test.
        stratify: columns whose every combination shall have the shares too; the label always does.
        counts: images of each class for train, val and test; 0 for train means all others.
        previous: an earlier split.csv whose images keep their parts, for "ratio".
        seed: another seed, another split.

    Returns:
        "train", "val", "test" or "unused" for each row, in the index of `table`.

    Raises:
        ValueError: what is asked for is not possible with these images; the message says why and how to mend it.
    """
    _check_columns(table, stratify)
    if previous is not None and method != "ratio":
        raise ValueError(f"previous: an earlier split is kept by the method ratio only, not by {method}.")
    if method == "predefined":
        parts = _predefined(table, ratio, stratify, seed)
    else:
        check_classes(table)
        if method == "ratio":
            parts = by_ratio(table, ratio, stratify=stratify, seed=seed, kept=_kept(table, previous))
        elif method == "hash":
            parts = by_hash(table, ratio, seed=seed)
        elif method == "fixed":
            parts = by_counts(table, counts, seed=seed)
        else:
            parts = by_fold(table, folds, fold, stratify=stratify, seed=seed)
    _check_trainable(table, parts)
    return parts


def by_ratio(
    table: pd.DataFrame,
    ratio: Sequence[float],
    *,
    stratify: Sequence[str] = (),
    seed: int = 0,
    kept: pd.Series | None = None,
) -> pd.Series:
    """Deal the groups of every class by shares; the rule stands at the head of this module.

    Args:
        kept: parts that are settled, "" where they are not; a group with a settled image follows it.
    """
    check_ratio(ratio)
    return _deal(table, ratio, PARTS, stratify=stratify, seed=seed, kept=kept)


def by_hash(table: pd.DataFrame, ratio: Sequence[float], *, seed: int = 0) -> pd.Series:
    """Give each group the part in whose stretch of [0, 1) its seeded hash falls.

    An image's part depends on its group alone. A group that is the user's own never changes its name, nor does a
    single image; only a group of look-alikes can, when a new look-alike joins it.
    """
    check_ratio(ratio)
    groups = table["group"].unique()
    places = np.searchsorted(np.cumsum(ratio)[:-1], [_fraction(seed, name) for name in groups], side="right")
    return table["group"].map(dict(zip(groups, np.asarray(PARTS)[places], strict=True))).rename("part")


def by_counts(table: pd.DataFrame, counts: Sequence[int], *, seed: int = 0) -> pd.Series:
    """Take so many images of each class for test, then val, then train, in the order of their seeded hashes.

    A group is taken whole or not at all. What no part takes is "unused".

    Raises:
        ValueError: a class has too few images, or groups that cannot make up the counts.
    """
    if len(counts) != len(PARTS) or min(counts) < 0 or not any(counts[1:]):
        raise ValueError(f"counts: {list(counts)} must be three numbers (train, val, test); train 0 takes all others.")
    wanted = {label: dict(zip(PARTS, counts, strict=True)) for label in table["label"].unique()}
    rest = UNUSED if counts[0] else "train"
    labels, parts = table["label"].to_numpy(), np.full(len(table), rest, dtype=object)
    for rows in _line(table, (), seed):
        names, sizes = np.unique(labels[rows], return_counts=True)
        for part in reversed(PARTS):
            if all(wanted[name][part] >= size for name, size in zip(names, sizes, strict=True)):
                parts[rows] = part
                for name, size in zip(names, sizes, strict=True):
                    wanted[name][part] -= size
                break
    short = [f"{name}: {part} lacks {n}" for name, left in wanted.items() for part, n in left.items() if n > 0]
    if short:
        raise ValueError(f"counts: {list(counts)} cannot be had of every class ({'; '.join(sorted(short)[:5])}).")
    return pd.Series(parts, index=table.index, name="part")


def by_fold(table: pd.DataFrame, folds: int, fold: int, *, stratify: Sequence[str] = (), seed: int = 0) -> pd.Series:
    """Deal `folds` equal folds; number `fold` (from 1) is test, the one after it val, the others train."""
    if not (folds >= 3 and 1 <= fold <= folds):
        raise ValueError(f"folds, fold: {folds}, {fold}; there must be 3 folds or more, and fold one of them.")
    names = [str(number) for number in range(folds)]
    dealt = _deal(table, [1 / folds] * folds, names, stratify=stratify, seed=seed)
    parts = dict.fromkeys(names, "train") | {names[fold % folds]: "val", names[fold - 1]: "test"}
    return dealt.map(parts)


def counts(split: pd.DataFrame, columns: Sequence[str] = ("label",)) -> pd.DataFrame:
    """Return how many images each class (or each combination of `columns`) has in each part, with totals."""
    found = pd.crosstab([split[column] for column in columns], split["part"])
    if "label" in columns:
        place = {label: number for number, label in enumerate(words.natural_order(split["label"]))}
        found = found.iloc[np.argsort([place[label] for label in found.index.get_level_values("label")], kind="stable")]
    found = found[[part for part in (*PARTS, UNUSED) if part in found]]
    found = found.assign(all=found.sum(axis=1))
    name = "all" if "all" not in found.index.get_level_values(0) else "all classes"  # a class may be called "all"
    found.loc[name if len(columns) == 1 else (name, *[""] * (len(columns) - 1)), :] = found.sum()
    return found.astype(int)


def compare(table: pd.DataFrame, previous: pd.DataFrame) -> pd.DataFrame:
    """Return how many images of each earlier part (or "new") are in each part now; content tells which is which."""
    earlier = previous.drop_duplicates("sha256").set_index("sha256")["part"]
    now, before = table["part"], table["sha256"].map(earlier).fillna("new")
    found = pd.crosstab(before.rename("before"), now.rename("now"))
    order = (*PARTS, UNUSED, "new")
    return found.reindex(
        index=[part for part in order if part in found.index], columns=[p for p in order if p in found]
    )


def check_ratio(ratio: Sequence[float]) -> None:
    """Raise ValueError unless `ratio` is three shares that add up to 1, with something to train on and to hold out."""
    if len(ratio) != len(PARTS) or min(ratio) < 0 or abs(sum(ratio) - 1) > 1e-6:
        raise ValueError(f"ratio: {list(ratio)} must be three shares (train, val, test) that add up to 1.")
    if ratio[0] == 0 or ratio[0] > 1 - 1e-6:
        raise ValueError(f"ratio: {list(ratio)} must leave something to train on and something to hold out.")


def check_classes(table: pd.DataFrame) -> None:
    """Raise ValueError when a class cannot be both learned and tested; the message names it."""
    groups = table.groupby("label")["group"].nunique()
    lonely = words.natural_order(groups.index[groups < 2])
    if lonely:
        images = table["label"].value_counts()
        said = ", ".join(f"{name} ({images[name]} in one group)" for name in lonely)
        raise ValueError(
            f"These classes have a single image or a single group of images: {said}. A class needs one to be learned"
            " from and another to be tested on: add images or remove the class."
        )


def hashes(values: pd.Series, seed: int) -> pd.Series:
    """Return a hash of the seed and each value: an order that depends on nothing else."""
    return values.map(lambda value: hashlib.sha256(f"{seed}:{value}".encode()).hexdigest())


def _deal(
    table: pd.DataFrame,
    shares: Sequence[float],
    names: Sequence[str],
    *,
    stratify: Sequence[str],
    seed: int,
    kept: pd.Series | None = None,
) -> pd.Series:
    """Deal groups to the parts `names` by `shares`: settled ones, then those of several images, then single ones."""
    codes, classes = pd.factorize(table["label"], sort=True)  # sums of floats depend on the order of the classes
    settled = np.full(len(table), -1) if kept is None else pd.Index(names).get_indexer(kept)
    line = _line(table, stratify, seed)
    is_single = [len(rows) == 1 and settled[rows[0]] < 0 for rows in line]
    first = [rows for rows, single in zip(line, is_single, strict=True) if not single]
    first.sort(key=lambda rows: settled[rows].max() < 0)
    parts = np.full(len(table), -1)
    wanted = np.tile(np.asarray(shares, float), (len(classes), 1))
    _hand_out(first, codes, wanted, settled, parts)

    dealt = parts >= 0
    lacking = wanted * np.bincount(codes)[:, None]
    np.subtract.at(lacking, (codes[dealt], parts[dealt]), 1)
    lacking = np.where(wanted > 0, np.maximum(lacking, 1e-9), 0)
    singles = [rows for rows, single in zip(line, is_single, strict=True) if single]
    _hand_out(singles, codes, lacking / lacking.sum(axis=1, keepdims=True), settled, parts)
    return pd.Series(np.asarray(names, dtype=object)[parts], index=table.index, name="part")


def _hand_out(
    groups: list[np.ndarray], codes: np.ndarray, shares: np.ndarray, settled: np.ndarray, parts: np.ndarray
) -> None:
    """Write into `parts` (images,) the part of each group in turn: the one that its classes are owed the most.

    Args:
        groups: row positions of each group.
        codes: the class of each row.
        shares: array of shape (classes, parts).
        settled: the part of each row that is already known, or -1.
    """
    owed = np.zeros_like(shares)
    owed_by_all = np.zeros(shares.shape[1])  # breaks ties, so that small classes do not all favour the same part
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


def _line(table: pd.DataFrame, stratify: Sequence[str], seed: int) -> list[np.ndarray]:
    """Return the groups as arrays of row positions, in the order in which they are dealt."""
    strata = table[["label", *stratify]].astype(str).agg("\0".join, axis=1)
    facts = pd.DataFrame({"group": table["group"], "key": hashes(table["sha256"], seed), "stratum": strata})
    line = facts.groupby("group").agg(size=("key", "size"), key=("key", "min"), stratum=("stratum", "min"))
    line.loc[line["size"] > 1, "stratum"] = ""
    order = line.sort_values(["size", "stratum", "key"], ascending=[False, True, True]).index
    rows = facts.reset_index(drop=True).groupby("group").indices
    return [rows[name] for name in order]


def _kept(table: pd.DataFrame, previous: pd.DataFrame | None) -> pd.Series | None:
    """Return the part that each image had in an earlier split, by its content; "" for a new one."""
    if previous is None:
        return None
    earlier = previous[previous["part"].isin(PARTS)].drop_duplicates("sha256").set_index("sha256")["part"]
    kept = table["sha256"].map(earlier).fillna("")
    spread = kept[kept != ""].groupby(table["group"]).nunique()
    torn = spread.index[spread > 1]
    if len(torn):
        new = table[table["group"].isin(torn) & (kept == "")]["path"]
        raise ValueError(
            f"previous: new images tie images together that lie in different parts: {', '.join(new[:5]) or 'none'}."
            " Take them out, or begin a new split without `previous`."
        )
    return kept


def _predefined(table: pd.DataFrame, ratio: Sequence[float], stratify: Sequence[str], seed: int) -> pd.Series:
    parts = table["split"].rename("part")
    if (parts == "").all():
        raise ValueError(
            "method: predefined needs a source with its own parts: folders train, val, test, or a split column."
        )
    if (parts == "").any():
        raise ValueError(f"method: predefined, but {(parts == '').sum()} images have no part in the split column.")
    missing = [part for part in PARTS[1:] if not (parts == part).any() and ratio[PARTS.index(part)] > 0]
    if missing:
        check_ratio(ratio)
        shares = np.where(np.isin(PARTS, ["train", *missing]), ratio, 0)
        cut = by_ratio(table[parts == "train"], shares / shares.sum(), stratify=stratify, seed=seed)
        parts = parts.where(parts != "train", cut.reindex(parts.index))
    return parts


def _check_trainable(table: pd.DataFrame, parts: pd.Series) -> None:
    untaught = words.natural_order(set(table["label"]) - set(table["label"][parts == "train"]))
    if untaught:
        raise ValueError(f"No image of {', '.join(untaught)} is in train: it could not be learned. Add images of it.")


def _check_columns(table: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"stratify: the inventory has no column {', '.join(missing)}. It has {', '.join(table)}.")


def _fraction(seed: int, name: str) -> float:
    """Return a number in [0, 1) that follows from `seed` and `name` alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7]) / 2**56


def undersample(table: pd.DataFrame, limit: int | str, *, seed: int = 0) -> pd.DataFrame:
    """Mark images of large train classes as "unused" until each has at most `limit`.

    Args:
        table: with the column `part`.
        limit: "smallest", a number of images, or a multiple of the smallest class such as "2x".
    """
    train = table[table["part"] == "train"]
    sizes = train["label"].value_counts()
    most = _amount("undersample", limit, "smallest", sizes.min())
    rank = hashes(train["sha256"], seed).groupby(train["label"]).rank(method="first")
    return table.assign(part=table["part"].mask(rank.reindex(table.index) > most, UNUSED))


def oversample(table: pd.DataFrame, limit: int | str, *, seed: int = 0) -> pd.DataFrame:
    """Repeat rows of small train classes until each has at least `limit`; every image equally often, to within one.

    Args:
        table: with the column `part`.
        limit: "largest", a number of images, or a fraction of the largest class such as "0.5x".
    """
    train = table[table["part"] == "train"]
    sizes = train["label"].value_counts()
    least = _amount("oversample", limit, "largest", sizes.max())
    order = train.assign(key=hashes(train["sha256"], seed)).sort_values("key")
    extra = [
        rows.drop(columns="key").iloc[np.arange(least - len(rows)) % len(rows)]
        for _, rows in order.groupby("label")
        if len(rows) < least
    ]
    return pd.concat([table, *extra], ignore_index=True)


def _amount(name: str, limit: int | str, word: str, base: int) -> int:
    text = str(limit).strip()
    try:
        amount = base if text == word else round(float(text[:-1]) * base) if text.endswith("x") else int(text)
    except ValueError:
        amount = 0
    if amount < 1:
        raise ValueError(f'{name}: {limit!r} must be "{word}", a number of images, or a multiple such as "2x".')
    return amount
