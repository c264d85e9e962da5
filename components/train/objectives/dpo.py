"""Direct preference optimisation of a causal language model (Rafailov et al. 2023, arXiv:2305.18290)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared import causal, chat
from components.shared.loss import token_cross_entropy
from components.shared.progress import Progress
from components.shared.tasks import Task
from components.train.objectives import pairs
from components.train.objectives.base import Arithmetic, base_settings
from components.train.objectives.config import DpoObjective
from components.train.objectives.noting import Noting
from components.train.objectives.pairs import Pair

log = logging.getLogger("tuneyard.train")

# Padded tokens in one forward pass of the base over answers that are given.
_REFERENCE_TOKENS = 4096


class Dpo(Noting):
    """Raise the likelihood of chosen answers over rejected ones, measured against the base.

    The reward of an answer is beta log(p / p_base) (section 4, equation 5), p_base being the base's own
    likelihood: it is computed once, before an adapter is on the model and before any weight moves, so that a
    step costs a forward pass of the trained model alone.
    """

    task: Task = "causal-lm"
    measures = pairs.MEASURES
    rounding = pairs.ROUNDING

    def __init__(
        self,
        folder: Path,
        precision: causal.Precision,
        settings: DpoObjective,
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.model, self.tokenizer = causal.open_folder(folder, precision, base_settings(folder, dropout))

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

    def prepare(self, encoded: Sequence[Pair], arithmetic: Arithmetic) -> None:
        """Ask the base how likely each answer is."""
        import torch

        progress = Progress("reference", len(encoded), "pairs")
        self.model.eval()
        with torch.no_grad(), arithmetic():
            for indices in causal.by_length([len(pair) for pair in encoded], _REFERENCE_TOKENS // 2):
                batch = [encoded[i] for i in indices]
                found = self.log_likelihoods(batch).tolist()
                for pair, chosen, rejected in zip(batch, found[::2], found[1::2], strict=True):
                    pair.reference = chosen, rejected
                progress.advance(len(batch))

    def prepare_retained(self, encoded: Sequence[Pair], arithmetic: Arithmetic) -> None:
        """See Objective: the reward of these answers, too, is measured against the base."""
        self.prepare(encoded, arithmetic)

    def log_likelihoods(self, batch: Sequence[Pair]) -> Any:
        """Of both answers of each pair under the model as it is: [2 x pairs] nats, the chosen one first."""
        import torch

        sequences = [sequence for pair in batch for sequence in pair.sequences]
        _, head, cap = causal.body_and_head(self.model)
        states, targets = causal.answer_states(self.model, sequences, self.tokenizer.pad_token_id)
        nats = token_cross_entropy(states, head, cap, targets)
        return -torch.stack([part.sum() for part in nats.split([len(s.answer) for s in sequences])])

    def summed_loss(self, batch: Sequence[Pair], label_smoothing: float) -> Any:
        """See Objective; label smoothing is the rate at which labels are taken to be wrong."""
        import torch

        references = [nats for pair in batch for nats in pair.reference or ()]
        ratios = self.log_likelihoods(batch)
        ratios = ratios - torch.tensor(references, device=ratios.device)
        if self.settings.loss == "ipo":
            lengths = [len(sequence.answer) for pair in batch for sequence in pair.sequences]
            ratios = ratios / torch.tensor(lengths, device=ratios.device)
        rewards = self.settings.beta * ratios
        chosen, rejected = rewards[::2], rewards[1::2]
        self.note(**pairs.sums(chosen.detach(), rejected.detach()))
        if self.settings.loss == "ipo":
            return ((ratios[::2] - ratios[1::2] - 1 / (2 * self.settings.beta)) ** 2).sum()
        margins = torch.tensor([pair.margin for pair in batch], device=rewards.device)
        return pairs.noisy_label_losses(chosen - rejected - margins, label_smoothing).sum()

    def template_probe(self) -> dict[str, Any] | None:
        """See Objective."""
        return chat.probe(self.tokenizer)
