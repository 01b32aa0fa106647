"""How a sweep spends its time where it does not train every member to the end: a search, or successive halving.

search: {trials: 40, metric: val_loss, sampler: tpe}       # members are drawn from what varies, see `search`
halving: {metric: val_loss, eta: 3, from_epochs: 2}        # the hopeless are stopped early, see `halving`
"""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from helpers.core import words


class Option(pydantic.BaseModel):
    """What both have: the number of the members' validation that ranks them, in their last phase; never test."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)
    metric: Literal["val_loss", "val_accuracy"] = "val_loss"

    @property
    def falls(self) -> bool:
        """Whether a lower number is better."""
        return "loss" in self.metric


class Search(Option):
    """A search: how many members are tried, and what proposes them."""

    trials: int = pydantic.Field(ge=1)
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = pydantic.Field(7, ge=0, lt=2**32)


class Halving(Option):
    """Successive halving: epochs before the first comparison; of those compared, one in `eta` goes on."""

    eta: int = pydantic.Field(3, ge=2)
    from_epochs: int = pydantic.Field(ge=1)


def read(kind: type[Option], given: Any, problems: list[str]) -> Any:
    """Return an option of a sweep's file, None where it is not given or wrong; problems are added in words."""
    if given is None:
        return None
    name, known = kind.__name__.lower(), kind.model_fields
    if not isinstance(given, Mapping):
        problems.append(f"{name}: expected {{{', '.join(f'{key}: ...' for key in known)}}}, got {given!r}.")
        return None
    try:
        return kind(**given)
    except pydantic.ValidationError as error:
        for item in error.errors():
            key = str(item["loc"][0])
            hint = f" Got {given[key]!r}." if key in given else ""
            if key not in known:
                hint = words.did_you_mean(key, known)
            problems.append(f"{name}.{key}: {item['msg']}.{hint}")
        return None
