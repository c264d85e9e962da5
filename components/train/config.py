"""Settings of the train stage: the objective is one axis, the adapter another."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from components.shared import tasks
from components.shared.settings import Settings
from components.train.adapters.config import KINDS, AdapterConfig
from components.train.first import First, filled, phase
from components.train.objectives.config import ObjectiveConfig
from components.train.retain_config import Retain, faults
from components.train.search.config import SearchConfig


class EarlyStopping(Settings):
    """Stop when the eval loss has not fallen by `min_delta` nats for `patience` evaluations in a row."""

    patience: int = Field(5, ge=1)
    min_delta: float = Field(0.001, ge=0)


# What to do where the objective cannot follow domain text in the same pipeline.
_BEFORE_IT = (
    "it is measured against its base: train domain text and sft first, and name that model as base_model"
)
_INSTEAD = {
    "dpo": _BEFORE_IT,
    "ppo": _BEFORE_IT,
    "language-modeling": "put both sources into one corpus, or train twice",
    "masked-language-modeling": "put both sources into one corpus, or train twice",
    "seq2seq": "an encoder-decoder has no objective for documents",
}


class TrainConfig(Settings):
    """How the model is fitted.

    Args:
        objective: what is optimised, by name or with its own settings; see objectives/config.py.
        base_model: s3:// prefix, local folder, Hugging Face id or registered model (models:/name@champion).
        revision: of a Hugging Face id.
        adapter: which weights move, by name or with its own settings; see adapters/config.py. Absent: what is
            usual for the objective, lora for sft and full for classification.
        epochs: passes over train; not beside max_steps; 3 where neither is given.
        max_steps: optimizer updates; not beside epochs.
        learning_rate: peak, reached after warm-up, or `auto`: found by a range test before the first step
            (Smith 2017, arXiv:1506.01186); where none is given the adapter's usual one, see its config.py.
        min_learning_rate: where the decay ends.
        warmup_fraction: of all steps, 0-1.
        decay: how the learning rate falls after it: on a cosine, or on a line.
        per_device_batch_size: examples in one forward pass.
        gradient_accumulation_steps: forward passes in one optimizer update.
        weight_decay: of AdamW, on matrices only.
        max_grad_norm: gradients are clipped to this global norm.
        label_smoothing: 0-1.
        dropout: of the base model's own layers, in training; None keeps what its config.json says.
        max_length: tokens of an example.
        over_length: what happens to a longer one: `drop` it, `truncate_prompt` from its left (an answer is
            never cut), `split` it into pieces that lose nothing (language-modeling alone; usual there), or
            stop with an `error`. Each is counted with its origin.
        max_over_length: largest fraction (0-1) of train that may be dropped or cut.
        precision: `auto` is bfloat16 where the processor computes in it and the adapter learns in it, else
            float32.
        gradient_checkpointing: trade a third more arithmetic for activation memory.
        first: domain text that is learnt before the task, see First; null for none.
        retain: what must not be forgotten, see retain_config.py; null for nothing.
        early_stopping: see EarlyStopping; null switches it off.
        eval_steps: optimizer updates between evaluations on eval; None: ten times in the run.
        checkpoint_steps: optimizer updates between checkpoints.
        keep_checkpoints: how many are kept.
        eval_examples: how many examples of eval are judged each time, the first by id.
        seed: of data order, initialisation and dropout.
        search: trainings with other settings, of which the best goes on, see search/config.py; null for one.
    """

    objective: ObjectiveConfig
    base_model: str
    revision: str = "main"
    adapter: AdapterConfig
    epochs: float | None = Field(None, gt=0)
    max_steps: int | None = Field(None, ge=1)
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"]
    min_learning_rate: float = Field(1e-6, ge=0)
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    decay: Literal["cosine", "linear"] = "cosine"
    per_device_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    dropout: float | None = Field(None, ge=0, lt=1)
    max_length: int = Field(512, ge=8)
    over_length: Literal["drop", "truncate_prompt", "split", "error"] = "drop"
    max_over_length: float = Field(0.05, ge=0, le=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    first: First | None = None
    retain: Retain | None = None
    early_stopping: EarlyStopping | None = EarlyStopping()
    eval_steps: int | None = Field(None, ge=1)
    eval_examples: int = Field(64, ge=1)
    checkpoint_steps: int = Field(50, ge=1)
    keep_checkpoints: int = Field(3, ge=1)
    seed: int = 42
    search: SearchConfig | None = None

    def external_uris(self) -> list[str]:
        """The base model, and whatever else the objective reads."""
        return [self.base_model, *self.objective.external_uris()]

    def external_datasets(self) -> list[str]:
        """The retention set."""
        return [self.retain.source] if self.retain else []

    def first_phase(self) -> TrainConfig:
        """The settings of the first phase; only where there is one."""
        assert self.first is not None
        return TrainConfig.model_validate(self.model_dump() | phase(self.first))

    @property
    def peak_rate(self) -> float:
        """The learning rate as a number; a fit whose settings say `auto` puts what it found in its place."""
        assert self.learning_rate != "auto"
        return self.learning_rate

    @model_validator(mode="after")
    def _retains(self) -> TrainConfig:
        found = faults(self.retain, self.objective.kind, self.adapter) if self.retain else []
        if found:
            raise ValueError("; ".join(found))
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> TrainConfig:
        """One message with all faults of `first`, and whatever its own settings do not go with."""
        if self.first is None:
            return self
        kind, after = self.objective.kind, tasks.OBJECTIVES[self.objective.kind].after
        faults = []
        if not after:
            faults.append(f"first: no domain text before {kind}; {_INSTEAD.get(kind, 'drop it')}")
        elif self.first.objective.kind not in after:
            faults.append(
                f"first.objective {self.first.objective.kind} does not go before {kind}; "
                f"it may be {' or '.join(after)}"
            )
        if self.search:
            faults.append(
                "first and search do not go together: search for the settings of the second phase without "
                "first, and then name them"
            )
        if self.retain and (self.retain.ewc or self.retain.distil_from_base):
            faults.append(
                "retain.ewc and retain.distil_from_base hold the model to its base, and would undo what "
                "first taught; use retain.replay"
            )
        if self.adapter.kind in ("prompt", "prefix", "p_tuning_v2"):
            faults.append(
                f"first: a soft prompt ({self.adapter.kind}) says what to do, and holds no domain text; "
                "choose another adapter"
            )
        if faults:
            raise ValueError("; ".join(faults))
        self.first_phase()
        return self

    @model_validator(mode="after")
    def _rate_known(self) -> TrainConfig:
        if self.learning_rate == "auto" and self.objective.kind in tasks.ANSWERING:
            raise ValueError(
                f"learning_rate: auto cannot go with {self.objective.kind}, whose loss is of answers "
                "that are yet to be drawn: set a number"
            )
        if self.learning_rate == "auto" and self.objective.kind == "multi-task":
            raise ValueError(
                "learning_rate: auto cannot go with multi-task, whose weights of tasks have a rate of their "
                "own beside it: set a number"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, raw: Any) -> Any:
        """Fill in what depends on other settings, so that a resolved pipeline file shows it."""
        if not isinstance(raw, dict):
            return raw
        found = dict(raw)
        for axis in ("objective", "adapter"):
            if isinstance(found.get(axis), str):
                found[axis] = {"kind": found[axis]}
        usual = tasks.trait(found.get("objective"))
        cut_out = isinstance(found.get("objective"), dict) and found["objective"].get("student")
        if cut_out and found.get("base_model") is None:
            found["base_model"] = found["objective"].get("teacher")
        if found.get("adapter") is None:
            found["adapter"] = {"kind": usual.adapter if usual and not cut_out else "full"}
        named = found["objective"].get("kind") if isinstance(found.get("objective"), dict) else None
        wrapped = found["adapter"] if isinstance(found["adapter"], dict) else {}
        if named in tasks.ANSWERING and wrapped.get("kind") in ("lora", "qlora"):
            found["adapter"] = {"dropout": 0.0, **wrapped}  # they compute without
        if found.get("learning_rate") is None:
            adapter = found["adapter"]
            kind = adapter.get("kind") if isinstance(adapter, dict) else getattr(adapter, "kind", None)
            found["learning_rate"] = KINDS[kind if kind in KINDS else "full"].usual_rate
        if found.get("over_length") is None and usual:
            found["over_length"] = "split" if usual.splits else "drop"
        if found.get("epochs") is None and found.get("max_steps") is None:
            found["epochs"] = 3.0
        if found.get("first") is not None:
            defaults = {name: field.default for name, field in cls.model_fields.items()}
            found["first"] = filled(found["first"], defaults | found, usual)
        return found

    @model_validator(mode="after")
    def _over_length(self) -> TrainConfig:
        splits = tasks.OBJECTIVES[self.objective.kind].splits
        impossible = "truncate_prompt" if splits else "split"
        if self.over_length == impossible:
            why = "a document has no prompt" if splits else "the parts of an answer are no examples"
            raise ValueError(f"over_length {impossible} is not for {self.objective.kind}: {why}; use drop")
        return self

    @model_validator(mode="after")
    def _smoothing(self) -> TrainConfig:
        if self.label_smoothing and not tasks.OBJECTIVES[self.objective.kind].smooths:
            raise ValueError(
                f"label_smoothing ({self.label_smoothing:g}) means nothing to {self.objective.kind}, "
                "which has no labels; drop it"
            )
        return self

    @model_validator(mode="after")
    def _whole_student(self) -> TrainConfig:
        adapter = self.adapter
        if getattr(self.objective, "student", None) and (adapter.frozen or adapter.beside):
            raise ValueError(
                f"a student of some layers has no base that adapter {adapter.kind} could be put on again: "
                "use full, last_layers or progressive"
            )
        return self

    @model_validator(mode="after")
    def _keys_kept(self) -> TrainConfig:
        if self.gradient_checkpointing and self.adapter.kind in ("prefix", "p_tuning_v2"):
            raise ValueError(
                f"gradient_checkpointing cannot go with adapter {self.adapter.kind}: a layer that is "
                "computed again is given no keys from outside; drop one"
            )
        return self

    @model_validator(mode="after")
    def _length_of_run(self) -> TrainConfig:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(
                f"epochs ({self.epochs}) and max_steps ({self.max_steps}) cannot both be set; drop one"
            )
        return self
