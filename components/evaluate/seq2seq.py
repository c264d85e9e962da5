"""Judging an encoder-decoder model: the exam of causal models, asked and read in its own way."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from components.evaluate import answers
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings
from components.evaluate.generation import Answer
from components.evaluate.sitting import Kind
from components.evaluate.slices.share import Part, Share
from components.shared import seq2seq
from components.shared.stage import Artifact, Context


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    end_ids: Container[int],
    max_new_tokens: int,
    per_device_batch_size: int,
    done: Callable[[int], None],
) -> list[Answer]:
    """Answers of one batch; each waits for all."""
    tokens, ended, seconds = seq2seq.write(model, prompts, max_new_tokens, done)
    return [Answer(ids, over, seconds) for ids, over in zip(tokens, ended, strict=True)]


KIND = Kind(
    encode=seq2seq.encode,
    base=lambda card, store, precision: seq2seq.open_model(card.base_model.folder(store), precision),
    tuned=lambda folder, store, precision: seq2seq.open_model(folder, precision),
    nats=seq2seq.answer_nats,
    generate=_generate,
)


def take(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    share: Share,
) -> Part:
    """Do a share of the exam: see answers.take."""
    return answers.take(config, tests, inputs, context, share, KIND)


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    parts: Sequence[Part],
) -> Findings:
    """Base and tuned model side by side: see answers.judge."""
    return answers.judge(config, tests, inputs, context, parts, KIND)
