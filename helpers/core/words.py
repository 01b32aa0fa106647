"""Text for people: suggested names, numbers, durations, names in their natural order."""

import difflib
import itertools
from collections.abc import Iterable


def did_you_mean(text: str, names: Iterable[str]) -> str:
    """Return " Did you mean x?", or " There are: ..." with all of `names` when none is similar."""
    names = list(names)
    return near(text, names) or f" There are: {', '.join(names)}."


def near(text: str, names: Iterable[str]) -> str:
    """Return " Did you mean x or y?", or "" when no name is similar."""
    close = difflib.get_close_matches(text, list(names), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def natural_order(names) -> list[str]:
    """Return names sorted as a person sorts them: "9" before "10"."""
    return sorted(set(names), key=lambda name: (_natural_key(name), name))


def _natural_key(name: str) -> list[tuple[bool, int, str]]:
    pieces = ["".join(piece) for _, piece in itertools.groupby(name, key=lambda character: character in "0123456789")]
    return [(False, int(piece), "") if piece[0] in "0123456789" else (True, 0, piece.casefold()) for piece in pieces]


def percent(fraction: float | None, digits: int = 1) -> str:
    """Return 0.8842 as "88.4 %", and an en dash for None."""
    return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"


def duration(seconds: float) -> str:
    """Return 72.4 as "1 min 12 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shorten(text: str, limit: int) -> str:
    """Return the text, or its start and end around an ellipsis when it is longer than `limit` characters."""
    text = " ".join(str(text).split())
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 3
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"
