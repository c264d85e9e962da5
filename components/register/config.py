"""Settings of the register stage."""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import Field, field_validator

from components.shared.settings import MODEL_NAME, Settings

# What models may be compared by, and which way is better. Costs (latency, memory) are not among them: they
# belong to the machine that measured them.
BETTER: dict[str, Literal["lower", "higher"]] = {
    "loss": "lower",
    "perplexity": "lower",
    "loss_reduction": "higher",
    "loss_per_character": "lower",
    "masked_accuracy": "higher",
    "perplexity_per_character": "lower",
    "exact_match": "higher",
    "rouge_l": "higher",
    "bleu": "higher",
    "statute_citation_accuracy": "higher",
    "accuracy": "higher",
    "macro_f1": "higher",
    "auc": "higher",
    "sensitivity": "higher",
    "specificity": "higher",
    "wer": "lower",
    "cer": "lower",
    "mae": "lower",
    "rmse": "lower",
    "r2": "higher",
    "pearson": "higher",
    "spearman": "higher",
    "entity_f1": "higher",
    "macro_entity_f1": "higher",
    "recall_at_1": "higher",
    "recall_at_10": "higher",
    "mrr": "higher",
    "mean_score": "higher",
    "worst_score": "higher",
    "pair_accuracy": "higher",
    "pair_margin_nats": "higher",
    "reward": "higher",
    "reward_gain": "higher",
    "win_rate": "higher",
}


class RegisterConfig(Settings):
    """Under which name the model is registered, and when it becomes champion.

    Args:
        name: of the registered model; the pipeline's own name when absent.
        compare_by: metric that a new model must not be worse in to become champion; None: the usual
            one of the model's task (compare.default_metric).
    """

    name: str | None = Field(None, pattern=f"^{MODEL_NAME}$")
    compare_by: str | None = None

    @field_validator("compare_by")
    @classmethod
    def _known(cls, metric: str | None) -> str | None:
        if metric is not None and metric not in BETTER:
            close = difflib.get_close_matches(metric, BETTER, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"models are not compared by {metric!r}{hint}; choose from {', '.join(BETTER)}")
        return metric
