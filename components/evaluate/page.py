"""The evaluation as one HTML file that needs nothing else: no network, no script, no font."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.evaluate.findings import Findings
from components.shared import pages

_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_SHOWN_ANSWERS = 12
_SHOWN_MISTAKES = 20
_SHOWN_CLASSES = 30

# Metric -> what a reader calls it, its format, and which way is better (0: neither).
_METRICS: dict[str, tuple[str, str, int]] = {
    "loss": ("Loss, nats per token", "{:.3f}", -1),
    "loss_reduction": ("Loss below the base's", "{:.1%}", 1),
    "perplexity": ("Perplexity", "{:.2f}", -1),
    "loss_per_character": ("Loss, nats per character", "{:.3f}", -1),
    "perplexity_per_character": ("Perplexity per character", "{:.3f}", -1),
    "rouge_l": ("ROUGE-L", "{:.3f}", 1),
    "rouge_l_gain": ("ROUGE-L above the base's", "{:+.3f}", 1),
    "bleu": ("BLEU", "{:.3f}", 1),
    "masked_accuracy": ("Hidden tokens named right", "{:.1%}", 1),
    "exact_match": ("Exact match", "{:.1%}", 1),
    "statute_citation_accuracy": ("Statute cited as in the reference", "{:.1%}", 1),
    "pair_accuracy": ("Chosen answer above the rejected one", "{:.1%}", 1),
    "pair_margin_nats": ("Chosen above rejected, nats", "{:+.3f}", 1),
    "reward": ("Reward of the answers", "{:.3f}", 1),
    "reward_gain": ("Reward above the base's", "{:+.3f}", 1),
    "win_rate": ("Answers with a higher reward than the base's", "{:.1%}", 1),
    "kl_nats": ("Distance from the base, nats an answer", "{:.2f}", -1),
    "accuracy": ("Accuracy", "{:.2%}", 1),
    "macro_f1": ("Macro F1", "{:.3f}", 1),
    "auc": ("AUC, one against the rest", "{:.4f}", 1),
    "sensitivity": ("Sensitivity, found of those looked for", "{:.1%}", 1),
    "specificity": ("Specificity, right of the others", "{:.1%}", 1),
    "wer": ("Words wrong, of those spoken", "{:.1%}", -1),
    "cer": ("Characters wrong, of those spoken", "{:.1%}", -1),
    "mae": ("Mean absolute error", "{:,.4g}", -1),
    "rmse": ("Root mean squared error", "{:,.4g}", -1),
    "r2": ("R², variance explained", "{:.3f}", 1),
    "pearson": ("Pearson's correlation", "{:.3f}", 1),
    "spearman": ("Spearman's rank correlation", "{:.3f}", 1),
    "entity_f1": ("F1 of whole entities", "{:.3f}", 1),
    "entity_precision": ("Precision of whole entities", "{:.3f}", 1),
    "entity_recall": ("Recall of whole entities", "{:.3f}", 1),
    "macro_entity_f1": ("F1 of whole entities, mean over labels", "{:.3f}", 1),
    "recall_at_1": ("Right text first", "{:.1%}", 1),
    "recall_at_10": ("Right text among ten", "{:.1%}", 1),
    "mrr": ("Mean reciprocal rank", "{:.3f}", 1),
    "mean_score": ("Mean over tasks of macro F1 or Spearman", "{:.3f}", 1),
    "worst_score": ("The worst task's", "{:.3f}", 1),
    "accuracy_drop_points": ("Accuracy lost by compression, points", "{:.2f}", -1),
    "throughput_ratio": ("Throughput, times that of PyTorch float32", "{:.2f}", 1),
    "size_ratio": ("Size on disk, of that in float32", "{:.1%}", -1),
    "teacher_quality_kept": ("Quality, of the teacher's", "{:.1%}", 1),
    "teacher_speed_ratio": ("Speed, times the teacher's", "{:.2f}", 1),
    "answers_cut": ("Answers cut at the length limit", "{:.0f}", -1),
    "latency_p50_ms": ("Latency, median, ms", "{:,.1f}", -1),
    "latency_p95_ms": ("Latency, 95th percentile, ms", "{:,.1f}", -1),
    "tokens_per_second": ("Tokens per second", "{:,.1f}", 1),
    "texts_per_second": ("Texts per second", "{:,.0f}", 1),
    "images_per_second": ("Images per second", "{:,.0f}", 1),
    "audio_seconds_per_second": ("Seconds of speech per second", "{:,.1f}", 1),
    "memory_gib": ("Peak memory, GiB", "{:.2f}", -1),
}
_ORDER = (
    *("base", "tuned", "compressed", "teacher", "tfidf_logreg", "likelier", "longer"),
    *("tfidf_ridge", "tfidf", "dictionary", "train_mean", "pixels_logreg", "commonest"),
)


def render(document: Mapping[str, Any], findings: Findings) -> str:
    """The page of an evaluation. All text of the corpus and of the models is escaped.

    Args:
        document: what evaluation.json holds.
        findings: the systems, and the answers to show.
    """
    names = [name for name in _ORDER if name in findings.systems]
    shipped = findings.systems[findings.ships]
    wrong = [row for row in findings.answers if row.get(findings.ships) != row.get("reference")]
    # Where an answer can be nearer or farther, the farthest are shown.
    wrong.sort(key=lambda row: -row.get("off_by", 0))
    is_causal = document["task"] in ("causal-lm", "seq2seq", "masked-lm")
    return pages.template(_TEMPLATE).render(
        document=document,
        systems=findings.systems,
        names=names,
        ships=findings.ships,
        metrics=metric_rows(findings, names),
        gates=[{**gate, "title": _title(gate["metric"])} for gate in document["verdict"]["gates"]],
        answers=[row for row in findings.answers[:_SHOWN_ANSWERS] if "prompt" in row] if is_causal else [],
        answered=len(findings.answers),
        mistakes=[] if is_causal else wrong[:_SHOWN_MISTAKES],
        mistaken=len(wrong),
        is_causal=is_causal,
        classes=sorted(shipped.get("per_class", []), key=lambda row: -row["count"]),
        confusion=confusion_rows(shipped),
        tasks=shipped.get("per_task", []),
        labels=[row["label"] for row in shipped.get("per_class", [])],
        shown_classes=_SHOWN_CLASSES,
    )


def _title(metric: str) -> str:
    return _METRICS[metric][0] if metric in _METRICS else metric


def _shown(metric: str, value: float | None) -> str:
    return "–" if value is None else _METRICS[metric][1].format(value)


def metric_rows(findings: Findings, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each metric that some system has: its cells, and what ships against base."""
    rows = []
    for metric, (title, _, better) in _METRICS.items():
        values = {name: findings.systems[name].get(metric) for name in names}
        if all(value is None for value in values.values()):
            continue
        difference = None
        ours, theirs = values.get(findings.ships), values.get("base")
        if ours is not None and theirs is not None:
            difference = ours - theirs
            if _shown(metric, abs(difference)) == _shown(metric, 0.0):
                difference = 0.0  # what a reader sees as no difference gets no sign and no colour
        rows.append(
            {
                "title": title,
                "cells": [
                    (_shown(metric, values[name]), _range(findings.systems[name], metric)) for name in names
                ],
                "difference": _signed(metric, difference),
                "better": None if not difference else difference * better > 0,
            }
        )
    return rows


def _signed(metric: str, difference: float | None) -> str:
    if difference is None:
        return ""
    return f"{'+' if difference > 0 else '−' if difference < 0 else '±'}{_shown(metric, abs(difference))}"


def _range(system: Mapping[str, Any], metric: str) -> str:
    bounds = system.get("intervals", {}).get(metric)
    return f"{_shown(metric, bounds[0])} to {_shown(metric, bounds[1])}" if bounds else ""


def confusion_rows(system: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the confusion matrix: label, and (count, percent of the row, whether right) for each cell."""
    rows = []
    for index, counts in enumerate(system.get("confusion", [])):
        total = sum(counts) or 1
        cells = [(count, round(100 * count / total), at == index) for at, count in enumerate(counts)]
        rows.append({"label": system["per_class"][index]["label"], "cells": cells})
    return rows
