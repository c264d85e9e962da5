"""Settings of the first of two phases: domain text is learnt before the task, by the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from components.shared import tasks
from components.shared.settings import Settings
from components.train.objectives.config import LanguageModelingObjective, MaskedLanguageModelingObjective

# What means the same in both phases, and is train's where `first` does not say otherwise.
_SHARED = (
    "learning_rate",
    "per_device_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "eval_steps",
)


class First(Settings):
    """Continued pre-training on domain text before the task (Gururangan et al. 2020, arXiv:2004.10964).

    One adapter does both: what the first phase moved, the second moves on. Whatever is not named here is as
    in train: precision, warm-up, decay, early stopping on the documents' own eval side, checkpoints, seed.

    Args:
        source: of the documents: s3:// prefix, local path or glob, or Hugging Face data set id. ingest reads
            it, validate judges it, and split leaves out what repeats or holds an example of eval or test.
        columns: `text` -> column of the source, where it has another name.
        objective: `language-modeling` or, of an encoder and usual there, `masked-language-modeling`.
        epochs: passes over the documents; not beside max_steps; 1 where neither is given.
        max_steps: optimizer updates; not beside epochs.
        learning_rate: as train's, and train's where none is given; so are those below.
        per_device_batch_size: pieces of documents in one forward pass.
        gradient_accumulation_steps: forward passes in one update.
        max_length: tokens of a piece; a longer document is split.
        eval_steps: updates between evaluations on the documents of eval; None: ten times in the phase.
    """

    source: str
    columns: dict[Literal["text"], str] = Field(default_factory=dict)
    objective: Annotated[
        LanguageModelingObjective | MaskedLanguageModelingObjective, Field(discriminator="kind")
    ]
    epochs: float | None = Field(None, gt=0)
    max_steps: int | None = Field(None, ge=1)
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"]
    per_device_batch_size: int = Field(ge=1)
    gradient_accumulation_steps: int = Field(ge=1)
    max_length: int = Field(ge=8)
    eval_steps: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _length_of_phase(self) -> First:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(f"epochs ({self.epochs}) and max_steps ({self.max_steps}) cannot both be set")
        return self


def filled(raw: Any, train: Mapping[str, Any], usual: tasks.Trait | None) -> Any:
    """`first` as a pipeline file has it, with what it takes over from train.

    Args:
        raw: of the pipeline file.
        train: the settings around it, defaults too.
        usual: of train's objective.
    """
    if not isinstance(raw, dict):
        return raw
    found = {name: train.get(name) for name in _SHARED} | {k: v for k, v in raw.items() if v is not None}
    if found.get("objective") is None and usual:
        # Where nothing may come first, TrainConfig says so.
        found["objective"] = (usual.after or ("language-modeling",))[0]
    if isinstance(found.get("objective"), str):
        found["objective"] = {"kind": found["objective"]}
    if found.get("epochs") is None and found.get("max_steps") is None:
        found["epochs"] = 1.0
    return found


def phase(first: First) -> dict[str, Any]:
    """What differs from train's settings while the first phase is trained."""
    own = first.model_dump(exclude={"source", "columns"})
    return {**own, "first": None, "retain": None, "label_smoothing": 0.0, "over_length": "split"}
