"""Images that must stay together: the same file, look-alikes, bursts, groups of the user."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from helpers.data import inventory


def group(
    table: pd.DataFrame, *, distance: int = 8, burst_seconds: float = 0.0, burst_pattern: str = ""
) -> pd.DataFrame:
    """Return the inventory with images that must stay together under one `group`.

    Images belong together when they are the same file, look alike, share a value of the user's group column or are of
    one burst; or when both belong to a third image.

    Args:
        table: the inventory.
        distance: bits of 256 in which the perceptual hashes of look-alikes may differ; -1 does not compare them.
        burst_seconds: images whose EXIF times follow each other within this are a burst; 0 ignores times.
        burst_pattern: a regular expression; images whose file names give the same text for its first group (or for
            all of it) are a burst. Empty: ignores names.
    """
    user_groups = table["group"]
    keys = [table["sha256"], user_groups, _bursts_by_name(table["path"], burst_pattern)]
    keys.append(_bursts_by_time(table["taken"], burst_seconds))
    pairs = [_to_first(key) for key in keys]
    if distance >= 0:
        pairs.append(near_duplicates(table["phash"], distance))
    component = _components(len(table), np.concatenate(pairs))
    # The user's own value, if there is one, is the name: it stays when images are added.
    names = user_groups.where(user_groups != "", table["sha256"].str[:16])
    own = names.where(user_groups != "").groupby(component).transform("min")
    return table.assign(group=own.fillna(names.groupby(component).transform("min")))


def near_duplicates(hashes: pd.Series, distance: int) -> np.ndarray:
    """Return the pairs of images whose perceptual hashes differ in at most `distance` bits.

    Every pair is compared, which takes about two seconds for 20,000 images and a minute for 100,000. This runs block
    by block, so that memory stays small.

    Returns:
        Integer array of shape (pairs, 2): the positions of both images, the smaller first.
    """
    words = (
        np.frombuffer(bytes.fromhex("".join(hashes)), np.uint64)
        .reshape(len(hashes), inventory.HASH_SIDE**2 // 64)
        .T.copy()
    )
    rows = max(1, inventory.BLOCK // max(1, len(hashes)))
    pairs = [np.empty((0, 2), int)]
    for start in range(0, len(hashes), rows):
        differ = np.zeros((len(hashes[start : start + rows]), len(hashes) - start), np.uint16)
        for word in words:
            differ += np.bitwise_count(word[start : start + rows, None] ^ word[None, start:])
        pairs.append(np.column_stack(np.nonzero(np.triu(differ <= distance, 1))) + start)
    return np.concatenate(pairs)


def largest_groups(table: pd.DataFrame, root: Path, *, count: int = 6, shown: int = 6) -> dict[str, list[np.ndarray]]:
    """Return `shown` images of each of the `count` largest groups of several; white images fill up smaller groups."""
    sizes = table["group"].value_counts().sort_index().sort_values(ascending=False, kind="stable").head(count)
    members, white = (
        table.groupby("group")["path"],
        np.full((inventory.SHOWN_SIZE, inventory.SHOWN_SIZE, 3), 255, np.uint8),
    )
    thumbnails = {
        name: inventory.thumbnails(root, members.get_group(name).head(shown)) for name in sizes.index[sizes > 1]
    }
    return {
        f"{name[:8]}: {sizes[name]}": group_images + [white] * (shown - len(group_images))
        for name, group_images in thumbnails.items()
    }


def disagreements(table: pd.DataFrame) -> pd.DataFrame:
    """Return the images of groups that hold more than one label, group by group."""
    mixed = table.groupby("group")["label"].transform("nunique") > 1
    return table.loc[mixed, ["group", "path", "label"]].sort_values(["group", "path"]).reset_index(drop=True)


def other_labels(table: pd.DataFrame) -> list[str]:
    """Return for each image with several labels a sentence: where the same file has another label."""
    files: dict[str, dict[str, str]] = {}
    for row in table.itertuples():
        files.setdefault(row.sha256, {}).setdefault(row.label, row.path)
    others = [
        next(path for label, path in files[row.sha256].items() if label != row.label) for row in table.itertuples()
    ]
    return [f"the same file has another label: {path}" for path in others]


def _bursts_by_name(paths: pd.Series, pattern: str) -> pd.Series:
    """Return for each path the text that `pattern` finds in its file name, or ""."""
    if not pattern:
        return pd.Series("", index=paths.index)
    try:
        matches = [re.search(pattern, PurePosixPath(path).name) for path in paths]
    except re.error as error:
        raise ValueError(f"burst_pattern: {pattern!r} is not a regular expression: {error}.") from None
    texts = [match[1 if match.re.groups else 0] or "" if match else "" for match in matches]
    return pd.Series(texts, index=paths.index)


def _bursts_by_time(taken: pd.Series, seconds: float) -> pd.Series:
    """Return for each EXIF time the number of its burst as text, or "" when it is unknown."""
    times = pd.to_datetime(taken, format="%Y:%m:%d %H:%M:%S", errors="coerce").dropna().sort_values(kind="stable")
    if not seconds or times.empty:
        return pd.Series("", index=taken.index)
    number = (times.diff().dt.total_seconds() > seconds).cumsum()
    return number.astype(str).reindex(taken.index, fill_value="")


def _to_first(keys: pd.Series) -> np.ndarray:
    """Return pairs (position, position of the first row with the same key), leaving out empty keys."""
    positions = pd.Series(np.arange(len(keys)), index=keys.index)[keys != ""]
    return np.column_stack([positions, positions.groupby(keys[keys != ""]).transform("min")]).reshape(-1, 2)


def _components(count: int, pairs: np.ndarray) -> np.ndarray:
    """Return for each of `count` items the number of its connected component."""
    first, second = pairs.T
    graph = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def summary(table: pd.DataFrame) -> dict[str, Any]:
    """Return the numbers of groups and of their images, for the report's section on leakage."""
    sizes = table["group"].value_counts()
    mixed = table.groupby("group")["label"].nunique() > 1
    return {
        "images": len(table),
        "groups": len(sizes),
        "groups_of_several": int((sizes > 1).sum()),
        "images_in_them": int(sizes[sizes > 1].sum()),
        "largest_group": int(sizes.max()),
        "groups_with_several_labels": int(mixed.sum()),
    }
