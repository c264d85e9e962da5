"""Distillation of a text classifier: the teacher's probabilities beside the data's labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from components.shared import causal, encoders
from components.shared.errors import TuneyardError
from components.shared.progress import Progress
from components.shared.tasks import Task
from components.train.objectives import divergences, texts
from components.train.objectives.base import Arithmetic
from components.train.objectives.classification import Classification, Labelled
from components.train.objectives.distillation_config import ClassificationDistillationObjective
from components.train.objectives.noting import Noting
from components.train.objectives.teachers import Teacher

log = logging.getLogger("tuneyard.train")

_TEACHER_TOKENS = 8192


@dataclass
class Opinion:
    """What the teacher makes of a text.

    Args:
        logits: in the order of the student's labels; empty for a text that it does not read.
    """

    logits: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Taught(Labelled):
    """A labelled text, as its teacher's tokenizer reads it, and what the teacher makes of it.

    Its opinion comes later and must be kept with it: such an example has no form on disk (see shards.py).

    Args:
        theirs: token ids of the teacher.
        opinion: of the teacher.
    """

    theirs: list[int] = field(default_factory=list, compare=False)
    opinion: Opinion = field(default_factory=Opinion, compare=False)


class ClassificationDistillation(Noting, Classification):
    """The student gives each class its teacher's probability, and the data's label its share."""

    task: Task = "classification"
    measures = ("hard_loss", "divergence")

    def __init__(
        self,
        folder: Path,
        labels: Sequence[str],
        settings: ClassificationDistillationObjective,
        teacher: Teacher,
        dropout: float | None = None,
    ) -> None:
        """Open the student.

        Args:
            folder: of the base model.
            labels: of the train examples.
            settings: see ClassificationDistillationObjective.
            teacher: knows these labels by name.
            dropout: see base_settings.

        Raises:
            TuneyardError: it does not.
        """
        Noting.__init__(self)
        Classification.__init__(self, folder, labels, dropout)
        self.settings, self._teacher = settings, teacher
        names = teacher.model.config.id2label
        self._columns = encoders.columns_of(names, labels)
        further = sorted({str(name) for name in names.values()} - set(labels))
        if further:
            log.warning("train: labels %s of the teacher do not occur in train and are not learned", further)

    def encode(self, example: Mapping[str, Any]) -> Taught:
        """See Objective."""
        found, reads = super().encode(example), self._teacher
        theirs = texts.token_ids(reads.tokenizer, example["text"])
        if reads.window_tokens is not None:
            theirs = texts.cut(reads.tokenizer, theirs, reads.window_tokens)
        return Taught(found.ids, found.label, theirs)

    def shorten(self, encoded: Labelled, max_length: int) -> Taught | None:
        """Cut the end of the text, for the student; the teacher reads what it can."""
        found = super().shorten(encoded, max_length)
        assert isinstance(encoded, Taught)
        return Taught(found.ids, found.label, encoded.theirs) if found else None

    def prepare(self, encoded: Sequence[Taught], arithmetic: Arithmetic) -> None:
        """Let the teacher read the texts, once: what it says does not change."""
        import torch

        progress, reads = Progress("teacher", len(encoded), "texts"), self._teacher
        with torch.no_grad(), arithmetic():
            for indices in causal.by_length([len(each.theirs) for each in encoded], _TEACHER_TOKENS):
                theirs = [encoded[i].theirs for i in indices]
                batch = encoders.padded(reads.model, reads.tokenizer, theirs)
                logits = reads.model(**batch).logits.float()[:, self._columns].tolist()
                for index, row in zip(indices, logits, strict=True):
                    encoded[index].opinion.logits = row
                progress.advance(len(indices))
        self._teacher = replace(reads, model=None)  # it has said all that it is asked for
        if not all(each.opinion.logits for each in encoded):
            raise TuneyardError(
                "what the teacher said of a text is not with it: train would go by the labels alone",
                "report this: examples are read anew where they must be kept (shards.py)",
            )

    def summed_loss(self, batch: Sequence[Any], label_smoothing: float) -> Any:
        """See Objective; a text that the teacher did not read has the hard loss alone."""
        import torch

        settings = self.settings
        inputs = encoders.padded(self.model, self.tokenizer, [e.ids for e in batch])
        logits = self.model(**inputs).logits.float()
        labels = torch.tensor([e.label for e in batch], device=logits.device)
        hard = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        of = [at for at, each in enumerate(batch) if each.opinion.logits]
        if not of:
            return hard.sum()
        theirs = logits.new_tensor([batch[at].opinion.logits for at in of])
        soft = divergences.nats(theirs, logits[of], settings.temperature, "forward").sum()
        self.note(hard_loss=float(hard.detach().sum()), divergence=float(soft.detach()))
        weights = logits.new_ones(len(batch))
        weights[of] = settings.hard_weight
        return (weights * hard).sum() + (1 - settings.hard_weight) * soft
