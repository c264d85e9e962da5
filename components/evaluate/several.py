"""Judging a model of several tasks: each head by the metrics of its kind, and all by their mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from components.evaluate import baselines, class_metrics, predictions, score_metrics
from components.evaluate.config import EvaluateConfig
from components.evaluate.encoders import put, settings
from components.evaluate.findings import Findings
from components.evaluate.slices.share import Part, Share, joined
from components.shared import clock, heads, jsonl
from components.shared.errors import TuneyardError
from components.shared.heads import Head
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context

Rows = Sequence[Mapping[str, Any]]


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

    Raises:
        TuneyardError: a task or label of test is none of the model's.
    """
    folder, part = inputs["model"].path, Part({})
    card = ModelCard.read(folder)
    refuse_unknown(tests, card.heads)
    texts = [heads.asked(row["task"], row["text"], card.task_in_text) for row in tests]
    put("tuned", folder, partial(predictions.torch_classifier, folder), texts, card, config, share, part)
    return part


def judge(
    config: EvaluateConfig,
    tests: Rows,
    inputs: Mapping[str, Artifact],
    context: Context,
    parts: Sequence[Part],
) -> Findings:
    """The tuned model on every task, beside the commonest answer and TF-IDF under a linear model.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model` and `train`.
        context: of the stage.
        parts: what `take` found in every share.
    """
    card = ModelCard.read(inputs["model"].path)
    train = list(jsonl.read(inputs["train"].path / "examples.jsonl"))
    outputs = joined(parts, "tuned/outputs")
    said: dict[str, list[Any]] = {name: [None] * len(tests) for name in ("tuned", "commonest", "tfidf")}
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in said}
    for head, place in heads.slices(card.heads):
        mine = [i for i, row in enumerate(tests) if row["task"] == head.task]
        if not mine:
            continue  # a task that test does not show is not judged; `tasks` of the facts says so
        asked = [tests[i] for i in mine]
        learnt = [row for row in train if row["task"] == head.task]
        by_system = {
            "tuned": _spoken(head, outputs[mine, place]),
            "commonest": _commonest(head, learnt, len(mine)),
            "tfidf": _tfidf(head, learnt, asked),
        }
        for name, answers in by_system.items():
            tables[name].append(_score(head, asked, answers))
            for i, answer in zip(mine, answers, strict=True):
                said[name][i] = answer
    abouts = {
        "tuned": "the tuned model, PyTorch float32",
        "commonest": "the commonest label of train, or the mean of its scores",
        "tfidf": "TF-IDF of one and two words under a logistic or ridge regression for each task",
    }
    systems = {name: {"about": abouts[name], **_over_all(table)} for name, table in tables.items()}
    systems["tuned"] |= parts[0].measured["tuned"]
    facts = settings(parts, len(tests), card)
    facts["tasks"] = {"judged": len(tables["tuned"]), "of": len(card.heads)}
    return Findings(systems, "tuned", _rows(tests, said), facts)


def refuse_unknown(tests: Rows, known: Sequence[Head]) -> None:
    """Check that the model has a head for each task, and knows each label.

    Raises:
        TuneyardError: not so; names each such task or label and where it was read first.
    """
    by_task = {head.task: head for head in known}
    strange: dict[str, str] = {}
    for row in tests:
        head, origin = by_task.get(row["task"]), row.get("origin") or {}
        where = f"{origin.get('file', '?')}:{origin.get('line', '?')}"
        if head is None:
            strange.setdefault(row["task"], f"task {row['task']!r} ({where})")
        elif head.scale is None and row["label"] not in head.labels:
            strange.setdefault(f"{row['task']}/{row['label']}", f"{row['task']} {row['label']!r} ({where})")
    if strange:
        raise TuneyardError(
            f"test holds what the model does not know: {', '.join(strange.values())}; "
            f"its tasks are {sorted(by_task)}",
            "train on a split that holds every task and label, or drop these examples from the corpus",
        )


def _spoken(head: Head, outputs: Any) -> list[Any]:
    """A label or a score for each row of a head's outputs."""
    if head.scale is not None:
        return [float(value) for value in head.scale.restored(outputs[:, 0])]
    return [head.labels[int(at)] for at in outputs.argmax(axis=1)]


def _commonest(head: Head, train: Rows, count: int) -> list[Any]:
    if head.scale is not None:
        return [head.scale.mean] * count
    counts = Counter(row["label"] for row in train)
    return [min(counts, key=lambda label: (-counts[label], label))] * count


def _tfidf(head: Head, train: Rows, asked: Rows) -> list[Any]:
    texts, test = [row["text"] for row in train], [row["text"] for row in asked]
    with clock.arithmetic():
        if head.scale is not None:
            scores = baselines.tfidf_ridge(texts, [float(row["label"]) for row in train], test)
            return [float(score) for score in scores]
        truth = [head.labels.index(row["label"]) for row in train]
        chances = baselines.tfidf_logreg(texts, truth, test, len(head.labels))
    return [head.labels[int(at)] for at in chances.argmax(axis=1)]


def _score(head: Head, asked: Rows, answers: Sequence[Any]) -> dict[str, Any]:
    """One row of a system's table: macro F1 of a classification, Spearman of a regression, as `score`."""
    import numpy as np

    row: dict[str, Any] = {"task": head.task, "count": len(asked)}
    if head.scale is not None:
        found = score_metrics.score([float(one["label"]) for one in asked], answers)
        named = {name: found[name] for name in ("mae", "rmse", "r2", "pearson", "spearman")}
        # Answers that do not vary with the text order nothing.
        return {**row, "kind": "regression", "metric": "spearman", "score": found["spearman"] or 0.0, **named}
    # One-hot: the table is of labels said, and needs no probabilities.
    said = np.eye(len(head.labels))[[head.labels.index(answer) for answer in answers]]
    truth = [head.labels.index(one["label"]) for one in asked]
    found = class_metrics.score(truth, said, head.labels)
    named = {name: found[name] for name in ("accuracy", "macro_f1")}
    return {**row, "kind": "classification", "metric": "macro_f1", "score": found["macro_f1"], **named}


def _over_all(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over tasks, each counting once however many examples it has, and the worst."""
    scores = [row["score"] for row in table]
    return {"mean_score": sum(scores) / len(scores), "worst_score": min(scores), "per_task": list(table)}


def _rows(tests: Rows, said: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    rows = []
    for index, row in enumerate(tests):
        answers = {name: answer[index] for name, answer in said.items()}
        rows.append(
            {
                "id": row["id"],
                "origin": row.get("origin"),
                "prompt": f"{row['task']}: {row['text']}",
                "reference": row["label"],
                **{name: a if isinstance(a, str) else f"{a:.6g}" for name, a in answers.items()},
            }
        )
    return rows
