"""Whether a new model may take the champion's place: judged on the same thing, and not worse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from components.register.config import BETTER

# Over every test example; the other metrics are over the answers that were generated for some of them.
_OVER_ALL_EXAMPLES = {
    "loss",
    "perplexity",
    "loss_reduction",
    "loss_per_character",
    "perplexity_per_character",
    "masked_accuracy",
    "accuracy",
    "macro_f1",
    "auc",
    "sensitivity",
    "specificity",
    "wer",
    "cer",
    "pair_accuracy",
    "pair_margin_nats",
}
_USUAL = {
    "causal-lm": "loss",
    "seq2seq": "loss",
    "masked-lm": "loss",
    "regression": "rmse",
    "token-classification": "entity_f1",
    "embedding": "mrr",
    "multi-task": "mean_score",
    "speech-recognition": "wer",
}
_BY_REWARD_MODEL = {"reward", "reward_gain", "win_rate"}
_BY_TOKEN = {"loss", "perplexity", "loss_reduction", "masked_accuracy"}


@dataclass(frozen=True)
class Judged:
    """A version and what its evaluation found.

    Args:
        version: of the registered model.
        digest: of its model manifest.
        metrics: of the model that ships.
        judged_on: `test` (digest), `left_out` (digest of the ids that did not fit), `task`, `base_model`
            (fingerprint), `reward_model` (fingerprint), `answered`, `max_new_tokens`.
    """

    version: int
    digest: str
    metrics: Mapping[str, Any]
    judged_on: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The decision and its reason; `comparable` is None where there was nothing to compare with."""

    metric: str
    lower_is_better: bool
    candidate: float | None
    champion: float | None
    champion_version: int | None
    comparable: bool | None
    promote: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def default_metric(task: str, metrics: Mapping[str, Any]) -> str:
    """What models of a task are compared by when the pipeline file does not say.

    Args:
        task: of the model.
        metrics: what its evaluation has; preferences and rewards, where it has them, are what it is for.
    """
    for purpose in ("pair_accuracy", "reward"):
        if purpose in metrics:
            return purpose
    return _USUAL.get(task, "accuracy")


def compare(metric: str, new: Judged, present: Judged | None) -> Comparison:
    """Decide whether `new` becomes champion instead of `present`.

    Metrics of different test sets say nothing about which model is better: a corpus that grew has another
    test set, and a lower loss on it may be an easier month. Comparing them "with a warning" would let an
    unread warning decide what is in service. So such a model stays candidate, and the summary says that a
    person must promote it. The same bytes need no comparison.
    """
    lower = BETTER[metric] == "lower"
    value = _number(new.metrics.get(metric))

    def decide(promote: bool, why: str, comparable: bool | None, old: float | None = None) -> Comparison:
        version = present.version if present else None
        return Comparison(metric, lower, value, old, version, comparable, promote, why)

    if present is None:
        return decide(True, "there was no champion", None)
    if new.digest == present.digest:
        return decide(True, f"the same model as champion version {present.version}", None)
    differing = incomparable(metric, new.judged_on, present.judged_on)
    if differing:
        return decide(
            False,
            f"champion version {present.version} was judged on another {' and '.join(differing)}",
            False,
        )
    old = _number(present.metrics.get(metric))
    if value is None or old is None:
        who = "the new model" if value is None else f"champion version {present.version}"
        return decide(False, f"{who} has no number for {metric}", False, old)
    better = value <= old if lower else value >= old
    sign = "<=" if lower else ">="
    relation = "not worse" if better else "worse"
    why = f"{relation} than champion version {present.version}: {metric} {value:.6g}, needed {sign} {old:.6g}"
    return decide(better, why, True, old)


def incomparable(metric: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs between two evaluations so that this metric cannot be compared; empty when nothing does.

    A causal model's loss is for each token, so it needs one tokenizer, hence one base model; metrics of
    generated answers need the same examples answered at the same length.
    """
    keys = {"test": "test set", "left_out": "part of it", "task": "task"}
    if metric in _BY_REWARD_MODEL:
        keys["reward_model"] = "reward model"
    if metric in _BY_TOKEN:
        keys["base_model"] = "base model (its tokens are not the same)"
    if metric not in _OVER_ALL_EXAMPLES:
        keys |= {"answered": "number of answers", "max_new_tokens": "length of answers"}
    return [words for key, words in keys.items() if one.get(key) != other.get(key)]


def _number(value: Any) -> float | None:
    """A finite number, or None: NaN compares as neither better nor worse and must not pass for a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
