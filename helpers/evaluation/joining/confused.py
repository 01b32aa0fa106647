"""Which classes are confused: an order that makes them neighbours, and groups for a second stage."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

LEAST = 0.1  # the mean share of confusion from which two neighbours stay together


def order(counts: np.ndarray) -> list[int]:
    """Return an order of the classes in which confused classes are neighbours.

    It starts with the two classes that are confused most. Then it adds to either end the class that is confused most
    with the class there, as in S5's study.

    Args:
        counts: confusion matrix, (classes, classes), rows are true classes.
    """
    shares = confusions(counts)
    np.fill_diagonal(shares, -1.0)
    begin = np.unravel_index(shares.argmax(), shares.shape)
    chain = [int(place) for place in begin]
    remaining = [place for place in range(len(shares)) if place not in chain]
    while remaining:
        front, back = ([shares[chain[end], place] for place in remaining] for end in (0, -1))
        at_front = max(front) > max(back)
        closest = remaining.pop(int(np.argmax(front if at_front else back)))
        chain.insert(0 if at_front else len(chain), closest)
    return chain


def groups(counts: np.ndarray, class_names: Sequence[str], least: float = LEAST) -> list[list[str]]:
    """Return groups of classes that are confused, two classes or more in each; classes in none stay single.

    Neighbours in `order` stay together if they are confused by at least `least`. A group of more than half of all
    classes is cut where its neighbours are confused least, since the first stage would have nothing to separate.

    Args:
        counts: confusion matrix, (classes, classes), rows are true classes.
        class_names: in its order.
        least: mean of the shares of two classes that are confused with the other one.

    Raises:
        ValueError: fewer than three classes, which have nothing to group.
    """
    if len(class_names) < 3:
        raise ValueError(f"Two stages need at least three classes; there are {len(class_names)}.")
    shares, chain = confusions(counts), order(counts)
    parts = [[chain[0]]]
    for before, place in pairwise(chain):
        if shares[before, place] >= least:
            parts[-1].append(place)
        else:
            parts.append([place])
    most = max(2, len(class_names) // 2)
    while large := next((part for part in parts if len(part) > most), None):
        links = [shares[a, b] for a, b in pairwise(large)]
        cut, at = int(np.argmin(links)) + 1, parts.index(large)
        parts[at : at + 1] = [large[:cut], large[cut:]]
    return [[str(class_names[place]) for place in part] for part in parts if len(part) > 1]


def arranged(counts: np.ndarray, class_names: Sequence[str], groups: Sequence[Sequence[str]]) -> list[int]:
    """Return `order`, with the classes of each group as neighbours."""
    home = {name: group for group in groups for name in group}
    names = [class_names[place] for place in order(counts)]
    neighbours = [[other for other in names if other in home.get(name, [name])] for name in names]
    return [class_names.index(name) for name in dict.fromkeys(name for group in neighbours for name in group)]


def proposed(counts: np.ndarray, class_names: Sequence[str]) -> list[list[str]]:
    """Return `groups`, none of fewer than three classes."""
    return groups(counts, class_names) if len(class_names) > 2 else []


def confusions(counts: np.ndarray) -> np.ndarray:
    """Return how often two classes are confused: the mean of the two shares, float64, symmetric."""
    counts = np.asarray(counts, float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shares = (shares + shares.T) / 2
    np.fill_diagonal(shares, 0.0)
    return shares


def check(groups: Sequence[Sequence[str]], class_names: Sequence[str]) -> None:
    """Raise an error for groups that cannot make a two-stage classifier.

    Raises:
        ValueError: an unknown class, a class twice, a group of one class, or a single group of all classes.
    """
    named = [name for group in groups for name in group]
    if unknown := [name for name in named if name not in class_names]:
        raise ValueError(f"groups: there is no class {unknown[0]!r}; the run has {', '.join(class_names)}.")
    if twice := [name for name in named if named.count(name) > 1]:
        raise ValueError(f"groups: {twice[0]!r} is in two groups; a class can be in one.")
    if alone := [group for group in groups if len(group) < 2]:
        raise ValueError(f"groups: {list(alone[0])} holds fewer than two classes; expected two or more.")
    if not groups or len(groups[0]) == len(class_names):
        raise ValueError("groups: the first stage needs two things to separate; got no group, or one of all classes.")
