"""Settings of the validate stage."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from components.shared.settings import Settings
from components.validate import catalogue

TOTAL = "total"
# A file that breaks off counts as one row read, whatever it lost; so none is forgiven unless stated.
DEFAULTS = {TOTAL: 0.01, "torn_file": 0.0}


class ValidateConfig(Settings):
    """Which expectations the examples must meet besides the suite of their dataset type.

    Args:
        expectations: Great Expectations, each `{type: expect_column_..., column: ..., ...}`. One with the
            type and column of an expectation of the suite takes its place; `severity: warning` reports
            without stopping the line.
        budget: reason code -> largest fraction (0-1) of the rows read that ingest may have put in
            quarantine for it; `total` bounds them all together. What is not stated keeps its default.
    """

    expectations: list[dict[str, Any]] = Field(default_factory=list)
    budget: dict[str, float] = Field(default_factory=lambda: dict(DEFAULTS))

    @field_validator("expectations")
    @classmethod
    def _known(cls, expectations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        faults = [f"[{at}] {fault}" for at, one in enumerate(expectations) for fault in catalogue.faults(one)]
        if faults:
            raise ValueError("; ".join(faults))
        return expectations

    @field_validator("budget")
    @classmethod
    def _fractions(cls, budget: dict[str, float]) -> dict[str, float]:
        budget = {**DEFAULTS, **budget}
        wrong = {reason: value for reason, value in budget.items() if not 0 <= value <= 1}
        faults = [f"{reason} is {value}, not a fraction from 0 to 1" for reason, value in wrong.items()]
        faults += [
            f"{reason} may take {value}, but total ends at {budget[TOTAL]}: raise total too"
            for reason, value in budget.items()
            if value > budget[TOTAL]
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return budget
