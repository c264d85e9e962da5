"""Supervised fine-tuning of causal language models: instructions, conversations, tools, chains of thought."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared import causal, chat
from components.shared.causal import Encoded
from components.shared.loss import summed_cross_entropy
from components.shared.tasks import Task
from components.train.objectives.base import Objective, base_settings
from components.train.objectives.config import SftObjective


class Sft(Objective):
    """Supervised fine-tuning: next-token loss on what the assistant says alone."""

    task: Task = "causal-lm"

    def __init__(
        self,
        folder: Path,
        precision: causal.Precision,
        dropout: float | None = None,
        config: SftObjective | None = None,
    ) -> None:
        self._config = config or SftObjective(kind="sft")
        settings = base_settings(folder, dropout)
        self.model, self.tokenizer = causal.open_folder(folder, precision, settings)

    def encode(self, example: Mapping[str, Any]) -> Encoded:
        """See Objective."""
        config = self._config
        return causal.encode(self.tokenizer, example, config.loss_on, config.loss_on_reasoning)

    def encode_all(self, examples: Sequence[Mapping[str, Any]]) -> Iterable[Encoded]:
        """See Objective."""
        if type(self).encode is not Sft.encode:  # one that is built on this one and encodes otherwise
            return super().encode_all(examples)
        config = self._config
        return causal.encode_all(self.tokenizer, examples, config.loss_on, config.loss_on_reasoning)

    def shorten(self, encoded: Encoded, max_length: int) -> Encoded | None:
        """Cut the prompt from its left, but for the first token; the answer stays whole."""
        return causal.shorten(encoded, max_length, self.tokenizer.bos_token_id)

    def terms(self, encoded: Encoded) -> int:
        """Tokens of answers."""
        return encoded.terms

    def summed_loss(self, batch: Sequence[Encoded], label_smoothing: float) -> Any:
        """See Objective."""
        _, head, cap = causal.body_and_head(self.model)
        states, targets = causal.answer_states(self.model, batch, self.tokenizer.pad_token_id)
        return summed_cross_entropy(states, head, cap, targets, label_smoothing)

    def plain_loss(self, batch: Sequence[Encoded], label_smoothing: float) -> Any:
        """As transformers computes it: padded, masked, all logits, PyTorch's cross-entropy."""
        import torch

        tensors = causal.pad(batch, self.tokenizer.pad_token_id)
        labels = tensors.pop("labels")
        logits = self.model(**tensors, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=causal.IGNORED,
            reduction="sum",
            label_smoothing=label_smoothing,
        )

    def outputs(self, batch: Sequence[Encoded]) -> tuple[Any, Callable[[Any], Any]]:
        """See Objective."""
        import torch

        _, head, cap = causal.body_and_head(self.model)
        states, _ = causal.answer_states(self.model, batch, self.tokenizer.pad_token_id)
        # Detached, it stays what it is now when the weights of another model are put in its place.
        weight = head.weight if torch.is_grad_enabled() else head.weight.detach()

        def project(some: Any) -> Any:
            logits = torch.nn.functional.linear(some.to(weight.dtype), weight).float()
            return torch.tanh(logits / cap) * cap if cap else logits

        return states, project

    def template_faults(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """See Objective."""
        found = ((chat.messages(self.tokenizer, row), row.get("tools")) for row in rows)
        return [fault for said, tools in found if (fault := chat.fault(self.tokenizer, said, tools))]

    def template_probe(self) -> dict[str, Any] | None:
        """See Objective."""
        return chat.probe(self.tokenizer)
