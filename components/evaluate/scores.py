"""Judging a regression: the tuned model, the mean of train, and a ridge regression on words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components.evaluate import baselines, predictions, score_metrics
from components.evaluate.config import EvaluateConfig
from components.evaluate.encoders import measured, settings
from components.evaluate.findings import Findings
from components.shared import clock, jsonl
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
) -> Findings:
    """Every way to score the test texts, side by side.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model` and `train`.
        context: of the stage.

    Raises:
        TuneyardError: the model's card has no scale.
    """
    folder = inputs["model"].path
    card = ModelCard.read(folder)
    if card.scale is None:
        raise TuneyardError(f"{folder}: its card names no scale of scores", "train the model again")
    train = list(jsonl.read(inputs["train"].path / "examples.jsonl"))
    truth = [float(row["score"]) for row in tests]
    forward = predictions.torch_classifier(folder)
    outputs, costs, encodings = measured(
        "tuned", folder, forward, [row["text"] for row in tests], card, config
    )
    said = {"tuned": card.scale.restored(outputs[:, 0])}
    systems = {
        "tuned": {
            "about": "the tuned model, PyTorch float32",
            **score_metrics.score(truth, said["tuned"]),
            **costs,
        }
    }
    said["train_mean"] = [card.scale.mean] * len(tests)
    systems["train_mean"] = {
        "about": f"the mean score of train, {card.scale.mean:.6g}, whatever the text",
        **score_metrics.score(truth, said["train_mean"]),
    }
    with clock.arithmetic():
        said["tfidf_ridge"] = baselines.tfidf_ridge(
            [row["text"] for row in train],
            [float(row["score"]) for row in train],
            [row["text"] for row in tests],
        )
    systems["tfidf_ridge"] = {
        "about": f"TF-IDF of one and two words, and ridge regression on all {len(train)} train examples",
        **score_metrics.score(truth, said["tfidf_ridge"]),
    }
    return Findings(systems, "tuned", _rows(tests, truth, said), settings(encodings, card))


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
