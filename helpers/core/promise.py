"""What a recipe may ask 05 to promise about its answers; checked before a run starts."""

from collections.abc import Mapping
from typing import Any

from helpers.core import words

KINDS = ("precision", "risk", "coverage")


def check(promise: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a promise asks for: "kind", "wanted" and, except for coverage, "by" ("all" or "class"); {} for none.

    Args:
        promise: {"precision": 0.95} (share of the answers that are correct), {"risk": 0.02} (share that is wrong),
            either also with "by": "class", or {"coverage": 0.95} (share of the images whose set holds their class).

    Raises:
        ValueError: it asks for none or several of these, for another key, or for a share outside (0, 1).
    """
    if not promise:
        return {}
    kinds = [name for name in promise if name in KINDS]
    if unknown := [name for name in promise if name not in (*KINDS, "by")]:
        raise ValueError(
            f"promise has no {unknown[0]!r}.{words.near(str(unknown[0]), KINDS)} It takes one of {', '.join(KINDS)},"
            " and by."
        )
    if len(kinds) != 1:
        raise ValueError(f"promise takes exactly one of {', '.join(KINDS)}; got {dict(promise)}.")
    (kind,), by = kinds, promise.get("by", "all")
    share = promise[kind]
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise ValueError(f"promise: {kind} is a share between 0 and 1, such as 0.95; got {share!r}.")
    if by not in ("all", "class") or (kind == "coverage" and "by" in promise):
        raise ValueError(f"promise: by is all or class, for precision and risk; got {dict(promise)}.")
    return {"kind": kind, "wanted": float(share)} | ({} if kind == "coverage" else {"by": by})
