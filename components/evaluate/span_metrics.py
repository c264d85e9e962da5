"""Entities found and missed: an entity counts when both its ends and its label are right.

As the CoNLL-2003 shared task counts (Tjong Kim Sang and De Meulder 2003, section 3.1), by characters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from components.evaluate import intervals
from components.shared.tagging import Span


def score(truth: Sequence[Sequence[Span]], found: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """Metrics of one system.

    Args:
        truth: entities of each text.
        found: those that the system gave.

    Returns:
        `entity_precision`, `entity_recall`, `entity_f1` over all entities, `macro_entity_f1` (the mean over
        the labels that occur in truth or answers), `per_class` and `intervals`. No entity at all on both
        sides scores 0: nothing was shown.
    """
    import numpy as np

    right, given, wanted = Counter[str](), Counter[str](), Counter[str]()
    by_text = []
    for actual, said in zip(truth, found, strict=True):
        hits = set(actual) & set(said)
        right.update(span.label for span in hits)
        given.update(span.label for span in set(said))
        wanted.update(span.label for span in set(actual))
        by_text.append((len(hits), len(set(said)), len(set(actual))))
    labels = sorted(given | wanted)
    counts = np.array(by_text)
    rows = [
        {
            "label": label,
            **_rates(right[label], given[label], wanted[label]),
            "auc": None,
            "count": wanted[label],
        }
        for label in labels
    ]
    overall = _rates(*(int(total) for total in counts.sum(0)))

    def f1(drawn: Any) -> float:
        return _rates(*(int(total) for total in counts[drawn].sum(0)))["f1"]

    return {
        **{f"entity_{name}": value for name, value in overall.items()},
        "macro_entity_f1": float(np.mean([row["f1"] for row in rows])) if rows else 0.0,
        "per_class": rows,
        "intervals": {"entity_f1": intervals.interval(len(counts), f1)},
    }


def _rates(right: int, given: int, wanted: int) -> dict[str, float]:
    return {
        "precision": right / given if given else 0.0,
        "recall": right / wanted if wanted else 0.0,
        "f1": 2 * right / (given + wanted) if given + wanted else 0.0,
    }
