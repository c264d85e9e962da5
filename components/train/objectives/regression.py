"""A number for each text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import causal, encoders
from components.shared.errors import StageStopped
from components.shared.heads import Scale
from components.shared.tasks import Task
from components.train.objectives import texts
from components.train.objectives.base import Objective
from components.train.objectives.config import RegressionObjective


@dataclass(frozen=True)
class Scored:
    """Token ids of a text and its score, standardised."""

    ids: list[int]
    score: float

    def __len__(self) -> int:
        return len(self.ids)


class Regression(Objective):
    """One number for each text, as deviations from train's mean: see RegressionObjective."""

    task: Task = "regression"

    def __init__(
        self, folder: Path, settings: RegressionObjective, scale: Scale, dropout: float | None = None
    ) -> None:
        self._settings, self.scale = settings, scale
        self.tokenizer = texts.open_tokenizer(folder)
        self.model = texts.open_headed(folder, self.tokenizer, ["score"], dropout)

    def encode(self, example: Mapping[str, Any]) -> Scored:
        """See Objective."""
        ids = texts.token_ids(self.tokenizer, example["text"])
        return Scored(ids, self.scale.standardised(example["score"]))

    def shorten(self, encoded: Scored, max_length: int) -> Scored | None:
        """Cut the end of the text."""
        return Scored(texts.cut(self.tokenizer, encoded.ids, max_length), encoded.score)

    def terms(self, encoded: Scored) -> int:
        """One score."""
        return 1

    def summed_loss(self, batch: Sequence[Scored], label_smoothing: float) -> Any:
        """Squared or Huber error in train's variances; there are no labels to smooth."""
        import torch

        inputs = encoders.padded(self.model, self.tokenizer, [e.ids for e in batch])
        outputs = self.model(**inputs).logits.float()[:, 0]
        targets = torch.tensor([e.score for e in batch], device=causal.device())
        if self._settings.loss == "mse":
            return torch.nn.functional.mse_loss(outputs, targets, reduction="sum")
        return torch.nn.functional.huber_loss(
            outputs, targets, reduction="sum", delta=self._settings.huber_delta
        )

    def card_facts(self) -> dict[str, Any]:
        """The scale, so that predictions come out in the units of the data."""
        return {"scale": self.scale}


def scale_of(scores: Sequence[float], what: str) -> Scale:
    """Mean and deviation of scores.

    Args:
        scores: of the train examples.
        what: they are, for the message.

    Raises:
        StageStopped: they are all the same.
    """
    mean = math.fsum(scores) / len(scores)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
    if not deviation > 1e-9 * max(1.0, abs(mean)):
        raise StageStopped(
            f"all {len(scores)} {what} of train are {mean:g}: there is nothing to learn",
            "check ingest.columns",
        )
    return Scale(mean=mean, deviation=deviation)
