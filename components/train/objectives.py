"""What is optimised: each objective turns examples into encoded ones and micro-batches into a summed loss."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from components.shared import causal, chat
from components.shared.causal import Encoded
from components.shared.errors import TuneyardError
from components.shared.loss import summed_cross_entropy
from components.train import checkpoint
from components.train.config import TrainConfig

log = logging.getLogger("tuneyard.train")


class Objective(Protocol):
    """An objective over one model.

    Attributes:
        model: what is trained.
        tokenizer: its tokenizer, with the template.
    """

    model: Any
    tokenizer: Any

    def encode(self, example: Mapping[str, Any]) -> Any:
        """Token ids (and target) of an example; its len() is its tokens."""

    def shorten(self, encoded: Any, max_length: int) -> Any | None:
        """A version that fits, cut where no answer is; None where that cannot be."""

    def terms(self, encoded: Any) -> int:
        """How many loss terms an example has: the loss of an update is their mean."""

    def summed_loss(self, batch: Sequence[Any], label_smoothing: float) -> Any:
        """Loss in nats, summed over the terms of a micro-batch."""


class Sft:
    """Supervised fine-tuning: next-token loss on the assistant's answer alone."""

    def __init__(self, folder: Path, precision: causal.Precision, dropout: float | None = None) -> None:
        settings = base_settings(folder, dropout)
        self.model, self.tokenizer = causal.open_folder(folder, precision, settings)

    def encode(self, example: Mapping[str, Any]) -> Encoded:
        """See Objective."""
        return causal.encode(self.tokenizer, example)

    def shorten(self, encoded: Encoded, max_length: int) -> Encoded | None:
        """Cut the prompt from its left, but for the first token; the answer stays whole."""
        room = max_length - len(encoded.answer)
        if room < 1:
            return None
        return Encoded(causal.cut_prompt(encoded.prompt, room, self.tokenizer.bos_token_id), encoded.answer)

    def terms(self, encoded: Encoded) -> int:
        """Answer tokens."""
        return len(encoded.answer)

    def summed_loss(self, batch: Sequence[Encoded], label_smoothing: float) -> Any:
        """See Objective."""
        _, head, cap = causal.body_and_head(self.model)
        states, targets = causal.answer_states(self.model, causal.pad(batch, self.tokenizer.pad_token_id))
        return summed_cross_entropy(states, head, cap, targets, label_smoothing)


@dataclass(frozen=True)
class Labelled:
    """Token ids of a text and the index of its label."""

    ids: list[int]
    label: int

    def __len__(self) -> int:
        return len(self.ids)


class Classification:
    """One label for each text, by cross-entropy over the classes."""

    def __init__(self, folder: Path, labels: Sequence[str], dropout: float | None = None) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.labels = {label: index for index, label in enumerate(labels)}
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        settings = base_settings(folder, dropout)
        settings.id2label = dict(enumerate(labels))  # how many there are goes by this
        settings.label2id = self.labels
        self.model = AutoModelForSequenceClassification.from_pretrained(
            folder, config=settings, local_files_only=True, use_safetensors=True
        ).to(causal.device())
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    def encode(self, example: Mapping[str, Any]) -> Labelled:
        """See Objective."""
        ids = self.tokenizer(example["text"], truncation=False, verbose=False)["input_ids"]
        return Labelled(ids, self.labels[example["label"]])

    def shorten(self, encoded: Labelled, max_length: int) -> Labelled | None:
        """Cut the end of the text as the tokenizer does when serving: the last special token stays."""
        last = encoded.ids[-1:] if encoded.ids[-1] in self.tokenizer.all_special_ids else []
        return Labelled([*encoded.ids[: max_length - len(last)], *last], encoded.label)

    def terms(self, encoded: Labelled) -> int:
        """One label."""
        return 1

    def summed_loss(self, batch: Sequence[Labelled], label_smoothing: float) -> Any:
        """See Objective."""
        import torch

        inputs = self.tokenizer.pad({"input_ids": [e.ids for e in batch]}, return_tensors="pt").to(
            causal.device()
        )
        targets = torch.tensor([e.label for e in batch], device=causal.device())
        logits = self.model(**inputs).logits.float()
        return torch.nn.functional.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=label_smoothing
        )


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


def choose_attention(model: Any, max_length: int) -> None:
    """Switch a model to the attention that trains fastest at this length on this device."""
    if causal.device().type == "cpu" and max_length <= _PLAIN_ATTENTION_TOKENS:
        model.set_attn_implementation("eager")


def apply_adapter(objective: Objective, config: TrainConfig) -> None:
    """Set which weights move; for LoRA, add the adapter to every linear layer of the body.

    The adapter is float32 whatever the base is stored in, since small updates vanish in bfloat16.
    """
    if config.adapter.kind == "full":
        objective.model.float().requires_grad_(True)
        return
    from peft import LoraConfig, get_peft_model

    is_causal = config.objective == "sft"
    lora = LoraConfig(
        r=config.adapter.rank,
        lora_alpha=config.adapter.alpha,
        lora_dropout=config.adapter.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM" if is_causal else "SEQ_CLS",
    )
    objective.model = get_peft_model(objective.model, lora)
    # A path of this machine has no place in the artifact; the base is named as the pipeline file names it.
    objective.model.peft_config["default"].base_model_name_or_path = config.base_model


def weight_counts(objective: Objective, config: TrainConfig) -> tuple[int, int]:
    """(trainable, all) weights, after asserting that what the adapter promises is what moves.

    Raises:
        TuneyardError: LoRA would train more than a tenth of the weights, or full fine-tuning not all.
    """
    weights = checkpoint.trainable(objective.model)
    moving = sum(weight.numel() for weight in weights.values())
    total = sum(weight.numel() for weight in objective.model.parameters())
    if config.adapter.kind == "full" and moving != total:
        raise TuneyardError(
            f"full fine-tuning would move {moving:,} of {total:,} weights", "report this model class"
        )
    if config.adapter.kind == "lora":
        # A classifier's head is new, so it moves whole beside the adapter.
        foreign = [name for name in weights if "lora_" not in name and "modules_to_save" not in name]
        if foreign or not weights:
            raise TuneyardError(
                f"LoRA would move {len(weights)} tensors, {len(foreign)} the base's own: {foreign[:5]}",
                "set train.adapter: {kind: full} if that is meant",
            )
        if moving > total // 10:
            log.warning(
                "train: LoRA of rank %d moves %.0f%% of this small model",
                config.adapter.rank,
                100 * moving / total,
            )
    return moving, total


def template_probe(objective: Objective, config: TrainConfig) -> dict[str, Any] | None:
    """What serving must reproduce; None where there is no template."""
    return chat.probe(objective.tokenizer) if config.objective == "sft" else None
