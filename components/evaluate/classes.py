"""Judging a classifier: the tuned model, what compression made of it, and two plainer ways."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.evaluate import baselines, class_metrics, predictions, resources, taught
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings
from components.evaluate.slices.share import Part, Share, joined, rows
from components.shared import causal, clock, jsonl
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.progress import Progress
from components.shared.stage import Artifact, Context
from components.shared.store import Store

_WEIGHTS = (".safetensors", ".onnx", ".data")


@dataclass(frozen=True)
class Exam:
    """The test texts, their classes as indices, and how many texts go through a model at once."""

    texts: list[str]
    truth: list[int]
    labels: list[str]
    max_length_tokens: int
    per_device_batch_size: int


def take(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    share: Share,
) -> Part:
    """Put a share of the test texts through each model, and through the frozen base.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model`, `train`, and `compressed` where there is that stage.
        context: of the stage.
        share: which batches.

    Raises:
        TuneyardError: a label of test or train is none of the model's, or the base has changed.
    """
    exam, train = _prepare(config, tests, inputs)
    encodings = _encode(inputs["model"].path, exam.texts, exam)
    part = Part({}, {"cut": encodings.cut})
    _classifier("tuned", exam, encodings, inputs["model"].path, context.store, share, part)
    if "compressed" in inputs:
        _classifier("compressed", exam, encodings, inputs["compressed"].path, context.store, share, part)
    card = ModelCard.read(inputs["model"].path)
    _embed(exam, train, card, context, share, part)
    if card.teacher is not None:
        found = taught.classify(exam.texts, card, config, context, share)
        part.arrays.update(found.arrays)
        part.measured.update(found.measured)
    return part


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    parts: Sequence[Part],
) -> Findings:
    """Every way to classify the test texts, side by side; `compressed` ships where there is one.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model`, `train`, and `compressed` where there is that stage.
        context: of the stage.
        parts: what `take` found in every share.

    Raises:
        TuneyardError: a label of test or train is none of the model's, or the parts do not add up.
    """
    exam, train = _prepare(config, tests, inputs)
    first = parts[0]
    systems: dict[str, dict[str, Any]] = {}
    scores: dict[str, Any] = {}
    for name in ("tuned", "compressed") if "compressed" in inputs else ("tuned",):
        scores[name] = class_metrics.probabilities(joined(parts, f"{name}/logits"))
        found = class_metrics.score(exam.truth, scores[name], exam.labels)
        systems[name] = {**found, **first.measured[name]}
    systems["tuned"]["about"] = "the tuned model, PyTorch float32"
    if "compressed" in inputs:
        folders = inputs["model"].path, inputs["compressed"].path
        systems["compressed"] |= compression(systems["tuned"], systems["compressed"], *folders)
    systems["base"], scores["base"] = _probe(exam, train, parts)
    systems["tfidf_logreg"], scores["tfidf_logreg"] = _tfidf(exam, train)
    if ModelCard.read(inputs["model"].path).teacher is not None:
        scores["teacher"] = class_metrics.probabilities(joined(parts, "teacher/outputs"))
        told = class_metrics.score(exam.truth, scores["teacher"], exam.labels) | first.measured["teacher"]
        taught.beside(systems, told, "accuracy", "texts_per_second")
    limit = {"limit_tokens": exam.max_length_tokens}
    facts = {
        "truncated": {"texts": first.facts["cut"], "of": len(tests)} | limit,
        "latency": "of one text alone; texts per second in batches sorted by length, int8 one text at a time",
        "threads": first.measured["machine"]["threads"],
    }
    if len(parts) > 1:
        count = len(first.arrays["tuned/logits"])
        facts["latency"] += f"; measured, as memory, on slice 1 of {len(parts)} alone: {count} texts"
    ships = "compressed" if "compressed" in inputs else "tuned"
    return Findings(systems, ships, _rows(tests, exam, scores), facts)


def _prepare(
    config: EvaluateConfig, tests: Sequence[Mapping[str, Any]], inputs: Mapping[str, Artifact]
) -> tuple[Exam, list[dict[str, Any]]]:
    """The exam, and the train examples."""
    card = ModelCard.read(inputs["model"].path)
    train = list(jsonl.read(inputs["train"].path / "examples.jsonl"))
    refuse_unknown_labels({"test": tests, "train": train}, card.labels)
    exam = Exam(
        [row["text"] for row in tests],
        [card.labels.index(row["label"]) for row in tests],
        card.labels,
        card.max_length_tokens,
        config.per_device_batch_size,
    )
    return exam, train


def refuse_unknown_labels(parts: Mapping[str, Sequence[Mapping[str, Any]]], labels: Sequence[str]) -> None:
    """Check that each label is one that the model can give.

    Raises:
        TuneyardError: some are not; names them, and where the first of each was read.
    """
    strange: dict[str, str] = {}
    for part, examples in parts.items():
        for row in examples:
            if row["label"] not in labels:
                strange.setdefault(row["label"], f"{row['label']!r} in {part} ({_where(row)})")
    if strange:
        raise TuneyardError(
            f"labels that the model does not know: {', '.join(strange.values())}; it knows {list(labels)}",
            "train on a split that holds every label, or drop these examples from the corpus",
        )


def _where(row: Mapping[str, Any]) -> str:
    origin = row.get("origin") or {}
    return f"{origin.get('file', '?')}:{origin.get('line', '?')}"


def _threads() -> int:
    import torch

    return int(torch.get_num_threads())


def _encode(folder: Path, texts: Sequence[str], exam: Exam) -> predictions.Encodings:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return predictions.encode(tokenizer, texts, exam.max_length_tokens)


def _classifier(
    name: str,
    exam: Exam,
    encodings: predictions.Encodings,
    folder: Path,
    store: Store,
    share: Share,
    part: Part,
) -> None:
    """Put one of our model folders, PyTorch or ONNX, to a share of the texts; its logits go into the part."""
    card = ModelCard.read(folder)
    batches = share.take(encodings.batches(1 if card.one_at_a_time else exam.per_device_batch_size))
    if not batches:
        part.arrays.update(rows(f"{name}/logits", [], []))
        return
    with resources.peak_memory() as memory:
        if card.layout == "onnx":
            forward = predictions.onnx_classifier(folder / "model.onnx", _threads())
        else:
            forward = predictions.torch_classifier(folder, store)
        progress = Progress(share.label(f"{name}: texts"), sum(map(len, batches)), "texts")
        timed = predictions.run(forward, encodings, batches, share.measures, progress.advance)
    del forward
    gc.collect()
    part.arrays.update(rows(f"{name}/logits", timed.of, timed.outputs))
    if share.measures:
        part.measured[name] = {
            **resources.latencies(timed.single_seconds),
            "texts_per_second": len(timed.of) / timed.seconds,
            "memory_gib": memory["gib"],
        }
        part.measured["machine"] = {"threads": _threads()}


def compression(
    before: Mapping[str, Any], after: Mapping[str, Any], before_folder: Path, after_folder: Path
) -> dict[str, Any]:
    """What compression cost and gave, measured in this process on as many threads.

    float32 has the advantage of batches; int8 takes one text at a time, as it does in service.
    """
    return {
        "about": "the compressed model that ships, ONNX int8",
        "accuracy_drop_points": 100 * (before["accuracy"] - after["accuracy"]),
        "throughput_ratio": after["texts_per_second"] / before["texts_per_second"],
        "size_ratio": _weight_bytes(after_folder) / _weight_bytes(before_folder),
    }


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHTS)


def _embed(
    exam: Exam,
    train: Sequence[Mapping[str, Any]],
    card: ModelCard,
    context: Context,
    share: Share,
    part: Part,
) -> None:
    """Put the frozen base to a share of the test texts and of some train texts: vectors go into the part."""
    folder = card.base_model.folder(context.store)
    few = baselines.probe_examples(train)
    encodings = _encode(folder, [*exam.texts, *(row["text"] for row in few)], exam)
    batches = share.take(encodings.batches(exam.per_device_batch_size))
    if not batches:
        part.arrays.update(rows("base/vectors", [], []))
        return
    progress = Progress(share.label("base: texts"), sum(map(len, batches)), "texts")
    with resources.peak_memory() as memory:
        embed = predictions.torch_embedder(folder, causal.preferred_precision("auto"))
        timed = predictions.run(embed, encodings, batches, done=progress.advance)
    part.arrays.update(rows("base/vectors", timed.of, timed.outputs))
    if share.measures:
        part.measured["base"] = {"memory_gib": memory["gib"]}


def _probe(
    exam: Exam, train: Sequence[Mapping[str, Any]], parts: Sequence[Part]
) -> tuple[dict[str, Any], Any]:
    """The base, frozen, under a logistic regression."""
    vectors = joined(parts, "base/vectors")
    few = baselines.probe_examples(train)
    count = len(exam.texts)
    truth = [exam.labels.index(row["label"]) for row in few]
    with clock.arithmetic():
        scores = baselines.linear_probe(vectors[count:], truth, vectors[:count], len(exam.labels))
    return {
        "about": f"linear probe: the frozen base model, and logistic regression on {len(few)} train examples",
        **class_metrics.score(exam.truth, scores, exam.labels),
        **parts[0].measured["base"],
    }, scores


def _tfidf(exam: Exam, train: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], Any]:
    truth = [exam.labels.index(row["label"]) for row in train]
    with clock.arithmetic():
        scores = baselines.tfidf_logreg([row["text"] for row in train], truth, exam.texts, len(exam.labels))
    return {
        "about": f"TF-IDF of one and two words, and logistic regression on all {len(train)} train examples",
        **class_metrics.score(exam.truth, scores, exam.labels),
    }, scores


def _rows(tests: Sequence[Mapping[str, Any]], exam: Exam, scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each system said of each text, for answers.jsonl and the page."""
    said = {name: table.argmax(axis=1) for name, table in scores.items()}
    return [
        {
            "id": row["id"],
            "origin": row.get("origin"),
            "prompt": row["text"],
            "reference": row["label"],
            **{name: exam.labels[int(found[index])] for name, found in said.items()},
            **{f"{name}_probability": float(scores[name][index].max()) for name in scores},
        }
        for index, row in enumerate(tests)
    ]
