"""Settings of the evaluate stage."""

from __future__ import annotations

import difflib

from pydantic import Field, model_validator

from components.shared.settings import Settings

# Of a model that was distilled, beside its teacher.
OF_TEACHER = ("teacher_quality_kept", "teacher_speed_ratio")
_COSTS = ("latency_p50_ms", "latency_p95_ms", "texts_per_second", "memory_gib")
_OF_ANSWERS = (
    "loss",
    "loss_reduction",
    "perplexity",
    "exact_match",
    "rouge_l",
    "rouge_l_gain",
    "bleu",
    "statute_citation_accuracy",
    "latency_p50_ms",
    "latency_p95_ms",
    "tokens_per_second",
    "memory_gib",
    "retention_loss_increase",
    *OF_TEACHER,
)
# What a gate may be set on, by the task of a model (ModelCard.task); where that does not decide, also by the
# dataset type that judges it: see `metrics_of`.
METRICS: dict[str, tuple[str, ...]] = {
    "causal-lm": _OF_ANSWERS,
    "causal-lm by preference": (*_OF_ANSWERS, "pair_accuracy", "pair_margin_nats"),
    "causal-lm by prompt-only": (
        "reward",
        "reward_gain",
        "win_rate",
        "kl_nats",
        "latency_p50_ms",
        "latency_p95_ms",
        "tokens_per_second",
        "memory_gib",
        "retention_loss_increase",
    ),
    "seq2seq": _OF_ANSWERS,
    "masked-lm": (
        "loss",
        "loss_reduction",
        "perplexity",
        "masked_accuracy",
        "tokens_per_second",
        "memory_gib",
        "retention_loss_increase",
    ),
    "causal-lm by language-modeling": (
        "loss",
        "loss_reduction",
        "perplexity",
        "loss_per_character",
        "perplexity_per_character",
        "tokens_per_second",
        "memory_gib",
        "retention_loss_increase",
    ),
    "reward": (
        "pair_accuracy",
        "pair_margin_nats",
        "texts_per_second",
        "memory_gib",
        "retention_loss_increase",
    ),
    "classification": (
        "accuracy",
        "macro_f1",
        "auc",
        "latency_p50_ms",
        "latency_p95_ms",
        "texts_per_second",
        "memory_gib",
        "accuracy_drop_points",
        "throughput_ratio",
        "size_ratio",
        "retention_loss_increase",
        *OF_TEACHER,
    ),
    "regression": ("mae", "rmse", "r2", "pearson", "spearman", *_COSTS, "retention_loss_increase"),
    "token-classification": (
        "entity_f1",
        "entity_precision",
        "entity_recall",
        "macro_entity_f1",
        *_COSTS,
        "retention_loss_increase",
    ),
    "embedding": ("recall_at_1", "recall_at_10", "mrr", *_COSTS, "retention_loss_increase"),
    "image-classification": (
        "accuracy",
        "macro_f1",
        "auc",
        "sensitivity",
        "specificity",
        "latency_p50_ms",
        "latency_p95_ms",
        "images_per_second",
        "memory_gib",
    ),
    "speech-recognition": (
        "wer",
        "cer",
        "loss",
        "latency_p50_ms",
        "latency_p95_ms",
        "audio_seconds_per_second",
        "memory_gib",
    ),
    "multi-task": ("mean_score", "worst_score", *_COSTS, "retention_loss_increase"),
}


def metrics_of(task: str, dataset_type: str) -> tuple[str, ...]:
    """The metrics of a model of a task that examples of a dataset type judge."""
    return METRICS.get(f"{task} by {dataset_type}", METRICS[task])


class Bound(Settings):
    """Bounds of one metric, inclusive."""

    min: float | None = Field(None, allow_inf_nan=False)
    max: float | None = Field(None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _something(self) -> Bound:
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min or max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}: nothing could pass")
        return self


class EvaluateConfig(Settings):
    """How the model is judged, on `test` only.

    Args:
        gates: metric -> bounds that the model that will ship must keep.
        max_generated: how many test examples are answered in full (for exact match, ROUGE-L and BLEU); loss
            is always over all. They are the first by example id, so the same ones in each run.
        max_new_tokens: longest answer in tokens; None: the longest reference, in tokens, up to 512.
        positive_label: of two classes of images the one that is looked for: sensitivity is the share of it
            that is found, specificity that of the other; None: the rarer one in train.
        per_device_batch_size: texts or prompts in one forward pass. On a CPU, the next token of 32 prompts
            takes no longer than that of 16: it waits for the weights either way.
    """

    gates: dict[str, Bound] = Field(default_factory=dict)
    max_generated: int = Field(32, ge=1)
    max_new_tokens: int | None = Field(None, ge=1)
    positive_label: str | None = None
    per_device_batch_size: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _known_metrics(self) -> EvaluateConfig:
        known = sorted({name for names in METRICS.values() for name in names})
        faults = []
        for name in self.gates:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                faults.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        if faults:
            raise ValueError(f"gates: no such metric: {', '.join(faults)}; there are {', '.join(known)}")
        return self
