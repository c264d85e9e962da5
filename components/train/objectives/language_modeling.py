"""Continued pre-training of a causal language model on documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from components.shared import documents
from components.shared.encoded import Encoded
from components.train.objectives.sft import Sft


class LanguageModeling(Sft):
    """Next-token loss on every token of a document: supervised fine-tuning whose answer is all of it."""

    def encode(self, example: Mapping[str, Any]) -> Encoded:
        """See Objective."""
        return documents.encode(self.tokenizer, example["text"])

    def encode_all(self, examples: Sequence[Mapping[str, Any]]) -> Iterable[Encoded]:
        """See Objective."""
        return documents.encode_all(self.tokenizer, (example["text"] for example in examples))

    def shorten(self, encoded: Encoded, max_length: int) -> Encoded | None:
        """Nothing: there is no prompt that could be cut."""
        return None

    def pieces(self, encoded: Encoded, max_length: int) -> list[Encoded]:
        """See Objective."""
        return documents.pieces(encoded, max_length, self.tokenizer.bos_token_id)

    def template_faults(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Nothing: documents do not go through the template."""
        return []
