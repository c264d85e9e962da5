"""What each training objective takes and gives: dataset types in, the task of the model out.

The one table of it. The pipeline file is checked against it and train builds by it; what comes later goes by
the task that the model's card names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from components.shared.examples import DatasetType

Task = Literal[
    "causal-lm",
    "masked-lm",
    "seq2seq",
    "classification",
    "regression",
    "token-classification",
    "embedding",
    "multi-task",
    "reward",
    "image-classification",
    "speech-recognition",
]
ObjectiveKind = Literal[
    "sft",
    "language-modeling",
    "masked-language-modeling",
    "seq2seq",
    "classification",
    "regression",
    "token-classification",
    "contrastive",
    "multi-task",
    "dpo",
    "reward",
    "ppo",
    "grpo",
    "rloo",
    "distillation",
    "classification-distillation",
    "image-classification",
    "speech-recognition",
]
# Their model answers prompts while it learns.
ANSWERING = ("ppo", "grpo", "rloo")
# What compress can make smaller, and what the model server answers with.
COMPRESSED: tuple[Task, ...] = ("causal-lm", "classification")
SERVED: tuple[Task, ...] = ("causal-lm", "classification")


@dataclass(frozen=True)
class Trait:
    """An objective as the rest of a pipeline sees it.

    Args:
        task: of the model that comes out.
        formats: dataset types it learns from; the first is meant where a pipeline file names none.
        adapter: which weights move where a pipeline file says nothing.
        splits: whether train.over_length may be `split`, which it then is where a pipeline file says nothing.
        stratify_by: field whose shares all sides keep where a pipeline file says nothing; None for none.
        group_by: field whose equal values stay on one side where a pipeline file says nothing; None for none.
        after: objectives that it may follow in `train.first`, over the same weights; the first is meant where
            a pipeline file names none.
        smooths: whether train.label_smoothing means anything to it.
    """

    task: Task
    formats: tuple[DatasetType, ...]
    adapter: Literal["lora", "full"] = "full"
    stratify_by: str | None = None
    splits: bool = False
    group_by: str | None = None
    smooths: bool = True
    after: tuple[ObjectiveKind, ...] = ()


# What an encoder, and what a causal model, learns domain text by; a decoder may also carry an encoder's task.
_OF_ENCODERS: tuple[ObjectiveKind, ...] = ("masked-language-modeling", "language-modeling")
_OF_CAUSAL: tuple[ObjectiveKind, ...] = ("language-modeling",)

OBJECTIVES: dict[str, Trait] = {
    "sft": Trait("causal-lm", ("prompt-completion", "conversational"), adapter="lora", after=_OF_CAUSAL),
    "language-modeling": Trait("causal-lm", ("language-modeling",), adapter="lora", splits=True),
    "masked-language-modeling": Trait("masked-lm", ("language-modeling",), splits=True),
    "seq2seq": Trait("seq2seq", ("prompt-completion",)),
    "classification": Trait("classification", ("labelled-text",), stratify_by="label", after=_OF_ENCODERS),
    "regression": Trait("regression", ("scored-text",), smooths=False, after=_OF_ENCODERS),
    "token-classification": Trait("token-classification", ("tagged-text",), after=_OF_ENCODERS),
    "contrastive": Trait("embedding", ("text-pair",), smooths=False, after=_OF_ENCODERS),
    "multi-task": Trait("multi-task", ("task-text",), stratify_by="task", after=_OF_ENCODERS),
    # By prompt: the same two answers, judged the other way round, must not stand on two sides.
    "dpo": Trait("causal-lm", ("preference",), adapter="lora", group_by="prompt"),
    "reward": Trait("reward", ("preference",), adapter="lora", group_by="prompt", after=_OF_CAUSAL),
    "ppo": Trait("causal-lm", ("prompt-only",), adapter="lora", smooths=False),
    # The data's own answers are what rules compare with.
    "grpo": Trait("causal-lm", ("prompt-only", "prompt-completion"), adapter="lora", smooths=False),
    "rloo": Trait("causal-lm", ("prompt-only", "prompt-completion"), adapter="lora", smooths=False),
    # The teacher's probabilities are what smooths their labels.
    "distillation": Trait(
        "causal-lm", ("prompt-completion", "conversational"), adapter="lora", smooths=False
    ),
    "classification-distillation": Trait(
        "classification", ("labelled-text",), stratify_by="label", smooths=False
    ),
    "image-classification": Trait("image-classification", ("labelled-image",), stratify_by="label"),
    "speech-recognition": Trait("speech-recognition", ("transcribed-audio",)),
}


def trait(objective: object) -> Trait | None:
    """The trait of `objective:` as a pipeline file spells it, by name or as {kind: name}; None if unknown."""
    kind = objective.get("kind") if isinstance(objective, dict) else objective
    return OBJECTIVES.get(kind) if isinstance(kind, str) else None
