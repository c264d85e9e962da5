"""Counts for the bars of the report: lengths of texts and sizes of labels."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Fixed edges, 1-2-5 per decade: pages of two months can be laid side by side.
_EDGES = [0, 1, *(step * 10**power for power in range(6) for step in (2, 5, 10))]


def lengths(table: pd.DataFrame, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per column that holds text: min, median, p95, max in characters, and bins {low, high, count}."""
    found = {}
    for name in names:
        sizes = sorted(len(value) for value in table[name] if isinstance(value, str))
        if sizes:
            quantile = {key: sizes[min(len(sizes) - 1, int(q * len(sizes)))] for key, q in _QUANTILES.items()}
            found[name] = {"count": len(sizes), **quantile, "bins": _bins(sizes)}
    return found


_QUANTILES = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}


def _bins(sizes: list[int]) -> list[dict[str, int]]:
    first, last = (bisect_right(_EDGES, size) - 1 for size in (sizes[0], sizes[-1]))
    counts = [0] * (last + 1)
    for size in sizes:
        counts[bisect_right(_EDGES, size) - 1] += 1
    highs = [*(edge - 1 for edge in _EDGES[1:]), sizes[-1]]
    return [{"low": _EDGES[at], "high": highs[at], "count": counts[at]} for at in range(first, last + 1)]


def labels(table: pd.DataFrame) -> dict[str, int]:
    """Label -> how many examples, the commonest first; empty where there is no label."""
    if "label" not in table:
        return {}
    counts = table["label"].dropna().astype(str).value_counts()
    return {name: int(counts[name]) for name in sorted(counts.index, key=lambda name: (-counts[name], name))}
