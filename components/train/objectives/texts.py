"""What the encoder objectives share: their tokenizer, a head over the base, and texts in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.shared import causal
from components.train.objectives.base import base_settings


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; one without a padding token pads with its end-of-sequence token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def open_headed(
    folder: Path,
    tokenizer: Any,
    labels: Sequence[str],
    dropout: float | None,
    family: str = "AutoModelForSequenceClassification",
) -> Any:
    """The base model of a folder under a new linear head.

    Args:
        folder: of the base model.
        tokenizer: its tokenizer.
        labels: names of the head's outputs.
        dropout: see base_settings.
        family: class of transformers that adds the head.
    """
    import transformers

    settings = base_settings(folder, dropout)
    settings.id2label = dict(enumerate(labels))  # how many there are goes by this
    settings.label2id = {label: index for index, label in enumerate(labels)}
    model = (
        getattr(transformers, family)
        .from_pretrained(folder, config=settings, local_files_only=True, use_safetensors=True)
        .to(causal.device())
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a whole text, special ones and all."""
    return list(tokenizer(text, truncation=False, verbose=False)["input_ids"])


def closing(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """The last token where it is a special one: it stays when a text is cut, as in service."""
    return [ids[-1]] if ids[-1] in tokenizer.all_special_ids else []


def cut(tokenizer: Any, ids: Sequence[int], max_length: int) -> list[int]:
    """Ids without the end of the text, as the tokenizer cuts when serving."""
    if len(ids) <= max_length:
        return list(ids)
    last = closing(tokenizer, ids)
    return [*ids[: max_length - len(last)], *last]
