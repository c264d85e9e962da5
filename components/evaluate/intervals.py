"""95% bootstrap intervals: how far a metric would move with another draw of the same many test examples.

Percentile bootstrap (Efron, "Bootstrap methods: another look at the jackknife", 1979) with a fixed seed, so
that equal results have equal intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

DRAWS = 1000
_SEED = 20240229


def draws(count: int) -> Iterator[Any]:
    """Index arrays [count], drawn with replacement; the same ones for each call with this count."""
    import numpy as np

    generator = np.random.default_rng(_SEED)
    for _ in range(DRAWS):
        yield generator.integers(count, size=count)


def interval(count: int, statistic: Callable[[Any], float]) -> list[float]:
    """The middle 95% of a statistic over the draws.

    Args:
        count: how many examples there are.
        statistic: from an index array to a number.
    """
    import numpy as np

    values = [statistic(indices) for indices in draws(count)]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def of_mean(values: Sequence[float]) -> list[float]:
    """Interval of a mean over examples."""
    import numpy as np

    array = np.asarray(values, dtype=float)
    return interval(len(array), lambda drawn: float(array[drawn].mean()))


def of_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Interval of a ratio of sums, such as nats per token; an example's two numbers stay together."""
    import numpy as np

    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    return interval(len(above), lambda drawn: float(above[drawn].sum() / below[drawn].sum()))


def of_reduction(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """Interval of 1 - sum(after) / sum(before), paired by example."""
    low, high = of_ratio(after, before)
    return [1 - high, 1 - low]
