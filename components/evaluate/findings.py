"""What an evaluation found, the same shape for every task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Numbers that compare two systems: they need no prefix to say whose they are.
_COMPARISONS = ("loss_reduction", "rouge_l_gain", "reward_gain", "win_rate", "kl_nats")
_SHORT = {"tfidf_logreg": "tfidf"}


@dataclass
class Findings:
    """Systems side by side.

    Args:
        systems: name -> `about` (one sentence), metrics by name (a number, or None where it could not be
            measured), `intervals` (metric -> [low, high]) and tables (`per_class`, `confusion`).
        ships: name of the system that will ship: the gates judge this one.
        answers: one row for each test example that was answered.
        facts: conditions under which the numbers hold (precision, limits, truncated inputs).
    """

    systems: dict[str, dict[str, Any]]
    ships: str
    answers: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)


def numbers(system: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a system that could be measured."""
    plain = {k: float(v) for k, v in system.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {k: v for k, v in plain.items() if math.isfinite(v)}


def flat(findings: Findings) -> dict[str, float]:
    """All metrics as `<system>_<metric>`, for the run's record, the KFP page and MLflow."""
    found: dict[str, float] = {}
    for name, system in findings.systems.items():
        for metric, value in numbers(system).items():
            found[metric if metric in _COMPARISONS else f"{_SHORT.get(name, name)}_{metric}"] = value
    return found
