"""What every objective has: the protocol that the loop uses, and how a base model is opened for training."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from components.shared import causal, clock, packed, window
from components.shared.tasks import Task
from components.train import shards
from components.train.ranks import Ranks

# Makes the context of a forward pass: the precision to compute in.
Arithmetic = Callable[[], AbstractContextManager[Any]]


class Objective(ABC):
    """An objective over one model: turns examples into encoded ones and micro-batches into a summed loss.

    Attributes:
        model: what is trained.
        tokenizer: its tokenizer, with the template.
        task: of the model that comes out.
        labels: class names in logit order; empty where there are none.
        own_weights: names of weights that the objective itself adds to the model; they move with any adapter.
        rounding: how many times further than a sum of token losses the loss moves by rounding.
        retained: retention.Retained, where there is such a set.
        penalties: what is minimised beside the loss, once an update: (micro-batches of this process, terms of
            the update, arithmetic, ranks) -> figures for the history, after adding its gradient.
        spare: a train example that is computed, its loss counting for nothing, where another process still
            has examples and all compute in step; see Ranks.most.
        before_pass: called before each pass of an update with whether it is the last.
        plain_loss: the same as `summed_loss` by the book, slow and obvious; None where that is the same.
    """

    model: Any
    tokenizer: Any
    task: Task
    labels: Sequence[str] = ()
    own_weights: tuple[str, ...] = ()
    rounding: float = 1.0
    plain_loss: Callable[[Sequence[Any], float], Any] | None = None
    retained: Any = None
    spare: Any = None
    before_pass: Callable[[bool], None] | None = None
    penalties: Sequence[Callable[..., dict[str, float]]] = ()

    @property
    def packs(self) -> bool:
        """Whether the examples of a micro-batch are laid end to end, so that their lengths may differ."""
        return packed.used(self.model)

    @property
    def window_tokens(self) -> int | None:
        """Tokens of an example for which the model has positions; None where it names no limit."""
        return window.of_model(self.model)

    def usable(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of eval that this objective can judge; what is left out is named in the log."""
        return list(rows)

    @abstractmethod
    def encode(self, example: Mapping[str, Any]) -> Any:
        """Token ids (and target) of an example; its len() is its tokens."""

    def encode_all(self, examples: Sequence[Mapping[str, Any]]) -> Iterable[Any]:
        """The same for many, in order; an objective may be quicker at it than one by one."""
        return (self.encode(example) for example in examples)

    def longest_tokens(self, encoded: Sequence[Any]) -> int:
        """Tokens of the longest sequence that the model is given of these examples."""
        return max(shards.lengths(encoded))

    @abstractmethod
    def shorten(self, encoded: Any, max_length: int) -> Any | None:
        """A version that fits, cut where no answer is; None where that cannot be."""

    def pieces(self, encoded: Any, max_length: int) -> list[Any]:
        """Pieces that fit and hold all of it, for the policy `split`; only where Trait.splits says so."""
        raise NotImplementedError(f"{type(self).__name__} has no pieces: set Trait.splits with this method")

    @abstractmethod
    def terms(self, encoded: Any) -> int:
        """How many loss terms an example has: the loss of an update is their mean."""

    @abstractmethod
    def summed_loss(self, batch: Sequence[Any], label_smoothing: float) -> Any:
        """Loss in nats, summed over the terms of a micro-batch; differentiable where gradients are on."""

    def outputs(self, batch: Sequence[Any]) -> tuple[Any, Callable[[Any], Any]]:
        """States [terms, width] of a micro-batch, and what makes logits of them with the weights of now."""
        raise NotImplementedError(
            f"{type(self).__name__} predicts no tokens for retain.distil_from_base: give it this method"
        )

    def gradient(
        self,
        micros: Sequence[Sequence[Any]],
        terms: int,
        label_smoothing: float,
        arithmetic: Arithmetic,
        ranks: Ranks,
    ) -> float:
        """Add the gradient of an update to the weights. Returns this process's share of the mean loss.

        Args:
            micros: the micro-batches that this process computes.
            terms: of the whole update, over all its processes.
            label_smoothing: 0-1.
            arithmetic: context of each forward pass.
            ranks: the processes; their gradients are summed afterwards.
        """
        loss, passes = 0.0, ranks.most(len(micros))
        for number in range(passes):
            if self.before_pass:
                self.before_pass(number + 1 == passes)
            if number >= len(micros):
                self.idle(arithmetic)
                continue
            with clock.arithmetic():
                with arithmetic():
                    part = self.summed_loss(micros[number], label_smoothing) / terms
                part.backward()
                loss += float(part.detach())
        return loss

    def idle(self, arithmetic: Arithmetic | None = None) -> None:
        """Compute the spare example for nothing, so that the others can compute theirs.

        Args:
            arithmetic: context of a forward pass that a backward pass follows; None: of a forward pass alone.
        """
        if arithmetic is None:
            self.summed_loss([self.spare], 0.0)
            return
        with arithmetic():
            nothing = self.summed_loss([self.spare], 0.0) * 0.0
        nothing.backward()

    def judged_loss(self, encoded: Sequence[Any], batches: Iterable[Sequence[int]], ranks: Ranks) -> float:
        """This process's share of the loss, summed over the terms of eval; called without gradients.

        Args:
            encoded: examples.
            batches: their indices in batches; each process takes its share.
            ranks: the processes; their shares are summed afterwards.
        """
        mine = ranks.share(list(batches))
        passes = ranks.most(len(mine))
        loss = sum(float(self.summed_loss([encoded[i] for i in batch], 0.0)) for batch in mine)
        for _ in range(passes - len(mine)):
            self.idle()
        return loss

    def account(self, rows: Sequence[Mapping[str, Any]], kept: Sequence[Any]) -> dict[str, int]:
        """What became of the parts of a side's examples, beyond their tokens; empty where they have none.

        Args:
            rows: the examples of the side.
            kept: what of them is used, encoded.
        """
        return {}

    def rewritten(
        self, rows: Mapping[str, list[dict[str, Any]]], folder: Path
    ) -> tuple[Mapping[str, list[dict[str, Any]]], Mapping[str, list[dict[str, Any]]]]:
        """Side -> its examples as they are learned, and rows of the ledger for those that are not used.

        Args:
            rows: side -> examples as the data has them.
            folder: outlives a killed attempt.
        """
        return rows, {}

    def leave(self, folder: Path) -> None:
        """Put into the ledger's folder what else must be kept of the training."""

    def tokens(self, encoded: Any) -> int:
        """How many tokens the model reads for an example."""
        return len(encoded)

    def prepare(self, encoded: Sequence[Any], arithmetic: Arithmetic) -> None:
        """Called once with all examples while the model still is the base, before the adapter is on it."""

    def prepare_retained(self, encoded: Sequence[Any], arithmetic: Arithmetic) -> None:
        """Called once with all of the retention set, while the model computes what the base does."""

    def start(self) -> None:
        """Called before the first update, with the adapter on the model."""

    def rehearsed(self, examples: Sequence[Any]) -> Sequence[Any]:
        """What `summed_loss` will see of these train examples, for the self-check: mostly themselves."""
        return examples

    def turns(
        self, batches: Sequence[Sequence[Any]], arithmetic: Arithmetic
    ) -> Iterable[Sequence[Sequence[Any]]]:
        """Micro-batches of each optimizer update that a step is made of: one, of the examples as they are."""
        return [batches]

    def notes(self) -> dict[str, float]:
        """What the last update says for the history, by name."""
        return {}

    def judged_notes(self) -> dict[str, float]:
        """What the last evaluation on eval says for the history, by name."""
        return {}

    def card_facts(self) -> dict[str, Any]:
        """Further fields of the model's card."""
        return {}

    def finish(self) -> None:
        """Take from the trained model what only training needed."""

    def template_faults(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """What the chat template does to these examples that it must not."""
        return []

    def template_probe(self) -> dict[str, Any] | None:
        """What serving must reproduce; None where there is no template."""
        return None


_DROPOUT = re.compile(r"(^|_)(dropout(_prob|_rate)?|pdrop)$")
log = logging.getLogger("tuneyard.train")

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


def choose_attention(objective: Objective, max_length: int, precision: causal.Precision = "float32") -> None:
    """Switch a model to the attention that trains fastest at this length on this device.

    Args:
        objective: with its model.
        max_length: of an example, tokens.
        precision: to be computed in; on a GPU only bfloat16 lays examples end to end.
    """
    if causal.device().type == "cuda":
        _pack_on_gpu(objective, precision)
        return
    if objective.task == "causal-lm" and packed.possible(objective.model):
        packed.use(objective.model)
    elif max_length <= _PLAIN_ATTENTION_TOKENS:
        objective.model.set_attn_implementation("eager")


def _pack_on_gpu(objective: Objective, precision: causal.Precision) -> None:
    if precision != "bfloat16" or objective.task != "causal-lm" or not packed.possible(objective.model):
        return
    fault = packed.kernel_fault(objective.model, causal.device())
    if fault:
        log.warning("train: examples are padded, not laid end to end: %s", fault)
        return
    packed.use(objective.model)


def stop_packing(model: Any, max_length: int) -> None:
    """Switch a model that packs back to padded rows: a soft prompt is read once at the start of a row."""
    if packed.possible(model) and packed.used(model):
        model.set_attn_implementation("eager" if max_length <= _PLAIN_ATTENTION_TOKENS else "sdpa")
