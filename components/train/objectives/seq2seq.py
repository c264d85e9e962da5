"""Supervised fine-tuning of an encoder-decoder language model (T5 and its kin)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared import causal, seq2seq
from components.shared.encoded import Encoded
from components.shared.tasks import Task
from components.train.objectives.base import Objective, base_settings


class Seq2Seq(Objective):
    """Next-token loss on the completion that a decoder writes of what an encoder read (arXiv:1910.10683)."""

    task: Task = "seq2seq"

    def __init__(self, folder: Path, dropout: float | None = None) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = seq2seq.open_model(folder, "float32", base_settings(folder, dropout))

    def encode(self, example: Mapping[str, Any]) -> Encoded:
        """See Objective; its length is that of both sides together."""
        return seq2seq.encode(self.tokenizer, example)

    def longest_tokens(self, encoded: Sequence[Encoded]) -> int:
        """See Objective; each side has positions of its own."""
        return max(max(len(each.prompt), len(each.answer)) for each in encoded)

    def shorten(self, encoded: Encoded, max_length: int) -> Encoded | None:
        """Cut the prompt from its left, but for the first token where that begins every sequence."""
        return causal.shorten(encoded, max_length, self.tokenizer.bos_token_id)

    def terms(self, encoded: Encoded) -> int:
        """Answer tokens."""
        return len(encoded.answer)

    def summed_loss(self, batch: Sequence[Encoded], label_smoothing: float) -> Any:
        """See Objective."""
        import torch

        logits, targets = seq2seq.answer_logits(self.model, batch, self.model.config.pad_token_id)
        return torch.nn.functional.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=label_smoothing
        )

    def plain_loss(self, batch: Sequence[Encoded], label_smoothing: float) -> Any:
        """As transformers computes it from labels, a mean; it smooths none."""
        inputs, labels = seq2seq.tensors(batch, self.model.config.pad_token_id)
        return self.model(**inputs, labels=labels).loss * sum(map(self.terms, batch))
