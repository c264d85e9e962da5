"""Judging a regression: the tuned model, the mean of train, and a ridge regression on words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from components.evaluate import baselines, predictions, score_metrics
from components.evaluate.config import EvaluateConfig
from components.evaluate.encoders import put, settings
from components.evaluate.findings import Findings
from components.evaluate.slices.share import Part, Share, joined
from components.shared import clock, jsonl
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context


def take(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    share: Share,
) -> Part:
    """Put a share of the test texts through the tuned model.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model` and `train`.
        context: of the stage.
        share: which batches.
    """
    folder, part = inputs["model"].path, Part({})
    texts = [row["text"] for row in tests]
    opened = partial(predictions.torch_classifier, folder)
    put("tuned", folder, opened, texts, ModelCard.read(folder), config, share, part)
    return part


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    parts: Sequence[Part],
) -> Findings:
    """Every way to score the test texts, side by side.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model` and `train`.
        context: of the stage.
        parts: what `take` found in every share.

    Raises:
        TuneyardError: the model's card has no scale.
    """
    folder = inputs["model"].path
    card = ModelCard.read(folder)
    if card.scale is None:
        raise TuneyardError(f"{folder}: its card names no scale of scores", "train the model again")
    train = list(jsonl.read(inputs["train"].path / "examples.jsonl"))
    truth = [float(row["score"]) for row in tests]
    said = {"tuned": card.scale.restored(joined(parts, "tuned/outputs")[:, 0])}
    said["train_mean"] = [card.scale.mean] * len(tests)
    with clock.arithmetic():
        said["tfidf_ridge"] = baselines.tfidf_ridge(
            [row["text"] for row in train],
            [float(row["score"]) for row in train],
            [row["text"] for row in tests],
        )
    abouts = {
        "tuned": "the tuned model, PyTorch float32",
        "train_mean": f"the mean score of train, {card.scale.mean:.6g}, whatever the text",
        "tfidf_ridge": f"TF-IDF of one and two words, ridge regression on all {len(train)} train examples",
    }
    systems = {
        name: {"about": abouts[name], **score_metrics.score(truth, scores)} for name, scores in said.items()
    }
    systems["tuned"] |= parts[0].measured["tuned"]
    return Findings(systems, "tuned", _rows(tests, truth, said), settings(parts, len(tests), card))


def _rows(
    tests: Sequence[Mapping[str, Any]], truth: Sequence[float], said: Mapping[str, Any]
) -> list[dict[str, Any]]:
    return [
        {
            "id": row["id"],
            "origin": row.get("origin"),
            "prompt": row["text"],
            "reference": truth[index],
            **{name: float(values[index]) for name, values in said.items()},
            "off_by": abs(float(said["tuned"][index]) - truth[index]),
        }
        for index, row in enumerate(tests)
    ]
