"""What a fit will do, settled before its first update: the examples of each update, and the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.shared import causal
from components.train import finder, retention, shards
from components.train.config import TrainConfig
from components.train.data import schedule_batches
from components.train.objectives.base import Objective
from components.train.ranks import Ranks


class Updates(Sequence[Any]):
    """The examples of each update, made when it is asked for: they may be on disk."""

    def __init__(self, examples: Sequence[Any], steps: Sequence[Sequence[Sequence[int]]]) -> None:
        self._examples, self._steps = examples, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return [[self._examples[i] for i in micro] for micro in self._steps[at]]


@dataclass(frozen=True)
class Plan:
    """Of a fit.

    Args:
        updates: [update][micro-batch] -> encoded examples.
        config: settings, with a number as learning rate.
        range_test: `rate` and `curve`, see finder.Found, where the rate was looked for.
    """

    updates: Sequence[Sequence[Sequence[Any]]]
    config: TrainConfig
    range_test: dict[str, Any]


def plan(
    objective: Objective,
    train: Sequence[Any],
    config: TrainConfig,
    precision: causal.Precision,
    folder: Path,
    ranks: Ranks,
    before: int = 0,
) -> Plan:
    """The plan of a fit: the same whenever it is made anew. Arguments as those of `fit`.

    `before` says how many updates an earlier phase made.
    """
    steps = schedule_batches(shards.lengths(train), config, objective.packs)
    updates: Sequence[Any] = Updates(train, steps)
    if objective.retained and config.retain and config.retain.replay:
        updates = retention.replayed(updates, objective.retained.kept, config.retain.replay, config)
    found = finder.settle(objective, updates, config, precision, folder, ranks, before)
    if not found.rate:
        return Plan(updates, config, {})
    return Plan(updates, config.model_copy(update={"learning_rate": found.rate}), asdict(found))
