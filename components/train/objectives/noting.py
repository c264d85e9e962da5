"""Objectives that say more of an update than its loss: means over its terms, summed in `summed_loss`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from components.train.objectives.base import Arithmetic, Objective
from components.train.ranks import Ranks


class Noting(Objective):
    """An objective whose history rows carry means of what it notes.

    Attributes:
        measures: the names, of an update; each is a sum over the terms of a micro-batch when noted.
        judged_measures: of an evaluation on eval, where these are others.
    """

    measures: Sequence[str] = ()
    judged_measures: Sequence[str] = ()

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._notes: dict[str, float] = {}
        self._judged: dict[str, float] = {}

    def note(self, **sums: float) -> None:
        """Add sums over the terms of a micro-batch."""
        self._sums.update(sums)

    def gradient(
        self,
        micros: Sequence[Sequence[Any]],
        terms: int,
        label_smoothing: float,
        arithmetic: Arithmetic,
        ranks: Ranks,
    ) -> float:
        """See Objective."""
        self._sums.clear()
        loss = super().gradient(micros, terms, label_smoothing, arithmetic, ranks)
        self._notes = self._means(self.measures, terms, ranks)
        return loss

    def judged_loss(self, encoded: Sequence[Any], batches: Iterable[Sequence[int]], ranks: Ranks) -> float:
        """See Objective."""
        self._sums.clear()
        loss = super().judged_loss(encoded, batches, ranks)
        names = self.judged_measures or self.measures
        means = self._means(names, sum(map(self.terms, encoded)), ranks)
        self._judged = {f"eval_{name}": value for name, value in means.items()}
        return loss

    def idle(self, arithmetic: Arithmetic | None = None) -> None:
        """See Objective; nothing is noted of it."""
        before = Counter(self._sums)
        super().idle(arithmetic)
        self._sums = before

    def _means(self, names: Sequence[str], terms: int, ranks: Ranks) -> dict[str, float]:
        # Every process asks for the same sums in the same order, whatever its share held.
        return {name: ranks.sum(self._sums[name]) / terms for name in names}

    def notes(self) -> dict[str, float]:
        """See Objective."""
        return self._notes

    def judged_notes(self) -> dict[str, float]:
        """See Objective."""
        return self._judged
