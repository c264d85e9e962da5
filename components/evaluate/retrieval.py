"""Judging an embedding model: for each test anchor, where its positive stands among all test texts."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.evaluate import baselines, intervals, predictions
from components.evaluate.config import EvaluateConfig
from components.evaluate.encoders import measured, settings
from components.evaluate.findings import Findings
from components.shared import clock, jsonl
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context


@dataclass(frozen=True)
class Exam:
    """Anchors, the pool they search, and which of the pool belong to each anchor."""

    anchors: list[str]
    pool: list[str]
    wanted: list[set[int]]


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
) -> Findings:
    """The tuned model, its base and TF-IDF search the same pool for the same anchors.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model` and `train`.
        context: of the stage.

    Raises:
        TuneyardError: the base has changed.
    """
    folder = inputs["model"].path
    card = ModelCard.read(folder)
    train = list(jsonl.read(inputs["train"].path / "examples.jsonl"))
    exam = prepare(tests)
    systems: dict[str, dict[str, Any]] = {}
    places: dict[str, list[int]] = {}
    base = card.base_model.folder(context.store)
    encodings = None
    for name, where, about in (
        ("tuned", folder, "the tuned model, PyTorch float32, cosine of mean-pooled vectors"),
        ("base", base, "the base model, untuned, pooled and compared in the same way"),
    ):
        similar, costs, encodings = _embedded(name, where, exam, card, config)
        places[name] = standing(similar, exam.wanted)
        systems[name] = {"about": about, **score(places[name]), **costs}
    with clock.arithmetic():
        corpus = [row[side] for row in train for side in ("anchor", "positive")]
        similar = baselines.tfidf_similarity(corpus, exam.anchors, exam.pool)
    places["tfidf"] = standing(similar, exam.wanted)
    systems["tfidf"] = {"about": "cosine of TF-IDF of one and two words", **score(places["tfidf"])}
    assert encodings is not None
    facts = {**settings(encodings, card), "pool": len(exam.pool), "anchors": len(exam.anchors)}
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


def _embedded(
    name: str, folder: Path, exam: Exam, card: ModelCard, config: EvaluateConfig
) -> tuple[Any, dict[str, float], predictions.Encodings]:
    """Cosines [anchors, pool] by one model folder, its costs, and the encodings of all texts."""
    import numpy as np

    forward = predictions.torch_embedder(folder, "float32")
    texts = [*exam.anchors, *exam.pool]
    vectors, costs, encodings = measured(name, folder, forward, texts, card, config)
    del forward
    gc.collect()
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors[: len(exam.anchors)] @ vectors[len(exam.anchors) :].T, costs, encodings


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
