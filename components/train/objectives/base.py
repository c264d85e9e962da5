"""What every objective has: the protocol that the loop uses, and how a base model is opened for training."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared import causal, packed
from components.shared.tasks import Task


class Objective:
    """An objective over one model: turns examples into encoded ones and micro-batches into a summed loss.

    Attributes:
        model: what is trained.
        tokenizer: its tokenizer, with the template.
        task: of the model that comes out.
        labels: class names in logit order; empty where there are none.
        separable: whether the loss of a batch is the sum over its examples, each by itself.
        retained: retention.Retained, where there is such a set.
        penalties: what is minimised beside the loss, once an update: (micro-batches of this process, terms of
            the update, arithmetic, ranks) -> figures for the history, after adding its gradient.
        plain_loss: the same as `summed_loss` by the book, slow and obvious; None where that is the same.
    """

    model: Any
    tokenizer: Any
    task: Task
    labels: Sequence[str] = ()
    separable: bool = True
    plain_loss: Callable[[Sequence[Any], float], Any] | None = None
    retained: Any = None
    penalties: Sequence[Callable[..., dict[str, float]]] = ()

    @property
    def packs(self) -> bool:
        """Whether the examples of a micro-batch are laid end to end, so that their lengths may differ."""
        return packed.used(self.model)

    def usable(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of eval that this objective can judge; what is left out is named in the log."""
        return list(rows)

    def encode(self, example: Mapping[str, Any]) -> Any:
        """Token ids (and target) of an example; its len() is its tokens."""
        raise NotImplementedError

    def shorten(self, encoded: Any, max_length: int) -> Any | None:
        """A version that fits, cut where no answer is; None where that cannot be."""
        raise NotImplementedError

    def terms(self, encoded: Any) -> int:
        """How many loss terms an example has: the loss of an update is their mean."""
        raise NotImplementedError

    def summed_loss(self, batch: Sequence[Any], label_smoothing: float) -> Any:
        """Loss in nats, summed over the terms of a micro-batch; differentiable where gradients are on."""
        raise NotImplementedError

    def outputs(self, batch: Sequence[Any]) -> tuple[Any, Callable[[Any], Any]]:
        """States [terms, width] of a micro-batch, and what makes logits of them with the weights of now."""
        raise NotImplementedError

    def template_faults(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """What the chat template does to these examples that it must not."""
        return []

    def template_probe(self) -> dict[str, Any] | None:
        """What serving must reproduce; None where there is no template."""
        return None


_DROPOUT = re.compile(r"(^|_)(dropout(_prob|_rate)?|pdrop)$")
# On a CPU the backward pass of PyTorch's fused attention is several times slower than two plain products,
# which keep a matrix [heads, tokens, tokens] for each example; beyond this many tokens that matters.
_PLAIN_ATTENTION_TOKENS = 1024


def base_settings(folder: Path, dropout: float | None) -> Any:
    """The base model's own config, with every dropout of it set to `dropout` unless that is None."""
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(folder, local_files_only=True)
    if dropout is not None:
        for part in {id(part): part for part in (settings, settings.get_text_config())}.values():
            for name, value in part.to_dict().items():
                if _DROPOUT.search(name) and isinstance(value, int | float):
                    setattr(part, name, dropout)
    return settings


def choose_attention(objective: Objective, max_length: int) -> None:
    """Switch a model to the attention that trains fastest at this length on this device."""
    if causal.device().type != "cpu":
        return
    if objective.task == "causal-lm" and packed.possible(objective.model):
        packed.use(objective.model)
    elif max_length <= _PLAIN_ATTENTION_TOKENS:
        objective.model.set_attn_implementation("eager")
