"""A reward model: which of two answers would be preferred (Ouyang et al. 2022, arXiv:2203.02155)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared import chat, rewards
from components.shared.tasks import Task
from components.train.objectives import pairs
from components.train.objectives.base import base_settings
from components.train.objectives.config import RewardObjective
from components.train.objectives.noting import Noting
from components.train.objectives.pairs import Pair


class Reward(Noting):
    """A number for each answer, fitted so that differences are the log-odds of being preferred.

    Section 3.5, equation 1, which is Bradley and Terry's model (1952).
    """

    task: Task = "reward"
    measures = pairs.MEASURES
    rounding = pairs.ROUNDING

    def __init__(self, folder: Path, settings: RewardObjective, dropout: float | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.model, self.tokenizer = rewards.open_model(folder, base_settings(folder, dropout))

    def usable(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """See Objective."""
        return pairs.usable(rows, self.settings)

    def encode(self, example: Mapping[str, Any]) -> Pair:
        """See Objective."""
        return pairs.encode(self.tokenizer, example, self.settings)

    def shorten(self, encoded: Pair, max_length: int) -> Pair | None:
        """See pairs.shorten."""
        return pairs.shorten(encoded, max_length, self.tokenizer.bos_token_id)

    def tokens(self, encoded: Pair) -> int:
        """See pairs.tokens."""
        return pairs.tokens(encoded)

    def terms(self, encoded: Pair) -> int:
        """One pair."""
        return 1

    def summed_loss(self, batch: Sequence[Pair], label_smoothing: float) -> Any:
        """See Objective; label smoothing is the rate at which labels are taken to be wrong."""
        import torch

        sequences = [sequence for pair in batch for sequence in pair.sequences]
        found = rewards.of_sequences(self.model, sequences, self.tokenizer.pad_token_id)
        chosen, rejected = found[::2], found[1::2]
        self.note(**pairs.sums(chosen.detach(), rejected.detach()))
        margins = torch.tensor([pair.margin for pair in batch], device=found.device)
        losses = pairs.noisy_label_losses(chosen - rejected - margins, label_smoothing)
        return (losses + self.settings.centre_weight * (chosen + rejected) ** 2).sum()

    def template_probe(self) -> dict[str, Any] | None:
        """See Objective."""
        return chat.probe(self.tokenizer)
