"""Settings of a search over other settings of train: `train.search:`."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    field_serializer,
    model_validator,
)

from components.shared.settings import Settings


class Range(Settings):
    """Numbers from `low` to `high`, both included; whole ones where the setting takes no others.

    Args:
        low: the smallest.
        high: the largest.
        log: whether their logarithms are drawn evenly, as is usual for rates.
    """

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low ({self.low:g}) is not below high ({self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError(f"low ({self.low:g}) has no logarithm: raise it above 0, or drop log")
        return self


Values = Range | tuple[Any, ...]
# YAML 1.1 reads 1e-4 as a text, for want of a point.
_POWER = re.compile(r"^[+-]?\d+(\.\d*)?[eE][+-]?\d+$")


def read_values(given: Any) -> Values | str:
    """What may be tried for a setting, or what is wrong with how it is written."""
    if isinstance(given, Range):
        return given
    if isinstance(given, list | tuple):
        given = [float(v) if isinstance(v, str) and _POWER.match(v) else v for v in given]
        if len(given) < 2:
            return "has nothing to choose from: give two values or more, or set it outside the space"
        if any(value in given[:at] for at, value in enumerate(given)):
            return f"has a value twice: {list(given)}"
        return tuple(given)
    if not isinstance(given, Mapping):
        return f"write a list, or {{low: ..., high: ..., log: true}} (it is {given!r})"
    try:
        return Range.model_validate(dict(given))
    except ValidationError as error:
        return "; ".join(_told(fault) for fault in error.errors())


def flat(space: Mapping[str, Any]) -> dict[str, Any]:
    """A space with the settings of a section under its name: `adapter: {rank: [8, 16]}` is `adapter.rank`."""
    found: dict[str, Any] = {}
    for name, given in space.items():
        inside = isinstance(given, Mapping) and all(
            isinstance(v, Mapping | list | tuple) for v in given.values()
        )
        if inside and given:
            found |= {f"{name}.{inner}": value for inner, value in flat(given).items()}
        else:
            found[str(name)] = given
    return found


def _flat(given: Any) -> Any:
    return flat(given) if isinstance(given, Mapping) else given


def _told(fault: Any) -> str:
    where = ".".join(map(str, fault["loc"][:1]))
    if fault["type"] == "extra_forbidden":
        return f"{where}: no such setting; there are high, log, low"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _values(given: Any) -> Values:
    """What may be tried for a setting, as a validator of pydantic has it."""
    read = read_values(given)
    if isinstance(read, str):
        raise ValueError(read)
    return read


class Pruner(Settings):
    """Ends trials that fall behind: asynchronous successive halving (Li et al. 2018, arXiv:1810.05934).

    After min_steps, min_steps x reduction_factor, ... optimizer updates a trial goes on only if it is among
    the best of those that came as far; of the first few, if it is the best.

    Args:
        min_steps: optimizer updates that every trial makes.
        reduction_factor: one in so many goes on (eta of the paper).
    """

    min_steps: int = Field(10, ge=1)
    reduction_factor: int = Field(3, ge=2)


class SearchConfig(Settings):
    """Trainings with other settings, of which the best one's model goes on; judged on eval, never on test.

    Settings are proposed by a tree-structured Parzen estimator (Bergstra et al. 2011, section 4), at first at
    random. What a search costs at most is trials x the training.

    Args:
        space: settings of train by name (`adapter.rank`) -> what may be tried: {low, high, log} or a list.
        trials: how many are tried.
        parallel: how many at a time, each in a process of its own; processor cores are divided among them,
            GPUs dealt out. With more than one, the order in which they end decides what is proposed next.
        pruner: see Pruner; null lets every trial train to its end.
        seed: of the proposals; all trials have train.seed.
    """

    space: Annotated[
        dict[str, Annotated[Any, AfterValidator(_values)]], BeforeValidator(_flat), Field(min_length=1)
    ]
    trials: int = Field(20, ge=2)
    parallel: int = Field(1, ge=1)
    pruner: Pruner | None = Pruner()
    seed: int = 42

    @field_serializer("space")
    def _written(self, space: dict[str, Values]) -> dict[str, Any]:
        return {n: v.model_dump() if isinstance(v, Range) else list(v) for n, v in space.items()}


def combinations(space: Mapping[str, Values], whole: Collection[str]) -> float:
    """How many combinations a space has.

    Args:
        space: name -> values.
        whole: names of the settings that take whole numbers alone.
    """
    count = 1.0
    for name, values in space.items():
        if not isinstance(values, Range):
            count *= len(values)
        else:
            count *= int(values.high) - int(values.low) + 1 if name in whole else math.inf
    return count
