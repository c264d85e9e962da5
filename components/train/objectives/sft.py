"""Supervised fine-tuning of a causal language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared import causal, chat
from components.shared.causal import Encoded
from components.shared.loss import summed_cross_entropy
from components.shared.tasks import Task
from components.train.objectives.base import Objective, base_settings


class Sft(Objective):
    """Supervised fine-tuning: next-token loss on the assistant's answer alone."""

    task: Task = "causal-lm"

    def __init__(self, folder: Path, precision: causal.Precision, dropout: float | None = None) -> None:
        settings = base_settings(folder, dropout)
        self.model, self.tokenizer = causal.open_folder(folder, precision, settings)

    def encode(self, example: Mapping[str, Any]) -> Encoded:
        """See Objective."""
        return causal.encode(self.tokenizer, example)

    def shorten(self, encoded: Encoded, max_length: int) -> Encoded | None:
        """Cut the prompt from its left, but for the first token; the answer stays whole."""
        room = max_length - len(encoded.answer)
        if room < 1:
            return None
        return Encoded(causal.cut_prompt(encoded.prompt, room, self.tokenizer.bos_token_id), encoded.answer)

    def terms(self, encoded: Encoded) -> int:
        """Answer tokens."""
        return len(encoded.answer)

    def summed_loss(self, batch: Sequence[Encoded], label_smoothing: float) -> Any:
        """See Objective."""
        _, head, cap = causal.body_and_head(self.model)
        states, targets = causal.answer_states(self.model, batch, self.tokenizer.pad_token_id)
        return summed_cross_entropy(states, head, cap, targets, label_smoothing)

    def template_probe(self) -> dict[str, Any] | None:
        """See Objective."""
        return chat.probe(self.tokenizer)
