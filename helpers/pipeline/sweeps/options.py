"""How a sweep spends its time where it does not train every member to the end: a search, or successive halving.

search: {trials: 40, metric: val_loss, sampler: tpe}       # members are drawn from what varies, see `search`
halving: {metric: val_loss, eta: 3, from_epochs: 2}        # weak members are stopped early, see `halving`
"""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from helpers.core import words


class Option(pydantic.BaseModel):
    """What both have: the number on validation that ranks the members, in their last phase; never on test."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)
    metric: Literal["val_loss", "val_accuracy"] = "val_loss"

    @property
    def falls(self) -> bool:
        """Return whether a lower number is better."""
        return "loss" in self.metric


class Search(Option):
    """A search: how many members are tried, and what proposes them."""

    trials: int = pydantic.Field(ge=1)
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = pydantic.Field(7, ge=0, lt=2**32)


class Halving(Option):
    """Successive halving: epochs before the first comparison; of those compared, one in `eta` continues."""

    eta: int = pydantic.Field(3, ge=2)
    from_epochs: int = pydantic.Field(ge=1)


def read(kind: type[Option], content: Any, problems: list[str]) -> Any:
    """Return an option of a sweep's file, None where it is not given or wrong; problems are added in words."""
    if content is None:
        return None
    name, known_keys = kind.__name__.lower(), kind.model_fields
    if not isinstance(content, Mapping):
        problems.append(f"{name}: expected {{{', '.join(f'{key}: ...' for key in known_keys)}}}, got {content!r}.")
        return None
    try:
        return kind(**content)
    except pydantic.ValidationError as error:
        for item in error.errors():
            key = str(item["loc"][0])
            hint = f" Got {content[key]!r}." if key in content else ""
            if key not in known_keys:
                hint = words.did_you_mean(key, known_keys)
            problems.append(f"{name}.{key}: {item['msg']}.{hint}")
        return None
