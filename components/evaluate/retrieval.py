"""Judging an embedding model: for each test anchor, where its positive stands among all test texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from components.evaluate import baselines, intervals, predictions
from components.evaluate.config import EvaluateConfig
from components.evaluate.encoders import put, settings
from components.evaluate.findings import Findings
from components.evaluate.slices.share import Part, Share, joined
from components.shared import clock, jsonl
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context


@dataclass(frozen=True)
class Exam:
    """Anchors, the pool they search, and which of the pool belong to each anchor."""

    anchors: list[str]
    pool: list[str]
    wanted: list[set[int]]


def take(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    share: Share,
) -> Part:
    """Embed a share of the test texts with the tuned model and with its base.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model` and `train`.
        context: of the stage.
        share: which batches.

    Raises:
        TuneyardError: the base has changed.
    """
    folder, part, exam = inputs["model"].path, Part({}), prepare(tests)
    card, texts = ModelCard.read(folder), [*exam.anchors, *exam.pool]
    for name, where in (("tuned", folder), ("base", card.base_model.folder(context.store))):
        opened = partial(predictions.torch_embedder, where, "float32")
        put(name, where, opened, texts, card, config, share, part)
    return part


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    parts: Sequence[Part],
) -> Findings:
    """The tuned model, its base and TF-IDF search the same pool for the same anchors.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model` and `train`.
        context: of the stage.
        parts: what `take` found in every share.
    """
    folder = inputs["model"].path
    card = ModelCard.read(folder)
    train = list(jsonl.read(inputs["train"].path / "examples.jsonl"))
    exam = prepare(tests)
    systems: dict[str, dict[str, Any]] = {}
    places: dict[str, list[int]] = {}
    for name, about in (
        ("tuned", "the tuned model, PyTorch float32, cosine of mean-pooled vectors"),
        ("base", "the base model, untuned, pooled and compared in the same way"),
    ):
        similar = _cosines(joined(parts, f"{name}/outputs"), len(exam.anchors))
        places[name] = standing(similar, exam.wanted)
        systems[name] = {"about": about, **score(places[name]), **parts[0].measured[name]}
    with clock.arithmetic():
        corpus = [row[side] for row in train for side in ("anchor", "positive")]
        similar = baselines.tfidf_similarity(corpus, exam.anchors, exam.pool)
    places["tfidf"] = standing(similar, exam.wanted)
    systems["tfidf"] = {"about": "cosine of TF-IDF of one and two words", **score(places["tfidf"])}
    count = len(exam.anchors) + len(exam.pool)
    facts = {**settings(parts, count, card), "pool": len(exam.pool), "anchors": len(exam.anchors)}
    return Findings(systems, "tuned", _rows(exam, places), facts)


def prepare(tests: Sequence[Mapping[str, Any]]) -> Exam:
    """The pool is every positive and negative text of test, each once; equal anchors are asked once."""
    pool: dict[str, int] = {}
    anchors: dict[str, set[int]] = {}
    for row in tests:
        place = pool.setdefault(row["positive"], len(pool))
        if row.get("negative"):
            pool.setdefault(row["negative"], len(pool))
        anchors.setdefault(row["anchor"], set()).add(place)
    return Exam(list(anchors), list(pool), list(anchors.values()))


def _cosines(vectors: Any, anchors: int) -> Any:
    """Cosines [anchors, pool] from vectors [anchors, then pool, width]."""
    import numpy as np

    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors[:anchors] @ vectors[anchors:].T


def standing(similar: Any, wanted: Sequence[set[int]]) -> list[int]:
    """The place (from 1) of the first text that belongs to each anchor.

    A text that is as near as the right one stands before it: a model that gives every text the same vector
    finds nothing.

    Args:
        similar: [anchors, pool].
        wanted: of each anchor, which of the pool belong to it.
    """
    import numpy as np

    places = []
    for row, right in zip(np.asarray(similar), wanted, strict=True):
        others = np.ones(len(row), dtype=bool)
        others[list(right)] = False
        places.append(int((row[others] >= row[list(right)].max()).sum()) + 1)
    return places


def score(places: Sequence[int]) -> dict[str, Any]:
    """Metrics of one system (names: config.METRICS) from the places of `standing`."""
    first = [float(place == 1) for place in places]
    ten = [float(place <= 10) for place in places]
    reciprocal = [1 / place for place in places]
    return {
        "recall_at_1": sum(first) / len(first),
        "recall_at_10": sum(ten) / len(ten),
        "mrr": sum(reciprocal) / len(reciprocal),
        "intervals": {
            "recall_at_1": intervals.of_mean(first),
            "recall_at_10": intervals.of_mean(ten),
            "mrr": intervals.of_mean(reciprocal),
        },
    }


def _rows(exam: Exam, places: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": anchor,
            "reference": "1",
            "positives": [exam.pool[at] for at in sorted(exam.wanted[index])],
            **{name: str(found[index]) for name, found in places.items()},
            "off_by": places["tuned"][index] - 1,
        }
        for index, anchor in enumerate(exam.anchors)
    ]
