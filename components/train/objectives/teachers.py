"""Teachers of a distillation: opened, and held against their student before anything is learned."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import causal, chat, packed, window
from components.shared.errors import TuneyardError
from components.shared.modelcard import NAME, ModelCard
from components.shared.tasks import Task
from components.train.objectives import texts

log = logging.getLogger("tuneyard.train")

_SHOWN = 3


@dataclass(frozen=True)
class Teacher:
    """A model that does not move, in eval mode, with its tokenizer.

    Args:
        model: the teacher.
        tokenizer: its own.
        window_tokens: the longest text it reads; None for no limit that it names.
    """

    model: Any
    tokenizer: Any
    window_tokens: int | None


def open_causal(folder: Path, precision: causal.Precision) -> Teacher:
    """The causal language model of a folder, ours or not, as a teacher.

    Raises:
        TuneyardError: it is one of ours and no whole causal model, or its template has changed.
    """
    card = _card(folder, "causal-lm")
    model, tokenizer = causal.open_folder(folder, causal.served_precision(folder) if card else precision)
    if card:
        chat.verify_probe(tokenizer, card.template_probe or {}, str(folder))
    model.requires_grad_(False)
    if causal.device().type == "cpu" and packed.possible(model):
        packed.use(model)
    return Teacher(model, tokenizer, window.of_model(model))


def open_classifier(folder: Path) -> Teacher:
    """The text classifier of a folder, ours or not, as a teacher; it reads as much as it did in its training.

    Raises:
        TuneyardError: it is one of ours and no whole classifier.
    """
    from transformers import AutoModelForSequenceClassification

    card = _card(folder, "classification")
    tokenizer = texts.open_tokenizer(folder)
    model, told = AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if told["missing_keys"]:
        new = ", ".join(sorted(told["missing_keys"])[:_SHOWN])
        raise TuneyardError(
            f"teacher {folder}: no classifier, {new} would be random",
            "train it with `objective: classification` first, and name the model of that training",
        )
    model = model.to(causal.device()).eval().requires_grad_(False)
    model.config.pad_token_id = tokenizer.pad_token_id
    return Teacher(model, tokenizer, card.max_length_tokens if card else window.of_model(model))


def _card(folder: Path, task: Task) -> ModelCard | None:
    """The card of a model of ours, which must be a whole one of the task; None of any other model."""
    if not (folder / NAME).is_file():
        return None
    card = ModelCard.read(folder)
    if card.task != task or card.layout != "transformers":
        raise TuneyardError(
            f"teacher {folder}: a {card.task} model of layout {card.layout}, not a whole {task} model",
            f"name one of task {task}, trained with adapter full, or merged by compress",
        )
    return card


def shared_vocabulary(teacher: Any, student: Any, rows: Sequence[int]) -> int:
    """How many tokens teacher and student both predict: the first of either's, the same in both.

    Heads may have further rows, up to a multiple that products like; what these say is no token.

    Args:
        teacher: its tokenizer.
        student: its tokenizer.
        rows: of the teacher's and of the student's vocabulary projection.

    Raises:
        TuneyardError: an id stands for different tokens, or one has tokens that the other has not.
    """
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if theirs != ours:
        moved = sorted(token for token in theirs.keys() & ours.keys() if theirs[token] != ours[token])
        alone, missing = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
        shown = [f"{token!r} is {theirs[token]} and {ours[token]}" for token in moved[:_SHOWN]]
        shown += [f"{token!r}" for token in (*alone[:_SHOWN], *missing[:_SHOWN])]
        raise TuneyardError(
            f"teacher and student do not share a vocabulary: {len(theirs):,} and {len(ours):,} tokens; "
            f"{len(moved):,} have different ids, {len(alone):,} are the teacher's alone, {len(missing):,} "
            f"the student's: {', '.join(shown)}",
            "choose a student of the teacher's family, or set train.objective.level: sequence",
        )
    if max(ours.values()) >= min(rows):
        raise TuneyardError(
            f"the tokenizer has ids up to {max(ours.values())}, teacher and student predict {rows[0]} and "
            f"{rows[1]}",
            "the tokenizer files belong to another model: restore them",
        )
    return min(rows)


def warn_of_template(teacher: Any, student: Any) -> None:
    """Say it where a teacher is about to read another chat template than its own."""
    theirs = chat.prepare(teacher).chat_template
    if theirs != student.chat_template:
        log.warning(
            "train: the teacher reads the student's chat template, which is not its own; if it answers badly "
            "in that, tune it on this template first, or set train.objective.level: sequence"
        )
