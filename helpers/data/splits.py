"""Assign each image to train, val or test: no group is in two parts, and the order of the files does not matter.

The rule of "ratio". Groups of several images are assigned first, the largest first, each to the part that most lacks
their classes. Single images follow, in one sequence for each class, stratum by stratum; their shares correct what the
groups left uneven. Ties are ordered by a hash of the seed and the content. The next image always goes to the part that
is furthest behind. So a class of n single images has its n p images of a part to within 4/3, and any stretch of its
sequence, and so every stratum, to within 2. A requested part without an image of a class then takes one group of it
from the part that has the most, if the class has enough groups for every part. With shares of 0.6, 0.15 and 0.25, a
class of two images has one for train and one for test; a third one goes to val. For a class that is a single group,
the user chooses (`rare`).

When a data set grows, no rule without a memory keeps both the shares and every image's part: a part that never
changes can depend only on the image itself. So there are two ways. With `previous`, an earlier split is the memory:
its images keep their parts and the new ones are assigned so that the shares are met again. With "hash", a group's part
follows from its own hash alone and never changes, but the shares are correct only on average: among n images a share p
differs by about sqrt(n p (1 - p)).
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from helpers.core import words
from helpers.data import dealing

Method = Literal["ratio", "hash", "fixed", "kfold", "predefined"]
Rare = Literal["error", "drop", "train_only"]
PARTS = ("train", "val", "test")
UNUSED = "unused"
UNTAUGHT = "No image of {} is in train: it cannot be learned. Add images of it, or set split.rare to drop."


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
    rare: Rare = "error",
    seed: int = 0,
) -> pd.Series:
    """Return the part of every image.

    Args:
        table: the inventory: path, label, split, sha256, group and the columns of `stratify`.
        method: "ratio" and "hash" fill shares; "fixed" takes `counts` images of each class; "kfold" makes `folds`
            equal folds, of which number `fold` is test and the next one val; "predefined" keeps the source's own
            parts and cuts a missing one from train.
        ratio: shares of train, val and test.
        stratify: columns whose every combination gets the shares too; the label always does.
        counts: images of each class for train, val and test; 0 for train means all others.
        previous: an earlier split.csv whose images keep their parts, for "ratio".
        rare: what to do with classes that cannot be both learned and tested: "error", "drop" (all their images are
            unused) or "train_only".
        seed: another seed, another split.

    Returns:
        "train", "val", "test" or "unused" for each row, in the index of `table`.

    Raises:
        ValueError: the split is not possible with these images; the message says why and how to fix it.
    """
    _check_columns(table, stratify)
    if previous is not None and method != "ratio":
        raise ValueError(f"previous: an earlier split is kept by the method ratio only, not by {method}.")
    few = rare_classes(table, method, counts)
    if few and rare == "error":
        raise ValueError(_too_few(few, table, counts if method == "fixed" else ()))
    # A group that holds an image of such a class goes with it: it must not be in two parts.
    apart = table["label"].isin(few)
    apart = apart if rare == "drop" else table["group"].isin(table.loc[apart, "group"])
    if (rare == "drop" and table.loc[~apart, "label"].nunique() < 2) or apart.all():
        raise ValueError(f"No classes remain to learn and test: {_too_few(few, table, ())}")
    assigned = _assigned(table[~apart], method, ratio, stratify, counts, folds, fold, previous, seed)
    parts = assigned.reindex(table.index).fillna(UNUSED if rare == "drop" else "train").rename("part")
    untaught = _untaught(table, parts)
    if untaught and rare != "drop":
        raise ValueError(UNTAUGHT.format(listed(untaught)))
    parts = parts.mask(table["label"].isin(untaught), UNUSED)
    if table.loc[parts == "train", "label"].nunique() < 2:
        raise ValueError("Fewer than two classes remain in train: a classifier needs two. Add images.")
    return parts


def _assigned(
    table: pd.DataFrame,
    method: Method,
    ratio: Sequence[float],
    stratify: Sequence[str],
    counts: Sequence[int],
    folds: int,
    fold: int,
    previous: pd.DataFrame | None,
    seed: int,
) -> pd.Series:
    if method == "predefined":
        return _predefined(table, ratio, stratify, seed)
    if method == "ratio":
        return by_ratio(table, ratio, stratify=stratify, seed=seed, kept=_kept(table, previous))
    if method == "hash":
        return by_hash(table, ratio, seed=seed)
    if method == "fixed":
        return by_counts(table, counts, seed=seed)
    return by_fold(table, folds, fold, stratify=stratify, seed=seed)


def rare_classes(table: pd.DataFrame, method: Method, counts: Sequence[int] = ()) -> list[str]:
    """Return the classes with too few groups to be both learned and tested; with too few images, for "fixed"."""
    if method == "predefined":
        return []
    groups = table.groupby("label")["group"].nunique()
    few = {*groups.index[groups < 2]}
    if method == "fixed" and len(counts) == len(PARTS):
        images = table["label"].value_counts()
        few |= {*images.index[images < sum(counts[1:]) + max(counts[0], 1)]}
    return words.natural_order(few)


def rehearse(table: pd.DataFrame, settings: Mapping[str, Any]) -> None:
    """Raise the errors of a split that the labels alone show, before an image is opened.

    Args:
        table: as `sources.read` returns it: path, label, split, group.
        settings: the parameters of 01_split.

    Raises:
        ValueError: a class is too small, or a part would be empty; the message says how to fix it.
    """
    method, rare, ratio = settings["method"], settings["rare"], settings["ratio"]
    table = table.assign(group=table["group"].where(table["group"] != "", table["path"]))
    few = rare_classes(table, method, settings["counts"])
    if few and rare == "error":
        raise ValueError(_too_few(few, table, settings["counts"] if method == "fixed" else ()))
    remaining_rows = table[~table["label"].isin(few)]
    if method == "predefined" and rare != "drop" and (untaught := _untaught(table, table["split"])):
        raise ValueError(UNTAUGHT.format(listed(untaught)))
    requested_parts = [part for part, share in zip(PARTS, ratio, strict=False) if share > 0]
    if (
        method == "ratio"
        and len(remaining_rows)
        and remaining_rows.groupby("label")["group"].nunique().max() < len(requested_parts)
    ):
        raise ValueError(
            f"No class has the {len(requested_parts)} images or groups that {', '.join(requested_parts)} need, so a"
            " part would be empty. Add images, or split without a test part: split.ratio=[0.5, 0.5, 0] and"
            " evaluate.part=val."
        )


def has_validation(table: pd.DataFrame, settings: Mapping[str, Any]) -> bool:
    """Return whether the settings or the source give a validation part; the arguments are those of `rehearse`."""
    if settings["method"] == "kfold":
        return True
    if settings["method"] == "predefined" and (table["split"] == "val").any():
        return True
    shares = settings["counts"] if settings["method"] == "fixed" else settings["ratio"]
    return shares[PARTS.index("val")] > 0


def check_parts(split: pd.DataFrame, method: Method, ratio: Sequence[float], counts: Sequence[int]) -> str:
    """Return a sentence about the classes that a part lacks, "" when every part has every class.

    Raises:
        ValueError: a requested part is empty.
    """
    shares = {"fixed": counts, "kfold": (1, 1, 1)}.get(method, ratio)
    requested_parts = [part for part, share in zip(PARTS, shares, strict=False) if share > 0 or part == "train"]
    has = {part: {*split.loc[split["part"] == part, "label"]} for part in PARTS}
    if empty := [part for part in requested_parts if not has[part]]:
        raise ValueError(
            f"{', '.join(empty)} got no image. Set a larger share, add images, or leave out the part with a"
            " share of 0 in split.ratio."
        )
    all_classes = set().union(*has.values())
    lacking = {
        part: words.natural_order(all_classes - has[part]) for part in PARTS if has[part] and all_classes - has[part]
    }
    sentences = [
        f"{part} lacks {len(names)} of {len(all_classes)} classes: {listed(names)}" for part, names in lacking.items()
    ]
    return "; ".join(sentences)


def dropped(split: pd.DataFrame) -> list[str]:
    """Return the classes that no part has: all their images are unused."""
    return words.natural_order({*split["label"]} - {*split.loc[split["part"].isin(PARTS), "label"]})


def listed(names: Sequence[str], limit: int = 10) -> str:
    """Return names as text: the first `limit` and the number of the others."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def by_ratio(
    table: pd.DataFrame,
    ratio: Sequence[float],
    *,
    stratify: Sequence[str] = (),
    seed: int = 0,
    kept: pd.Series | None = None,
) -> pd.Series:
    """Assign the groups of every class by shares; the docstring of this module gives the rule.

    Args:
        kept: parts that are fixed already, "" for the others; a group with a fixed image follows it.
    """
    check_ratio(ratio)
    parts = dealing.assign_groups(table, ratio, PARTS, stratify=stratify, seed=seed, kept=kept)
    return dealing.fill(table, parts, [part for part, share in zip(PARTS, ratio, strict=True) if share > 0], seed, kept)


