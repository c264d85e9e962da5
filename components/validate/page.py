"""The report as one HTML file that needs nothing else: no network, no script, no font."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.shared import pages

_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_SHOWN_LABELS = 30


def render(result: Mapping[str, Any]) -> str:
    """The page of a report (see validate.report). All text of the corpus is escaped."""
    order = {"fail": 0, "warn": 1, "pass": 2}
    entries = sorted(
        ({**e, "status": status(e)} for e in result["expectations"]), key=lambda e: order[e["status"]]
    )
    for entry in entries:  # what the suite states is in its sentence; a setting's numbers are its sentence
        entry["stated"] = _stated(entry) if entry["source"] == "settings" else {}
    labels = list(result["labels"].items())
    return pages.template(_TEMPLATE).render(
        result=result,
        entries=entries,
        counts={name: sum(e["status"] == name for e in entries) for name in order},
        labels=labels[:_SHOWN_LABELS],
        more_labels=len(labels[_SHOWN_LABELS:]),
    )


def _stated(entry: Mapping[str, Any]) -> dict[str, Any]:
    columns = ("column", "column_A", "column_B", "column_list", "mostly")
    return {name: value for name, value in entry["kwargs"].items() if name not in columns}


def status(entry: Mapping[str, Any]) -> str:
    """`pass`, or the severity of an expectation that is not met."""
    return "pass" if entry["success"] else str(entry["severity"])
