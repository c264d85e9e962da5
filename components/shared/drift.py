"""How far what a model is asked in service lies from what it was trained on: the population stability index.

PSI = sum over bins of (live - trained) * ln(live / trained): the Kullback-Leibler divergence both ways, 0 for
equal shares. Usual reading: below 0.1 alike, above 0.25 another population (Siddiqi, Credit Risk Scorecards,
2006). With nothing changed it is (bins - 1) * (1 / live + 1 / trained) in the mean (Yurdakul and Naranjo,
Statistical Properties of the Population Stability Index, J. Risk Model Validation 14(4), 2020): 0.045 for ten
bins, ENOUGH live requests and many examples.

What is kept of a request is the number of its bin.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

BINS = 10
# Live requests that are looked at, and how many there must be before anything is said.
WINDOW = 1000
ENOUGH = 200

PROMPT_TOKENS = "prompt_tokens"
LABELS = "labels"


class Reference(BaseModel):
    """What a model was trained on.

    Args:
        token_edges: ascending; bin i holds counts up to edge i, one more bin those above the last.
        token_shares: of the train examples by bin; each above 0, together 1.
        label_shares: of the train examples by label, together 1; empty for a causal model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    token_edges: list[int]
    token_shares: list[float]
    label_shares: dict[str, float] = {}


def reference(token_counts: Sequence[int], labels: Sequence[str] = ()) -> Reference:
    """The reference of a training.

    Args:
        token_counts: tokens of the prompt (of the text, for a classifier) of every train example.
        labels: of every train example; none for a causal model.
    """
    ordered = sorted(token_counts)
    # Deciles. Equal ones are one edge, and the largest count is none: the bin above it would be empty.
    ranks = [len(ordered) * i // BINS for i in range(1, BINS)]
    edges = sorted({ordered[rank - 1] for rank in ranks if rank} - {ordered[-1]})
    counts = Counter(bisect_left(edges, count) for count in ordered)
    return Reference(
        token_edges=edges,
        token_shares=[counts[i] / len(ordered) for i in range(len(edges) + 1)],
        label_shares={label: n / len(labels) for label, n in sorted(Counter(labels).items())},
    )


def of_training(encoded: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> Reference:
    """The reference of a training, from its examples.

    Args:
        encoded: the train examples as token ids, with a `prompt` where an answer follows.
        rows: the same examples; a `label` that is a name is a classifier's.
    """
    asked = [len(getattr(example, "prompt", example)) for example in encoded]
    return reference(asked, [row["label"] for row in rows if isinstance(row.get("label"), str)])


def stability_index(trained: Sequence[float], live: Sequence[int]) -> float:
    """The PSI of live counts against shares of the training, bin by bin.

    Half an observation is added to each live bin, since the logarithm of an empty one is infinite.

    Args:
        trained: shares, each above 0.
        live: counts.
    """
    total = sum(live) + 0.5 * len(live)
    shares = [(count + 0.5) / total for count in live]
    return sum((now - then) * math.log(now / then) for now, then in zip(shares, trained, strict=True))


class Window:
    """The last requests that a model answered, by bin.

    Args:
        trained: the model's reference; None (a model of before there was one): nothing is kept.
    """

    def __init__(self, trained: Reference | None) -> None:
        self._trained = trained
        self._lock = threading.Lock()
        self._tokens: deque[int] = deque(maxlen=WINDOW)
        self._labels: deque[str] = deque(maxlen=WINDOW)

    def observe(self, token_counts: Sequence[int], labels: Sequence[str] = ()) -> None:
        """Note what was asked: tokens of each prompt or text, and the labels it was given."""
        if self._trained is None:
            return
        with self._lock:
            self._tokens.extend(bisect_left(self._trained.token_edges, count) for count in token_counts)
            self._labels.extend(labels)

    def readings(self) -> Mapping[str, float]:
        """PSI by signal; none before ENOUGH requests, or where there is one bin only."""
        if self._trained is None:
            return {}
        with self._lock:
            tokens, labels = Counter(self._tokens), Counter(self._labels)
        found = {}
        shares = self._trained.token_shares
        if tokens.total() >= ENOUGH and len(shares) > 1:
            found[PROMPT_TOKENS] = stability_index(shares, [tokens[i] for i in range(len(shares))])
        by_label = self._trained.label_shares
        if labels.total() >= ENOUGH and len(by_label) > 1:
            found[LABELS] = stability_index(list(by_label.values()), [labels[name] for name in by_label])
        return found
