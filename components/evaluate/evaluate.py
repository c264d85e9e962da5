"""The evaluate stage: the model that will ship against its base, on `test` alone, and the verdict."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from components.evaluate import (
    answers,
    classes,
    documents,
    gates,
    image_classes,
    masked,
    page,
    preferences,
    retrieval,
    reward_gain,
    reward_pairs,
    scores,
    seq2seq,
    several,
    spans,
    speech,
)
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings, flat, numbers
from components.evaluate.slices import keeping
from components.shared import clock, examples, jsonl, media
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context, Result

log = logging.getLogger("tuneyard.evaluate")
_SHOWN_LEAKS = 5


def evaluate(config: EvaluateConfig, inputs: Mapping[str, Artifact], context: Context) -> Result:
    """Judge a model on examples that it has never seen.

    Args:
        config: see EvaluateConfig.
        inputs: `test`, `train` (to show that test is not in it, and for the baselines), `model`, and
            `compressed` where there is that stage.
        context: of the stage.

    Returns:
        Output `evaluation`: evaluation.json, answers.jsonl and page.html. Stops when a gate fails.

    Raises:
        TuneyardError: test is empty or holds a row of train, a gate is on a metric that this task has not,
            or the text metrics do not hold for the corpus.
    """
    clock.keep_few_kernels()
    card = ModelCard.read(inputs["model"].path)
    task = task_of(inputs, config)
    tests = read_tests(inputs)
    parts = keeping.gather(partial(task.take, config, tests, inputs, context), context)
    findings = task.judge(config, tests, inputs, context, parts)
    findings.systems[findings.ships] |= _forgetting(card)
    verdict = gates.verdict(config.gates, findings.ships, findings.systems[findings.ships])
    document = {
        "task": card.task,
        "pipeline": context.pipeline,
        "run": context.run,
        "test": {"count": len(tests), "digest": inputs["test"].manifest.digest},
        "model": {name: inputs[name].manifest.digest for name in ("model", "compressed") if name in inputs},
        "systems": findings.systems,
        "verdict": verdict,
        **findings.facts,
    }
    _write(context.out / "evaluation", document, findings)
    metrics = flat(findings)
    _log(card.mlflow_run, metrics)
    return Result(
        kinds={"evaluation": "report"},
        metadata={"evaluation": {"task": card.task, "passed": verdict["passed"]}},
        metrics=metrics,
        summary={
            "metrics": {name: numbers(system) for name, system in findings.systems.items()},
            "verdict": verdict,
        },
        page=context.out / "evaluation" / "page.html",
        stop=gates.stop_line(verdict),
        stop_todo="see page.html of the evaluation; train better, or change evaluate.gates on purpose",
    )


def task_of(inputs: Mapping[str, Artifact], config: EvaluateConfig) -> Any:
    """What judges a model of this task by these tests: `take` does a share, `judge` reads all of them.

    Raises:
        TuneyardError: a gate is on a metric that this task has not.
    """
    task = ModelCard.read(inputs["model"].path).task
    first = next(jsonl.read(inputs["test"].path / "examples.jsonl"), None)
    kind = examples.kind(first) if first else ""
    gates.refuse_unknown(config.gates, task, kind)
    match task, kind:
        case "causal-lm", "language-modeling":
            return documents
        case "causal-lm", "preference":
            return preferences
        case "causal-lm", "prompt-only":
            return reward_gain
        case "causal-lm", _:
            return answers
        case "masked-lm", _:
            return masked
        case "seq2seq", _:
            return seq2seq
        case "classification", _:
            return classes
        case "regression", _:
            return scores
        case "token-classification", _:
            return spans
        case "embedding", _:
            return retrieval
        case "multi-task", _:
            return several
        case "image-classification", _:
            return image_classes
        case "speech-recognition", _:
            return speech
        case "reward", _:
            return reward_pairs


def _forgetting(card: ModelCard) -> dict[str, float]:
    """As the training measured it, on examples that no artifact holds; nothing without a retention set."""
    return {name: value for name, value in card.retention.items() if name == "retention_loss_increase"}


def read_tests(inputs: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """The test examples, by id.

    Args:
        inputs: `test`, and `train` to show that test is not in it.

    Raises:
        TuneyardError: there is none, or some are in train too.
    """
    train = inputs["train"].path / "examples.jsonl"
    tests = sorted(media.read(inputs["test"].path), key=lambda row: row["id"])
    if not tests:
        raise TuneyardError(
            "test holds no example", "give the corpus more rows, or split.ratios a larger test share"
        )
    seen = {examples.likeness(row): row.get("origin") for row in tests}
    leaked = [row for row in jsonl.read(train) if examples.likeness(row) in seen]
    if leaked:
        shown = "; ".join(
            f"{row['id'][:12]} (test {_where(seen[examples.likeness(row)])}, "
            f"train {_where(row.get('origin'))})"
            for row in leaked[:_SHOWN_LEAKS]
        )
        raise TuneyardError(
            f"test row leaked: {len(leaked)} of {len(tests)} test examples are in train too: {shown}",
            "a model was trained on what would judge it; split the corpus again",
        )
    return tests


def _where(origin: Mapping[str, Any] | None) -> str:
    return f"{origin.get('file', '?')}:{origin.get('line', '?')}" if origin else "?"


def _write(folder: Path, document: Mapping[str, Any], findings: Findings) -> None:
    folder.mkdir(parents=True)
    # allow_nan=False: NaN is no JSON, and a metric that is none must have become None before.
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "evaluation.json").write_text(text)
    jsonl.write(folder / "answers.jsonl", findings.answers)
    (folder / "page.html").write_text(page.render(document, findings))


def _log(mlflow_run: str, metrics: Mapping[str, float]) -> None:
    if mlflow_run and os.environ.get("MLFLOW_TRACKING_URI"):
        from components.shared import tracking

        tracking.log_metrics(mlflow_run, metrics)
