"""What turns the outputs of an encoder's head back into what the data says: scales, and several heads in one.

Several heads on one encoder are one linear layer: a head is a slice of its outputs, in the order of the card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict


class Scale(BaseModel):
    """Mean and standard deviation of train's scores; a regression head gives (score - mean) / deviation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mean: float
    deviation: float

    def standardised(self, score: float) -> float:
        """A score as the head learns it."""
        return (score - self.mean) / self.deviation

    def restored(self, outputs: Any) -> Any:
        """Outputs of the head in the units of the data."""
        return outputs * self.deviation + self.mean


class Head(BaseModel):
    """One head of several: of a classification by its `labels`, of a regression by its `scale`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    task: str
    labels: list[str] = []
    scale: Scale | None = None

    @property
    def width(self) -> int:
        """Outputs of the head."""
        return len(self.labels) or 1


def slices(heads: Sequence[Head]) -> Iterator[tuple[Head, slice]]:
    """Each head and the outputs that are its own."""
    start = 0
    for head in heads:
        yield head, slice(start, start + head.width)
        start += head.width


def asked(task: str, text: str, named: bool) -> str:
    """What the encoder reads of an example of a task: its text, after the task's name where it is told."""
    return f"{task}: {text}" if named else text
