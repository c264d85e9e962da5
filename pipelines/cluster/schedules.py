"""Schedules: the endpoint's recurring runs are made equal to what is in git.

KFP cannot change a recurring run, and an upgrade leaves the old specification in place (kubeflow/pipelines
#11296). So each differs from what is wanted or does not; where it does, a new one is made and then the old
one is removed. In between both may fire: a slot has one run all the same (components/shared/slots.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from components.shared import slots as slots_of_runs
from components.shared.errors import UsageError
from components.shared.store import Store
from pipelines.cluster import versions
from pipelines.cluster.endpoint import Endpoint
from pipelines.cluster.submitting import compiled
from pipelines.images.lock import Image
from pipelines.schedule import for_kfp
from pipelines.spec import PipelineSpec

Source = Literal["git", "command"]
_PREFIX = "tuneyard-"


@dataclass(frozen=True)
class Scheduled:
    """What became of one pipeline's schedule.

    Args:
        pipeline: its name.
        cron: five fields; '' when it was removed.
        version: name of the pipeline's version; '' when it was removed.
        change: `created`, `changed`, `unchanged` or `removed`.
    """

    pipeline: str
    cron: str
    version: str
    change: Literal["created", "changed", "unchanged", "removed"]


def committed() -> str:
    """The commit that is scheduled.

    Raises:
        UsageError: the tree differs from it, so nobody could say later what ran.
    """
    commit = versions.git_commit()
    if commit.endswith("-dirty"):
        raise UsageError(
            f"the tree differs from commit {commit.removesuffix('-dirty')}",
            "a schedule runs for months: commit first (docker/images.json too), then schedule",
        )
    return commit


def put(
    spec: PipelineSpec, cron: str, source: Source, endpoint: Endpoint, images: Mapping[str, Image], dry: bool
) -> Scheduled:
    """Make the endpoint start a pipeline at these times, and at no others.

    Args:
        spec: the pipeline.
        cron: five fields.
        source: whether the time stands in the pipeline file or came with the command.
        endpoint: where.
        images: the locked images.
        dry: only say what would change.

    Returns:
        What changed.
    """
    content = versions.Content(spec.name, list(spec.stages()), {})
    with compiled(spec, images, content.keys) as package:
        wanted = _wanted(spec, cron, source, versions.name_of(package), endpoint.zone)
        present = of(endpoint, spec.name)
        same = [run for run in present if _facts(run) == _facts(wanted)]
        change: Literal["created", "changed", "unchanged"] = "changed" if present else "created"
        if len(same) == 1 == len(present):
            change = "unchanged"
        elif not dry:
            if not same:
                wanted.pipeline_version_reference = versions.upload(endpoint, content, package).reference()
                wanted.experiment_id = versions.experiment(endpoint, spec.name)
                endpoint.call("RecurringRun", "recurring_run_service_create_recurring_run", wanted)
            for run in present:
                if run not in same[:1]:
                    _remove(run, endpoint)
    return Scheduled(spec.name, cron, described(wanted)["version"], change)


def _wanted(spec: PipelineSpec, cron: str, source: Source, version: str, zone: str) -> Any:
    """The recurring run that should be there, but for the ids that an upload gives."""
    import kfp_server_api as api

    facts = {"pipeline": spec.name, "cron": cron, "source": source, "version": version}
    return api.V2beta1RecurringRun(
        display_name=_PREFIX + versions.display_name(spec.name),
        description=json.dumps(facts),
        runtime_config=api.V2beta1RuntimeConfig(parameters={"slot": slots_of_runs.asked(zone, cron)}),
        service_account=spec.hardware.service_account,
        max_concurrency="1",
        no_catchup=True,
        trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=for_kfp(cron))),
        mode=api.RecurringRunMode.ENABLE,
    )


def _facts(run: Any) -> list[Any]:
    """What decides when a recurring run starts what, as whom."""
    trigger = run.trigger
    return [
        described(run),
        trigger.cron_schedule.cron if trigger and trigger.cron_schedule else None,
        (run.runtime_config.parameters or {}) if run.runtime_config else {},
        run.service_account,
        str(run.max_concurrency),
        bool(run.no_catchup),
        run.mode,
    ]


def of(endpoint: Endpoint, pipeline: str | None = None) -> list[Any]:
    """The recurring runs that Tuneyard made, of one pipeline or of all."""
    scope = {"namespace": endpoint.namespace} if endpoint.namespace else {}
    method = "recurring_run_service_list_recurring_runs"
    found = endpoint.every("RecurringRun", method, "recurring_runs", **scope)
    ours = [run for run in found if (run.display_name or "").startswith(_PREFIX) and described(run)]
    return [run for run in ours if pipeline in (None, described(run)["pipeline"])]


def described(run: Any) -> dict[str, Any]:
    """What `put` wrote into a recurring run's description; {} when somebody else made it."""
    try:
        facts = json.loads(run.description)
        return facts if {"pipeline", "cron", "source", "version"} <= set(facts) else {}
    except (ValueError, TypeError):
        return {}


def remove(pipeline: str, endpoint: Endpoint) -> list[Scheduled]:
    """Remove what starts a pipeline by itself. Returns what was removed."""
    present = of(endpoint, pipeline)
    for run in present:
        _remove(run, endpoint)
    return [Scheduled(pipeline, "", "", "removed") for _ in present[:1]]


def _remove(run: Any, endpoint: Endpoint) -> None:
    endpoint.call("RecurringRun", "recurring_run_service_delete_recurring_run", run.recurring_run_id)


def reconcile(
    specs: Mapping[str, PipelineSpec], endpoint: Endpoint, images: Mapping[str, Image], dry: bool
) -> list[Scheduled]:
    """Make the endpoint's schedules equal to the `schedule:` sections of the pipeline files.

    One that came with a command stays, unless its pipeline's file has a time of its own.

    Args:
        specs: every pipeline of the tree, by name.
        endpoint: where.
        images: the locked images.
        dry: only say what would change.
    """
    changes = []
    for spec in specs.values():
        if spec.schedule is not None:
            changes.append(put(spec, spec.schedule.cron, "git", endpoint, images, dry))
    wanted = {change.pipeline for change in changes}
    for run in of(endpoint):
        facts = described(run)
        if facts["source"] == "git" and facts["pipeline"] not in wanted:
            if not dry:
                _remove(run, endpoint)
            changes.append(Scheduled(facts["pipeline"], "", "", "removed"))
    return changes


def slots(
    endpoint: Endpoint, recurring_run: Any, store: Store | None, limit: int = 5
) -> list[dict[str, Any]]:
    """The last runs of a schedule, newest first: when, how they ended, and which version they registered.

    `registered` is None when a run registered nothing (or nobody knows, without a store).
    """
    runs = endpoint.call(
        "Run",
        "run_service_list_runs",
        experiment_id=recurring_run.experiment_id,
        sort_by="created_at desc",
        page_size=100,
    ).runs
    own = [run for run in runs or [] if run.recurring_run_id == recurring_run.recurring_run_id][:limit]
    return [
        {
            "run_id": run.run_id,
            "scheduled_at": run.scheduled_at.isoformat() if run.scheduled_at else None,
            "state": str(run.state),
            "registered": _registered(run.run_id, store),
        }
        for run in own
    ]


def _registered(run_id: str, store: Store | None) -> str | None:
    record = store.read_json(f"runs/{run_id}/register.json") if store else None
    if store is None or not record or record.get("cached") or "key" not in record:
        return None
    commit = store.read_json(f"stages/register/{record['key']}.json")
    return f"{commit['summary']['name']}/{commit['summary']['version']}" if commit else None
