"""How far predicted numbers are from true ones, and whether they order texts alike."""

from __future__ import annotations

from typing import Any

from components.evaluate import intervals


def score(truth: Any, predicted: Any) -> dict[str, Any]:
    """Metrics of one system, in the units of the data.

    Args:
        truth: [texts].
        predicted: [texts].

    Returns:
        `mae`, `rmse`, `r2` (1 - squared error / variance of the truth), `pearson` and `spearman` (None where
        one side is constant, as there is nothing to correlate), and `intervals`.
    """
    import numpy as np

    actual, said = np.asarray(truth, dtype=float), np.asarray(predicted, dtype=float)
    absolute, squared = np.abs(said - actual), (said - actual) ** 2
    spread = float(((actual - actual.mean()) ** 2).mean())
    return {
        "mae": float(absolute.mean()),
        "rmse": float(np.sqrt(squared.mean())),
        "r2": 1 - float(squared.mean()) / spread if spread else None,
        "pearson": pearson(actual, said),
        "spearman": pearson(ranks(actual), ranks(said)),
        "intervals": {
            "mae": intervals.of_mean(absolute),
            "rmse": [bound**0.5 for bound in intervals.of_mean(squared)],
        },
    }


def pearson(one: Any, other: Any) -> float | None:
    """Pearson's correlation of two [n]; None where one of them is constant."""
    import numpy as np

    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def ranks(values: Any) -> Any:
    """Rank of each value from 1; equal ones share the mean of their ranks."""
    import numpy as np

    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]
