"""What a search adds to the training that one of its trials is: `train_here` asks here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Pruned(Exception):
    """The search ends this trial: others that came as far are better."""


@dataclass(frozen=True)
class Guide:
    """Of a trial; of a training that stands by itself nothing.

    Args:
        chosen: the settings that are tried, by name.
        suffix: of the name of the MLflow run.
        tags: of the MLflow run.
        longest_judged: tokens of an eval example at most, so that all trials are judged on the same ones; 0
            for max_length.
        seen: receives the history after each update and evaluation, and may raise Pruned.
    """

    chosen: Mapping[str, Any] = field(default_factory=dict)
    suffix: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    longest_judged: int = 0
    seen: Callable[[Sequence[Mapping[str, float]]], None] = lambda history: None


ALONE_STANDING = Guide()
