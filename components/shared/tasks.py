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
    "image-classification",
    "speech-recognition",
]
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
        smooths: whether train.label_smoothing means anything to it.
    """

    task: Task
    formats: tuple[DatasetType, ...]
    adapter: Literal["lora", "full"] = "full"
    stratify_by: str | None = None
    splits: bool = False
    group_by: str | None = None
    smooths: bool = True


OBJECTIVES: dict[str, Trait] = {
    "sft": Trait("causal-lm", ("prompt-completion", "conversational"), adapter="lora"),
    "language-modeling": Trait("causal-lm", ("language-modeling",), adapter="lora", splits=True),
    "masked-language-modeling": Trait("masked-lm", ("language-modeling",), splits=True),
    "seq2seq": Trait("seq2seq", ("prompt-completion",)),
    "classification": Trait("classification", ("labelled-text",), stratify_by="label"),
    "regression": Trait("regression", ("scored-text",), smooths=False),
    "token-classification": Trait("token-classification", ("tagged-text",)),
    "contrastive": Trait("embedding", ("text-pair",), smooths=False),
    "multi-task": Trait("multi-task", ("task-text",), stratify_by="task"),
    # By prompt: the same two answers, judged the other way round, must not stand on two sides.
    "dpo": Trait("causal-lm", ("preference",), adapter="lora", group_by="prompt"),
    "reward": Trait("reward", ("preference",), adapter="lora", group_by="prompt"),
    "ppo": Trait("causal-lm", ("prompt-only",), adapter="lora", smooths=False),
    "image-classification": Trait("image-classification", ("labelled-image",), stratify_by="label"),
    "speech-recognition": Trait("speech-recognition", ("transcribed-audio",)),
}


def trait(objective: object) -> Trait | None:
    """The trait of `objective:` as a pipeline file spells it, by name or as {kind: name}; None if unknown."""
    kind = objective.get("kind") if isinstance(objective, dict) else objective
    return OBJECTIVES.get(kind) if isinstance(kind, str) else None
