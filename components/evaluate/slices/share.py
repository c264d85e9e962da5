"""A share of an evaluation's work: whole batches, so that dividing the work changes no number.

An evaluation is a list of batches for each system that it judges. A slice does every so-many-th of them and
no batch is cut, so each example is computed in the company that it would have had in one process: a matrix
product of another shape may round in another way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from components.shared.errors import TuneyardError

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Share:
    """Which of the batches are done here; all of them unless it is said.

    Args:
        number: of the slice, from 1.
        of: how many slices there are.
    """

    number: int = 1
    of: int = 1

    @classmethod
    def read(cls, text: str) -> Share:
        """The share that `str` wrote, such as `2 of 4`.

        Raises:
            TuneyardError: it is none.
        """
        found = re.fullmatch(r"(\d+) of (\d+)", text)
        share = cls(*map(int, found.groups())) if found else cls(0, 0)
        if not 1 <= share.number <= share.of:
            raise TuneyardError(f"{text!r} is no slice", "write it as `2 of 4`")
        return share

    def __str__(self) -> str:
        return f"{self.number} of {self.of}"

    @property
    def name(self) -> str:
        """As it stands in the store and in a run's records."""
        return f"slice-{self.number}-of-{self.of}"

    @property
    def measures(self) -> bool:
        """Whether latency, throughput and memory are reported as they are here: of the first machine."""
        return self.number == 1

    def take(self, batches: Sequence[Batch]) -> list[Batch]:
        """Every `of`-th batch: batches are ordered by length, so the shares weigh about the same."""
        return list(batches[self.number - 1 :: self.of])

    def label(self, what: str) -> str:
        """A progress line's words, with the slice in front where there is one."""
        return what if self.of == 1 else f"slice {self}, {what}"


@dataclass(frozen=True)
class Part:
    """What a share found.

    Args:
        arrays: `<what>` -> rows, and `<what>:of` -> of which example each row is.
        facts: what every share must find alike, such as how many texts were cut.
        measured: system -> what was measured here.
    """

    arrays: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)


def rows(what: str, of: Sequence[int], values: Any) -> dict[str, Any]:
    """Arrays of a Part: a row of `values` for each example in `of`."""
    import numpy as np

    return {f"{what}:of": np.asarray(of, dtype=np.int64), what: np.asarray(values)}


def joined(parts: Sequence[Part], what: str) -> Any:
    """The rows of all parts, in the order of the examples.

    Raises:
        TuneyardError: an example has no row, or two.
    """
    import numpy as np

    found = [part for part in parts if len(part.arrays[f"{what}:of"])]
    of = np.concatenate([part.arrays[f"{what}:of"] for part in found])
    order = np.argsort(of, kind="stable")
    if not np.array_equal(of[order], np.arange(len(of))):
        raise TuneyardError(
            f"{what}: the slices have {len(of)} results for {len(set(of.tolist()))} examples, "
            f"the last of which is {int(of.max())}",
            "submit again with hardware.stages.evaluate.slices: 1, and report this",
        )
    return np.concatenate([part.arrays[what] for part in found])[order]
