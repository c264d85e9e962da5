"""What a fit will do, settled before its first update: the examples of each update, and the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.shared import causal
from components.train import finder, retention
from components.train.config import TrainConfig
from components.train.data import schedule_batches
from components.train.objectives.base import Objective
from components.train.ranks import Ranks


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
    steps = schedule_batches([len(e) for e in train], config, objective.packs)
    updates = [[[train[i] for i in micro] for micro in update] for update in steps]
    if objective.retained and config.retain:
        updates = retention.replayed(updates, objective.retained.kept, config.retain.replay, config)
    found = finder.settle(objective, updates, config, precision, folder, ranks, before)
    if not found.rate:
        return Plan(updates, config, {})
    return Plan(updates, config.model_copy(update={"learning_rate": found.rate}), asdict(found))
