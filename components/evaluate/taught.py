"""A student beside its teacher: how much of its quality is kept, and how much faster it is."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from components.evaluate import encoders, predictions, sitting
from components.evaluate.config import EvaluateConfig
from components.evaluate.sitting import Exam
from components.evaluate.slices.share import Part, Share
from components.shared import causal, chat, window
from components.shared.encoders import columns_of
from components.shared.modelcard import NAME, ModelCard
from components.shared.stage import Context

_ABOUT = "the teacher of the training"


def classify(
    texts: Sequence[str], card: ModelCard, config: EvaluateConfig, context: Context, share: Share
) -> Part:
    """Put a share of the test texts through a classifier's teacher; its columns are the student's labels.

    Raises:
        TuneyardError: the teacher has changed since the training.
    """
    assert card.teacher is not None
    folder, part = card.teacher.folder(context.store), Part({})
    theirs = card.model_copy(update={"max_length_tokens": _limit(folder)})
    opened = partial(_classifier, folder, card.labels)
    encoders.put("teacher", folder, opened, texts, theirs, config, share, part)
    return Part(part.arrays, {}, {"teacher": part.measured["teacher"]} if part.measured else {})


def _classifier(folder: Path, labels: Sequence[str]) -> predictions.Forward:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    ).eval()
    columns = columns_of(model.config.id2label, labels)

    def forward(batch: dict[str, Any]) -> Any:
        with torch.inference_mode():
            logits = model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits
        return logits[:, columns].numpy()

    return forward


def _limit(folder: Path) -> int:
    """How much of a text the teacher reads: as in its own training."""
    if (folder / NAME).is_file():
        return ModelCard.read(folder).max_length_tokens
    import torch
    from transformers import AutoConfig, AutoModel

    settings = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return window.of_model(AutoModel.from_config(settings)) or 2**30


def answer(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    card: ModelCard,
    context: Context,
    share: Share,
    precision: causal.Precision,
) -> Part:
    """Let the teacher of a causal model take its share of the exam, in its own template and tokens.

    Raises:
        TuneyardError: the teacher has changed since the training.
    """
    assert card.teacher is not None
    folder = card.teacher.folder(context.store)
    if (folder / NAME).is_file():
        precision = causal.served_precision(folder)
    model, tokenizer = causal.open_folder(folder, precision)
    most = window.of_model(model)
    exam, _ = sitting.prepare(config, tests, tokenizer, most)
    arrays, measured = sitting.sit("teacher", model, exam, share)
    del model
    gc.collect()
    return Part(arrays, {"teacher_window_tokens": most}, {"teacher": measured})


def exam_of(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    card: ModelCard,
    context: Context,
    window_tokens: int | None,
) -> Exam:
    """The exam as the teacher is asked it."""
    from transformers import AutoTokenizer

    assert card.teacher is not None
    folder = card.teacher.folder(context.store)
    tokenizer = chat.prepare(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    return sitting.prepare(config, tests, tokenizer, window_tokens)[0]


def beside(systems: dict[str, dict[str, Any]], teacher: dict[str, Any], quality: str, speed: str) -> None:
    """Put the teacher beside its students, and into each student what it keeps and gains.

    Args:
        systems: of the evaluation; gets `teacher`.
        teacher: its metrics.
        quality: the metric of which a share is kept; `teacher_quality_kept` is None where the teacher has 0.
        speed: what is done in a second, for `teacher_speed_ratio`.
    """
    systems["teacher"] = {"about": _ABOUT, **teacher}
    for name in ("tuned", "compressed"):
        if name in systems:
            of = systems[name]
            of["teacher_quality_kept"] = of[quality] / teacher[quality] if teacher[quality] else None
            of["teacher_speed_ratio"] = of[speed] / teacher[speed]
