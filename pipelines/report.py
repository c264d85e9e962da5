"""How a run went, gathered from the commits and the records that it left in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from components.shared import ledger
from components.shared.commit import commit_name
from components.shared.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, TuneyardError
from components.shared.store import Store
from pipelines.placement import SLICE
from pipelines.planner import why_needless

_STATUS = {EXIT_DONE: "done", EXIT_STOPPED: "stopped", EXIT_INTERRUPTED: "interrupted"}


@dataclass
class Report:
    """How a run went; `tuneyard submit --json` prints it."""

    run_id: str
    pipeline: str
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    status: str = "done"
    exit_code: int = EXIT_DONE
    seconds: float = 0.0
    stages: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    endpoint: str | None = None
    error: dict[str, Any] | None = None
    log: str = ""

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    def end(self, error: Mapping[str, Any]) -> None:
        """Note why the run ended: `what`, `todo`, `exit_code`, and the `stage` where it was one.

        The first reason stands; of what follows from it only the stage is added.
        """
        self.error = dict(error) | (self.error or {})
        self.exit_code = int(self.error["exit_code"])
        self.status = _STATUS.get(self.exit_code, "failed")


def gather(
    report: Report,
    stages: Sequence[str],
    done: Mapping[str, Mapping[str, Any]],
    store: Store,
    serving_url: str,
) -> None:
    """Fill in how each stage went, and why the run ended.

    Args:
        report: of a run whose processes have ended.
        stages: of its pipeline, in order.
        done: stage -> commit, of those that were done before.
        store: where the others left theirs.
        serving_url: of the model server.

    Raises:
        TuneyardError: the store does not answer, or the promotion ledger is broken; then the stages that were
            not looked up are in the report as `unknown`.
    """
    fault: dict[str, Any] | None = None
    before: Mapping[str, Any] | None = None
    try:
        for stage in stages:
            commit, record = done.get(stage), None
            if commit is None:
                record = store.read_json(f"runs/{report.run_id}/{stage}.json")
                if record is None and stage == "evaluate":
                    record = _unfinished_slice(report.run_id, store)
            if record and record["status"] == "running":
                record = _cut_off(record["stage"], report)
            elif record and "key" in record:
                commit = store.read_json(commit_name(stage, record["key"]))
            row = _row(stage, commit, record)
            if row["status"] == "not run" and (why := why_needless(stage, before)):
                row |= {"status": "not needed", "why": why}
            report.stages.append(row)
            before = commit
            fault = fault or _fault(stage, commit, record)
            if commit:
                _take(report, stage, commit, store, serving_url)
    finally:
        for stage in stages[len(report.stages) :]:
            unknown = None if stage in done else {"status": "unknown"}
            report.stages.append(_row(stage, done.get(stage), unknown))
        if fault:
            report.end(fault)


def _unfinished_slice(run: str, store: Store) -> dict[str, Any] | None:
    """The record of a slice that did not end well, where evaluate did not begin for that; else None."""
    records = [store.read_json(name) or {} for name in store.names(f"runs/{run}/{SLICE}-")]
    ended = sorted(
        (r for r in records if r.get("status") not in (None, "done")), key=lambda r: r["status"] == "running"
    )
    return ended[0] if ended else None


def _cut_off(stage: str, report: Report) -> dict[str, Any]:
    """The record of a stage that has not written how it ended: it was killed, or is just about to end."""
    if report.exit_code == EXIT_INTERRUPTED:
        return {"status": "interrupted", "error": report.error}
    goes_on = ": it goes on from its last checkpoint" if stage == "train" else ""
    error = {
        "what": f"{stage} was killed (out of memory?) or could not record how it ended",
        "todo": f"see the end of {report.log}; submit again{goes_on}",
        "exit_code": EXIT_FAILED,
    }
    return {"status": "failed", "error": error}


def _row(stage: str, commit: Mapping[str, Any] | None, record: Mapping[str, Any] | None) -> dict[str, Any]:
    """A stage as the report shows it. One that was done before has a commit and no record."""
    status = "not run"
    if record:
        status = record["status"]
    elif commit:
        status = "stopped" if commit["stop"] else "done"
    cached = bool(record.get("cached") if record else commit)
    row = {
        "name": stage,
        "status": status,
        "seconds": record.get("seconds", 0.0) if record else 0.0,
        "cached": cached,
        "key": commit["key"] if commit else None,
        "outputs": dict(commit["outputs"]) if commit else {},
    }
    if commit and not cached:
        row |= {name: commit[name] for name in ("arithmetic_seconds", "peak_memory_gib")}
    return row


def _fault(
    stage: str, commit: Mapping[str, Any] | None, record: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    if record and "error" in record:
        return record["error"] | {"stage": stage}
    if commit and commit["stop"]:
        why = {"what": commit["stop"], "todo": commit["stop_todo"], "exit_code": EXIT_STOPPED}
        return why | {"stage": stage}
    return None


def _take(report: Report, stage: str, commit: Mapping[str, Any], store: Store, serving_url: str) -> None:
    summary = commit["summary"]
    if stage == "evaluate":
        report.metrics = summary["metrics"]
        report.verdict = summary["verdict"]
    elif stage == "register":
        # The ledger and MLflow's aliases agree, and reading the ledger costs no import of MLflow (2.5 s).
        aliases = ledger.aliases(ledger.read(summary["name"], store))
        report.model = {
            "name": summary["name"],
            "version": int(summary["version"]),
            "aliases": sorted(a for a, version in aliases.items() if version == int(summary["version"])),
            "uri": summary["manifest"],
            "sha256": summary["digest"],
        }
    elif stage == "deploy" and not commit["stop"]:
        report.endpoint = serving_url


def explain(report: Report) -> str:
    """Why a run did not end well, for a person."""
    if not report.error:
        return ""
    error = TuneyardError(report.error["what"], report.error["todo"])
    stage = report.error.get("stage")
    return f"{stage}: {error}" if stage and not error.what.startswith(f"{stage} ") else str(error)
