"""Distillation of a causal language model from its teacher's predictions (Hinton et al. 2015)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.shared import causal
from components.shared.causal import Encoded
from components.shared.errors import TuneyardError
from components.shared.loss import summed_cross_entropy
from components.shared.progress import Progress
from components.train.objectives import divergences, teachers
from components.train.objectives.base import Arithmetic
from components.train.objectives.distillation_config import DistillationObjective
from components.train.objectives.divergences import Head
from components.train.objectives.noting import Noting
from components.train.objectives.sft import Sft
from components.train.objectives.teachers import Teacher

log = logging.getLogger("tuneyard.train")

# Padded tokens in one forward pass of the teacher over answers that are given.
_TEACHER_TOKENS = 4096


@dataclass
class Lesson:
    """What the teacher made of an example.

    Args:
        given: whether the teacher reads it; it does not read what must only be retained.
        states: its last hidden states [terms, its width] where the tokens with loss are predicted; None where
            it reads along in every step.
    """

    given: bool = False
    states: Any = None


@dataclass(frozen=True)
class Lectured(Encoded):
    """An example with its lesson."""

    lesson: Lesson = field(default_factory=Lesson, compare=False)


class Distillation(Noting, Sft):
    """The student predicts as its teacher does, and the data's own answer.

    The teacher's body reads an example once: what it says does not change. Its last hidden states are kept,
    some hundred times smaller than its logits and as good: a chunk of logits is one product away. So nothing
    of its prediction is cut off.
    """

    measures = ("hard_loss", "divergence")
    # Softmaxes of two models, each with the rounding of its own product.
    rounding = 2.0

    def __init__(
        self,
        folder: Path,
        precision: causal.Precision,
        settings: DistillationObjective,
        teacher: Teacher,
        dropout: float | None = None,
    ) -> None:
        """Open the student.

        Args:
            folder: of the base model.
            precision: its weights are held in.
            settings: see DistillationObjective.
            teacher: with the student's vocabulary.
            dropout: see base_settings.

        Raises:
            TuneyardError: their vocabularies differ.
        """
        Noting.__init__(self)
        Sft.__init__(self, folder, precision, dropout)
        self.settings = settings
        self._teacher: Any = teacher.model
        self._window = teacher.window_tokens
        self._their_head = _head(teacher.model)
        rows = [len(model.get_output_embeddings().weight) for model in (teacher.model, self.model)]
        self._vocabulary = teachers.shared_vocabulary(teacher.tokenizer, self.tokenizer, rows)
        teachers.warn_of_template(teacher.tokenizer, self.tokenizer)

    def encode(self, example: Mapping[str, Any]) -> Lectured:
        """See Objective."""
        found = super().encode(example)
        return Lectured(found.prompt, found.answer, found.spans)

    def shorten(self, encoded: Encoded, max_length: int) -> Lectured | None:
        """See Sft."""
        found = super().shorten(encoded, max_length)
        return Lectured(found.prompt, found.answer, found.spans) if found else None

    def prepare(self, encoded: Sequence[Lectured], arithmetic: Arithmetic) -> None:
        """Let the teacher read the examples.

        Raises:
            TuneyardError: one is longer than it can read.
        """
        import torch

        longest, window = max(map(len, encoded)), self._window
        if window is not None and longest > window:
            raise TuneyardError(
                f"an example has {longest} tokens, the teacher reads {window}",
                f"set train.max_length to {window}",
            )
        for each in encoded:
            each.lesson.given = True
        if not self.settings.keep_states:
            return
        progress = Progress("teacher", len(encoded), "examples")
        with torch.no_grad(), arithmetic():
            for indices in causal.by_length([len(each) for each in encoded], _TEACHER_TOKENS):
                batch = [encoded[i] for i in indices]
                read = self._read(batch)
                for each, states in zip(batch, read.split([e.terms for e in batch]), strict=True):
                    each.lesson.states = states.cpu().clone()
                progress.advance(len(batch))
        self._teacher = None  # but for its head
        kept = sum(each.lesson.states.nbytes for each in encoded)
        log.info("train: the teacher's states take %.0f MB of memory", kept / 1e6)

    def _read(self, batch: Sequence[Lectured]) -> Any:
        """The teacher's states [terms, its width]."""
        import torch

        with torch.no_grad():
            return causal.answer_states(self._teacher, batch, self.tokenizer.pad_token_id)[0]

    def _lessons(self, batch: Sequence[Lectured]) -> Any:
        import torch

        if self.settings.keep_states:
            return torch.cat([each.lesson.states for each in batch]).to(causal.device())
        return self._read(batch)

    def summed_loss(self, batch: Sequence[Any], label_smoothing: float) -> Any:
        """See Objective; an example without a lesson has the hard loss alone."""
        import torch

        states, targets = causal.answer_states(self.model, batch, self.tokenizer.pad_token_id)
        head = _head(self.model)
        of = torch.tensor(
            [each.lesson.given for each in batch for _ in range(each.terms)], device=states.device
        )
        taught = [each for each in batch if each.lesson.given]
        loss = states.new_zeros((), dtype=torch.float32)
        if len(taught) < len(batch):
            loss = loss + summed_cross_entropy(states[~of], head.linear, head.cap, targets[~of])
            states, targets = states[of], targets[of]
        if not taught:
            return loss
        settings = self.settings
        measure = settings.hard_weight, settings.temperature, settings.divergence
        found, hard, soft = divergences.summed(
            states, head, targets, self._lessons(taught), self._their_head, self._vocabulary, measure
        )
        self.note(hard_loss=float(hard), divergence=float(soft))
        return loss + found

    def plain_loss(self, batch: Sequence[Any], label_smoothing: float) -> Any:
        """By the book: whole logits of transformers, PyTorch's cross-entropy, softmaxes under autograd."""
        import torch

        settings = self.settings
        tensors = causal.pad(batch, self.tokenizer.pad_token_id)
        labels = tensors.pop("labels")[:, 1:]
        at = labels != causal.IGNORED
        logits = self.model(**tensors, use_cache=False).logits[:, :-1][at].float()
        theirs = self._their_head.logits(self._lessons(batch))
        hard = torch.nn.functional.cross_entropy(logits, labels[at], reduction="sum")
        shared = slice(self._vocabulary)
        soft = divergences.nats(
            theirs[:, shared], logits[:, shared], settings.temperature, settings.divergence
        ).sum()
        return settings.hard_weight * hard + (1 - settings.hard_weight) * soft


def _head(model: Any) -> Head:
    _, linear, cap = causal.body_and_head(model)
    return Head(linear, cap)
