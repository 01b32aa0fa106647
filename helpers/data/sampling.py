"""The balance of train: fewer images of large classes, or repeated images of small classes."""

import numpy as np
import pandas as pd

from helpers.data.dealing import hashes
from helpers.data.splits import UNUSED


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
