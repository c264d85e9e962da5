"""What a search adds to the training that one of its trials is: `train_here` asks here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.train.config import TrainConfig
from components.train.objectives.base import Objective


class Pruned(Exception):
    """The search ends this trial: others that came as far are better."""


@dataclass(frozen=True)
class Guide:
    """Of a trial; of a training that stands by itself nothing.

    Args:
        chosen: the settings that are tried, by name.
        suffix: of the name of the MLflow run.
        tags: of the MLflow run.
        tokens: folder of examples as token ids, see `write_tokens`; None to encode them here.
        longest_judged: tokens of an eval example at most, so that all trials are judged on the same ones; 0
            for max_length.
        seen: receives the history after each update and evaluation, and may raise Pruned.
    """

    chosen: Mapping[str, Any] = field(default_factory=dict)
    suffix: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    tokens: Path | None = None
    longest_judged: int = 0
    seen: Callable[[Sequence[Mapping[str, float]]], None] = lambda history: None

    def encoder(self, objective: Objective, side: str) -> Callable[[Mapping[str, Any]], Any]:
        """What encodes the examples of a side, called once for each in their order."""
        if self.tokens is None:
            return objective.encode
        path = self.tokens / f"{side}.json"
        found: list[Any] = []

        def following(row: Mapping[str, Any]) -> Any:
            if not found:
                # The first tells their type, which the file does not name.
                found.extend(reversed(_listed(objective.encode(row)).validate_json(path.read_bytes())))
            return found.pop()

        return following

    def lengths(self, config: TrainConfig, side: str) -> TrainConfig:
        """The settings under which the examples of a side are held to a length."""
        if side != "eval" or not self.longest_judged:
            return config
        return config.model_copy(update={"max_length": self.longest_judged})


ALONE_STANDING = Guide()


def write_tokens(objective: Objective, rows: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> None:
    """Encode the examples of each side into `<side>.json`; a file of that name is a whole one.

    Args:
        objective: encodes.
        rows: side -> examples.
        folder: to be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for side, examples in rows.items():
        encoded = [objective.encode(row) for row in examples]
        aside = folder / f".{side}.json"
        aside.write_bytes(_listed(encoded[0]).dump_json(encoded) if encoded else b"[]")
        os.replace(aside, folder / f"{side}.json")


def _listed(example: Any) -> Any:
    """Reads and writes lists of what this encoded example is: a dataclass of numbers, lists and tuples."""
    from pydantic import TypeAdapter

    kind: Any = type(example)
    return TypeAdapter(list[kind])