def by_hash(table: pd.DataFrame, ratio: Sequence[float], *, seed: int = 0) -> pd.Series:
    """Assign each group to the part whose interval of [0, 1) holds its seeded hash.

    An image's part depends on its group alone. A group of the user never changes its name, nor does a single
    image; only a group of look-alikes can, when a new look-alike joins it.
    """
    check_ratio(ratio)
    groups = table["group"].unique()
    places = np.searchsorted(np.cumsum(ratio)[:-1], [_fraction(seed, name) for name in groups], side="right")
    return table["group"].map(dict(zip(groups, np.asarray(PARTS)[places], strict=True))).rename("part")


def by_counts(table: pd.DataFrame, counts: Sequence[int], *, seed: int = 0) -> pd.Series:
    """Assign `counts` images of each class to test, then val, then train, in the order of their seeded hashes.

    A group is assigned whole or not at all. Images of no part are "unused".

    Raises:
        ValueError: a class has too few images, or groups that cannot make up the counts.
    """
    if len(counts) != len(PARTS) or min(counts) < 0 or not any(counts[1:]):
        raise ValueError(f"counts: {list(counts)} must be three numbers (train, val, test); train 0 takes all others.")
    open_places = {label: dict(zip(PARTS, counts, strict=True)) for label in table["label"].unique()}
    rest = UNUSED if counts[0] else "train"
    labels, parts = table["label"].to_numpy(), np.full(len(table), rest, dtype=object)
    for rows in dealing.in_order(table, (), seed):
        names, sizes = np.unique(labels[rows], return_counts=True)
        for part in reversed(PARTS):
            if all(open_places[name][part] >= size for name, size in zip(names, sizes, strict=True)):
                parts[rows] = part
                for name, size in zip(names, sizes, strict=True):
                    open_places[name][part] -= size
                break
    short = [
        f"{name}: {part} lacks {n}" for name, by_part in open_places.items() for part, n in by_part.items() if n > 0
    ]
    if short:
        raise ValueError(f"counts: {list(counts)} are more than some classes have ({'; '.join(sorted(short)[:5])}).")
    return pd.Series(parts, index=table.index, name="part")


