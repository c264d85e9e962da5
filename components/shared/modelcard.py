"""`tuneyard.json`: what every model folder of ours says about itself, beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from components.shared import sources
from components.shared.drift import Reference
from components.shared.errors import TuneyardError
from components.shared.heads import Head, Scale
from components.shared.store import Store
from components.shared.tasks import Task

NAME = "tuneyard.json"


class BaseModelRef(BaseModel):
    """Where the base came from, and a fingerprint of its content (sources.fingerprint).

    Args:
        uri: as the pipeline file names it.
        fingerprint: of what was there when the model was tuned.
        revision: of a Hugging Face id.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    uri: str
    fingerprint: str
    revision: str = "main"

    def folder(self, store: Store) -> Path:
        """A local folder with the base, which must still be the one that was tuned.

        Raises:
            TuneyardError: it is no longer that one, or not to be had.
        """
        now = sources.fingerprint(self.uri, store, "model", self.revision)
        if now != self.fingerprint:
            raise TuneyardError(
                f"base model {self.uri} changed since the training "
                f"({self.fingerprint[:12]} then, {now[:12]} now)",
                "restore it, or submit again so that the model is trained on the new base",
            )
        return sources.model_folder(self.uri, store, self.revision)


class DomainPhase(BaseModel):
    """Domain text that the model learnt before its task.

    Args:
        source: as the pipeline file names it.
        documents_digest: sha256 of the documents that were trained on, as the train artifact has them.
        objective: by which.
        documents: how many.
        steps: optimizer updates.
        base_eval_loss: of the base on documents of eval, in nats.
        eval_loss: after the phase.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    documents_digest: str
    objective: str
    documents: int
    steps: int
    base_eval_loss: float
    eval_loss: float


class ModelCard(BaseModel):
    """Facts that whoever loads the model must follow.

    Args:
        task: what it does; see shared/tasks.py.
        layout: `transformers` (a whole model in safetensors), `peft` (an adapter that can be merged into its
            base), `addon` (one that stays beside it, see shared/addons.py) or `onnx` (model.onnx, int8, with
            the tokenizer files).
        base_model: what it was tuned from.
        first: see DomainPhase; None where the task is all it learnt.
        reward_model: what judged its answers in training; None for none.
        teacher: what it was distilled from; None for nothing.
        quantised: what the base's layers were held in while the adapter was trained; None for no less than
            they are stored in.
        labels: class names (of a token-classification model its tags) in logit order; empty where there are
            none.
        scale: of a regression model's output.
        heads: of a multi-task model, in the order of its outputs.
        task_in_text: whether a multi-task model reads the name of the task before the text (heads.asked).
        max_length_tokens: longer inputs are cut (and counted) before the model sees them.
        template_probe: chat.probe of the tokenizer; None for classification.
        preprocess_probe: what the processor of a model of images makes of a test picture, of speech of a tone
            and a text; None for others.
        trainable_weights: how many weights training moved.
        total_weights: how many there are.
        chosen: settings of train that a search chose, by name; empty without one.
        retention: in nats, the loss on the retention set, the base's, and the increase; empty without one.
        mlflow_run: id of the MLflow run of the training; empty without tracking.
        reference: what it was trained on, for drift; None for a model of before there was one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    task: Task
    layout: Literal["transformers", "peft", "addon", "onnx"]
    base_model: BaseModelRef
    first: DomainPhase | None = None
    reward_model: BaseModelRef | None = None
    teacher: BaseModelRef | None = None
    quantised: Literal["nf4"] | None = None
    labels: list[str] = []
    scale: Scale | None = None
    heads: list[Head] = []
    task_in_text: bool = False
    max_length_tokens: int
    template_probe: dict[str, Any] | None = None
    preprocess_probe: dict[str, Any] | None = None
    trainable_weights: int
    total_weights: int
    chosen: dict[str, Any] = {}
    retention: dict[str, float] = {}
    mlflow_run: str = ""
    reference: Reference | None = None

    @property
    def one_at_a_time(self) -> bool:
        """Whether texts go through the model one by one, in service and when it is judged.

        int8 activations get one scale for the whole batch, so neighbours change a verdict: MiniLM's logits
        moved by 0.07-0.12, half their spread, beside 15 others.
        """
        return self.layout == "onnx"

    def write(self, folder: Path) -> None:
        """Write it into a model folder."""
        (folder / NAME).write_text(self.model_dump_json(indent=1))

    @classmethod
    def read(cls, folder: Path) -> ModelCard:
        """Read it from a model folder.

        Raises:
            TuneyardError: there is none or it does not fit.
        """
        try:
            return cls.model_validate(json.loads((folder / NAME).read_text()))
        except (OSError, ValueError) as error:
            raise TuneyardError(f"{folder}: no usable {NAME} ({error})", "train the model again") from error
