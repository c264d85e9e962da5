"""The account of ingest: every row read was kept or put in quarantine, and quarantine keeps its budget."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.shared import jsonl
from components.shared.errors import TuneyardError
from components.validate import columns
from components.validate.config import DEFAULTS, TOTAL

log = logging.getLogger("tuneyard.validate")

_SHOWN_ROWS = 3


def account(folder: Path, kept: int, budget: Mapping[str, float]) -> dict[str, Any]:
    """Read the quarantine and hold it against its budget.

    Args:
        folder: with quarantine.jsonl and summary.json of ingest.
        kept: how many examples there are.
        budget: reason or `total` -> largest fraction of the rows read.

    Returns:
        read, kept, quarantined, fraction, `reasons` (by falling count: reason, count, fraction, budget or
        None, over, rows), `total_budget` and `over_total`.

    Raises:
        TuneyardError: the numbers do not add up: a row was lost or counted twice.
    """
    summary = json.loads((folder / "summary.json").read_text())
    rows = list(jsonl.read(folder / "quarantine.jsonl"))
    counts = Counter(str(row["reason"]) for row in rows)
    _must_add_up(summary, kept, counts)
    unknown = sorted(set(budget) - set(counts) - set(DEFAULTS))
    if unknown:
        log.info("budget: no row was quarantined for %s (reasons that occurred: %s)", unknown, sorted(counts))
    read = summary["read"]
    return {
        "read": read,
        "kept": kept,
        "quarantined": len(rows),
        "fraction": _fraction(len(rows), read),
        "total_budget": budget[TOTAL],
        "over_total": _fraction(len(rows), read) > budget[TOTAL],
        "reasons": [
            {
                "reason": reason,
                "count": count,
                "fraction": _fraction(count, read),
                "budget": budget.get(reason),
                "over": reason in budget and _fraction(count, read) > budget[reason],
                "rows": [_shown(row) for row in rows if row["reason"] == reason][:_SHOWN_ROWS],
            }
            for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ],
    }


def faults(found: Mapping[str, Any]) -> list[str]:
    """What of an account is over budget, one sentence each with its numbers and rows."""
    over = [
        f"quarantine budget {reason['reason']}: {_share(reason['count'], found['read'])}, "
        f"over {reason['budget']:.2%}" + _rows([reason])
        for reason in found["reasons"]
        if reason["over"]
    ]
    if found["over_total"]:
        over.append(
            f"quarantine budget total: {_share(found['quarantined'], found['read'])}, "
            f"over {found['total_budget']:.2%}" + _rows(found["reasons"])
        )
    return over


def _must_add_up(summary: Mapping[str, Any], kept: int, counts: Counter[str]) -> None:
    there = counts.total()
    faults = []
    if summary["read"] != kept + there:
        faults.append(f"{summary['read']} read, but {kept} examples + {there} quarantined = {kept + there}")
    if (summary["kept"], summary["quarantined"]) != (kept, there):
        faults.append(
            f"the summary says {summary['kept']} kept and {summary['quarantined']} quarantined, "
            f"the files hold {kept} and {there}"
        )
    if dict(summary["by_reason"]) != dict(counts):
        faults.append(f"the summary says {dict(summary['by_reason'])} by reason, the rows {dict(counts)}")
    if faults:
        raise TuneyardError(
            "rows of ingest do not add up: " + "; ".join(faults),
            "rows were lost or counted twice; submit again, and if it stays so, ingest has a defect",
        )


def _fraction(count: int, read: int) -> float:
    return count / read if read else 0.0


def _share(count: int, read: int) -> str:
    return f"{count} of {read} rows read ({_fraction(count, read):.2%})"


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "origin": columns.origin(row),
        "field": str(row.get("field") or ""),
        "detail": str(row.get("detail", "")),
    }


def _rows(reasons: list[dict[str, Any]]) -> str:
    lines = [
        f"\n       {row['origin']} {reason['reason']} {row['field']} {row['detail']}".rstrip()
        for reason in reasons
        for row in reason["rows"]
    ]
    return "".join(lines[:_SHOWN_ROWS])
