"""Gates: bounds that a model's metrics must keep, and the verdict over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from components.evaluate.config import Bound, metrics_of
from components.shared.errors import TuneyardError


def refuse_unknown(gates: Mapping[str, Bound], task: str, dataset_type: str) -> None:
    """Check, before any work, that each gate is on a metric of this task.

    Raises:
        TuneyardError: some are not; lists the metrics there are.
    """
    known = metrics_of(task, dataset_type)
    unknown = sorted(set(gates) - set(known))
    if unknown:
        raise TuneyardError(
            f"evaluate.gates: {', '.join(unknown)} cannot be measured on a {task} model",
            f"its metrics on {dataset_type} data are {', '.join(known)}",
        )


def verdict(gates: Mapping[str, Bound], system: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Hold the metrics of the model that will ship against the gates.

    Args:
        gates: metric -> bounds.
        system: which system is judged, for the record.
        metrics: its metrics; absent, None and NaN all mean that it could not be measured.

    Returns:
        `passed`, `system` and `gates`: for each metric, value (None when not measured), min, max, passed. A
        metric that could not be measured fails: a gate that nobody can check protects from nothing.
    """
    rows = []
    for name, bound in gates.items():
        found = metrics.get(name)
        value = float(found) if found is not None and math.isfinite(found) else None
        above = value is not None and (bound.min is None or value >= bound.min)
        below = value is not None and (bound.max is None or value <= bound.max)
        row = {"metric": name, "value": value, "min": bound.min, "max": bound.max}
        rows.append({**row, "passed": above and below})
    return {"passed": all(row["passed"] for row in rows), "system": system, "gates": rows}


def _bounds(row: Mapping[str, Any]) -> str:
    return " and ".join(f"{name} {row[name]:g}" for name in ("min", "max") if row[name] is not None)


def stop_line(verdict: Mapping[str, Any]) -> str:
    """One line with every failed gate, what was observed and its bound; empty when all passed."""
    failed: Sequence[Mapping[str, Any]] = [row for row in verdict["gates"] if not row["passed"]]
    shown = [
        f"{row['metric']}: {'could not be measured' if row['value'] is None else format(row['value'], '.4g')}"
        f" ({_bounds(row)})"
        for row in failed
    ]
    return f"{len(failed)} of {len(verdict['gates'])} gates failed: {'; '.join(shown)}" if failed else ""