def by_fold(table: pd.DataFrame, folds: int, fold: int, *, stratify: Sequence[str] = (), seed: int = 0) -> pd.Series:
    """Make `folds` equal folds; number `fold` (from 1) is test, the next one val, the others train."""
    if not (folds >= 3 and 1 <= fold <= folds):
        raise ValueError(f"folds, fold: {folds}, {fold}; there must be 3 folds or more, and fold one of them.")
    names = [str(number) for number in range(folds)]
    fold_of_row = dealing.assign_groups(table, [1 / folds] * folds, names, stratify=stratify, seed=seed)
    parts = dict.fromkeys(names, "train") | {names[fold % folds]: "val", names[fold - 1]: "test"}
    return fold_of_row.map(parts)


def counts(split: pd.DataFrame, columns: Sequence[str] = ("label",)) -> pd.DataFrame:
    """Return how many images each class (or each combination of `columns`) has in each part, with totals."""
    table = pd.crosstab([split[column] for column in columns], split["part"])
    if "label" in columns:
        place = {label: number for number, label in enumerate(words.natural_order(split["label"]))}
        table = table.iloc[np.argsort([place[label] for label in table.index.get_level_values("label")], kind="stable")]
    table = table[[part for part in (*PARTS, UNUSED) if part in table]]
    table = table.assign(all=table.sum(axis=1))
    name = "all" if "all" not in table.index.get_level_values(0) else "all classes"  # a class may be called "all"
    table.loc[name if len(columns) == 1 else (name, *[""] * (len(columns) - 1)), :] = table.sum()
    return table.astype(int)


def compare(table: pd.DataFrame, previous: pd.DataFrame) -> pd.DataFrame:
    """Return how many images of each earlier part (or "new") are in each part now; images are matched by content."""
    earlier = previous.drop_duplicates("sha256").set_index("sha256")["part"]
    now, before = table["part"], table["sha256"].map(earlier).fillna("new")
    moves = pd.crosstab(before.rename("before"), now.rename("now"))
    order = (*PARTS, UNUSED, "new")
    return moves.reindex(
        index=[part for part in order if part in moves.index], columns=[p for p in order if p in moves]
    )


def check_ratio(ratio: Sequence[float]) -> None:
    """Raise ValueError unless `ratio` is three shares that add up to 1, with images to train on and to hold out."""
    if len(ratio) != len(PARTS) or min(ratio) < 0 or abs(sum(ratio) - 1) > 1e-6:
        raise ValueError(f"ratio: {list(ratio)} must be three shares (train, val, test) that add up to 1.")
    if ratio[0] == 0 or ratio[0] > 1 - 1e-6:
        raise ValueError(f"ratio: {list(ratio)} must leave images to train on and images to hold out.")


def _too_few(few: list[str], table: pd.DataFrame, counts: Sequence[int]) -> str:
    images, groups = table["label"].value_counts(), table.groupby("label")["group"].nunique()
    purpose = f"for counts: {list(counts)}" if len(counts) else "to be both learned and tested"
    many = [f"{groups[name]} groups" if groups[name] > 1 else "one group" for name in few]
    classes = [f"{name} ({images[name]} in {where})" for name, where in zip(few, many, strict=True)]
    return (
        f"{len(few)} of {len(groups)} classes have too few images {purpose}: {listed(classes)}. Add"
        " images, remove the classes, or set split.rare to drop (they are left out) or train_only (they are learned,"
        " never tested)."
    )


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
            f"previous: new images join groups that are in different parts: {', '.join(new[:5]) or 'none'}."
            " Remove them, or start a new split without `previous`."
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


def _untaught(table: pd.DataFrame, parts: pd.Series) -> list[str]:
    """Return the classes that are in use, but not in train."""
    used = parts.isin(PARTS)
    return words.natural_order({*table["label"][used]} - {*table["label"][parts == "train"]})


def _check_columns(table: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"stratify: the inventory has no column {', '.join(missing)}. It has {', '.join(table)}.")


def _fraction(seed: int, name: str) -> float:
    """Return a number in [0, 1) that follows from `seed` and `name` alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7]) / 2**56
