"""The runs that an endpoint has of us, watched or not."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from components.shared.errors import UsageError
from pipelines.cluster import versions
from pipelines.cluster.endpoint import Endpoint

# KFP's states in the words of a report.
STATUS = {
    "SUCCEEDED": "done",
    "FAILED": "failed",
    "CANCELED": "interrupted",
    "SKIPPED": "not needed",
    "RUNNING": "running",
    "PENDING": "pending",
}
_PAGE = 100


def runs(endpoint: Endpoint, limit: int) -> list[dict[str, Any]]:
    """The newest runs of pipelines that Tuneyard uploaded, running ones too.

    Returns:
        `run_id`, `pipeline`, `status`, `started`, `seconds` (so far) and `slot` (None for none) of each.
    """
    scope = {"namespace": endpoint.namespace} if endpoint.namespace else {}
    newest = {"sort_by": "created_at desc", "page_size": _PAGE}
    answer = endpoint.call("Run", "run_service_list_runs", **newest, **scope)
    known: dict[str, str | None] = {}
    found: list[dict[str, Any]] = []
    for run in answer.runs or []:
        version = run.pipeline_version_reference
        if version is None or len(found) == limit:
            continue
        if version.pipeline_version_id not in known:
            known[version.pipeline_version_id] = _pipeline(endpoint, run)
        pipeline = known[version.pipeline_version_id]
        if pipeline:
            found.append(_row(run, pipeline))
    return found


def _pipeline(endpoint: Endpoint, run: Any) -> str | None:
    try:
        return versions.content_of(endpoint, run).pipeline
    except UsageError:
        return None


def _row(run: Any, pipeline: str) -> dict[str, Any]:
    ended = run.finished_at if run.finished_at and run.finished_at.year > 1970 else datetime.now(UTC)
    return {
        "run_id": run.run_id,
        "pipeline": pipeline,
        "status": STATUS.get(str(run.state), str(run.state).lower()),
        "started": run.created_at.isoformat(timespec="seconds"),
        "seconds": round((ended - run.created_at).total_seconds(), 1),
        "slot": run.scheduled_at.isoformat() if run.recurring_run_id and run.scheduled_at else None,
    }
