"""Settings of the objectives that learn from a teacher."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from components.shared.settings import Settings

Divergence = Literal["forward", "reverse", "jensen-shannon"]


class Student(Settings):
    """A student that begins as some layers of a larger model, with its embeddings and its head.

    Sanh et al. 2019 (DistilBERT, arXiv:1910.01108, section 2) keep one layer of two.

    Args:
        layers: of train.base_model that are kept, from 0, ascending. An absent base_model is the teacher.
    """

    layers: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: list[int]) -> list[int]:
        if any(one >= other for one, other in pairwise(layers)):
            raise ValueError(f"layers {layers}: name each layer once, in ascending order")
        return layers


class Taught(Settings):
    """What every student has.

    Args:
        teacher: a whole model: a registered one (models:/name@champion), an s3:// prefix, a local folder or a
            Hugging Face id (at its main revision).
        temperature: teacher's and student's logits are divided by it before they are compared; the divergence
            is multiplied by its square, so that its gradient keeps its size (Hinton et al. 2015,
            arXiv:1503.02531, section 2).
        hard_weight: weight (0-1) of the loss on the data's own labels; the rest is that of the divergence.
        student: see Student; null: base_model as it is.
    """

    teacher: str
    temperature: float = Field(2.0, gt=0, allow_inf_nan=False)
    hard_weight: float = Field(0.5, ge=0, lt=1)
    student: Student | None = None

    def external_uris(self) -> list[str]:
        """The teacher."""
        return [self.teacher]


class DistillationObjective(Taught):
    """A causal language model, train.base_model, learns from another how to answer.

    Args:
        level: `logits`: what the teacher holds likely at each token of the data's answers, which takes one
            vocabulary for both; `sequence`: the teacher writes the answers itself (Kim and Rush 2016,
            arXiv:1606.07947, section 3.2), and the student learns them as with sft.
        divergence: of the two predictions: `forward`, KL(teacher || student); `reverse`, KL(student ||
            teacher), which rather leaves out than spreads (Gu et al. 2023, arXiv:2306.08543); or
            `jensen-shannon`.
        keep_states: the teacher reads each example once before the first step, and its last hidden states are
            kept in memory (answer tokens x width x 2 or 4 bytes); false: it reads along in every step.
        max_new_tokens: longest answer that the teacher writes. One that this cuts is not used.
        max_unanswered: largest fraction (0-1) of examples that the teacher may leave without an answer.
    """

    kind: Literal["distillation"]
    level: Literal["logits", "sequence"] = "logits"
    divergence: Divergence = "forward"
    keep_states: bool = True
    max_new_tokens: int = Field(512, ge=1)
    max_unanswered: float = Field(0.2, ge=0, le=1)

    @model_validator(mode="after")
    def _alive(self) -> DistillationObjective:
        ours = {
            "logits": ("temperature", "hard_weight", "divergence", "keep_states"),
            "sequence": ("max_new_tokens", "max_unanswered"),
        }
        other = "sequence" if self.level == "logits" else "logits"
        fields = type(self).model_fields
        dead = [name for name in ours[other] if getattr(self, name) != fields[name].default]
        if dead:
            raise ValueError(f"{', '.join(dead)} belong to level {other} (it is {self.level}): drop them")
        return self


class ClassificationDistillationObjective(Taught):
    """A smaller classifier learns from a larger one: its probabilities, beside the data's labels.

    The labels of the two are matched by name.
    """

    kind: Literal["classification-distillation"]
