"""Continued pre-training of an encoder on documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared import masked
from components.shared.masked import Piece
from components.shared.tasks import Task
from components.train.objectives.base import Objective, base_settings
from components.train.objectives.config import MaskedLanguageModelingObjective


class MaskedLanguageModeling(Objective):
    """Cross-entropy of the hidden tokens of documents.

    In training they are chosen anew each time a piece comes up (arXiv:1907.11692, section 4.1), from the
    random state that checkpoints keep; out of training they are the same ones always.
    """

    task: Task = "masked-lm"

    def __init__(
        self, folder: Path, config: MaskedLanguageModelingObjective, dropout: float | None = None
    ) -> None:
        from transformers import AutoTokenizer

        self._fraction = config.fraction
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = masked.open_model(folder, base_settings(folder, dropout))

    def encode(self, example: Mapping[str, Any]) -> Piece:
        """See Objective."""
        return masked.encode(self.tokenizer, example["text"], self._fraction)

    def encode_all(self, examples: Sequence[Mapping[str, Any]]) -> Iterable[Piece]:
        """See Objective."""
        return masked.encode_all(self.tokenizer, (example["text"] for example in examples), self._fraction)

    def shorten(self, encoded: Piece, max_length: int) -> Piece | None:
        """Nothing: there is no prompt that could be cut."""
        return None

    def pieces(self, encoded: Piece, max_length: int) -> list[Piece]:
        """See Objective."""
        return masked.pieces(encoded, max_length)

    def terms(self, encoded: Piece) -> int:
        """Hidden tokens."""
        return encoded.terms

    def summed_loss(self, batch: Sequence[Piece], label_smoothing: float) -> Any:
        """See Objective."""
        import torch

        generator = torch.default_generator if self.model.training else None
        logits, targets = masked.logits(self.model, self.tokenizer, batch, generator)
        return torch.nn.functional.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=label_smoothing
        )
