"""The commands of schedules: when a cluster starts a pipeline by itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from components.shared.errors import UsageError
from pipelines.commands.options import Json, Set, Spec

app = typer.Typer()


@app.command()
def schedule(
    spec: Annotated[
        str | None,
        typer.Argument(help="A pipeline; all of pipelines/ when absent, from their schedule: sections."),
    ] = None,
    cron: Annotated[
        str | None, typer.Option(help="minute hour day month weekday; the file's schedule: when absent.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what would change.")] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Make the cluster's schedules equal to what is in git; a second time changes nothing.

    No catch-up, one run at a time, one run for each slot.
    Example: tuneyard schedule sft_legal --cron "0 3 1 * *"
    """
    from components.shared.cron import faults_of
    from pipelines import spec as specs
    from pipelines.cluster import endpoint, schedules, submitting

    cluster = endpoint.require()
    if cron is not None and (spec is None or faults_of(cron)):
        faults = "; ".join(faults_of(cron)) or "it needs the name of one pipeline"
        raise UsageError(
            f"--cron {cron!r}: {faults}", 'for example: tuneyard schedule sft_legal --cron "0 3 1 * *"'
        )
    images = submitting.checked_images()
    schedules.committed()
    if spec is None:
        loaded = {name: specs.load(name) for name in specs.names()}
        changes = schedules.reconcile(loaded, cluster, images, dry_run)
    else:
        pipeline = specs.load(spec, set_ or [])
        when = cron or (pipeline.schedule.cron if pipeline.schedule else None)
        if when is None:
            raise UsageError(
                f"{spec} has no schedule: section",
                f'give the time: tuneyard schedule {spec} --cron "0 3 1 * *"',
            )
        source: schedules.Source = "command" if cron else "git"
        changes = [schedules.put(pipeline, when, source, cluster, images, dry_run)]
    _say(changes, as_json, dry_run)


@app.command()
def unschedule(spec: Spec, as_json: Json = False) -> None:
    """Stop the cluster from starting a pipeline by itself. A schedule: section brings it back."""
    from pipelines import spec as specs
    from pipelines.cluster import endpoint, schedules

    _say(schedules.remove(specs.load(spec).name, endpoint.require()), as_json, False)


@app.command()
def schedules(as_json: Json = False) -> None:
    """List the cluster's schedules, and what their last runs registered."""
    from pipelines.cluster import endpoint, submitting
    from pipelines.cluster import schedules as scheduling

    cluster, store = endpoint.require(), submitting.store_or_none()
    found = [
        {
            **scheduling.described(run),
            "enabled": run.mode == "ENABLE",
            "slots": scheduling.slots(cluster, run, store),
        }
        for run in scheduling.of(cluster)
    ]
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for each in found:
        typer.echo(
            f"{each['pipeline']}  {each['cron']}  {each['version']}  {'' if each['enabled'] else 'DISABLED'}"
        )
        for slot in each["slots"]:
            typer.echo(
                f"  {slot['scheduled_at']}  {slot['state']:10} {slot['registered'] or 'registered nothing'}"
            )


def _say(changes: list[Any], as_json: bool, dry_run: bool) -> None:
    if as_json:
        typer.echo(json.dumps([asdict(change) for change in changes], indent=1))
        return
    for change in changes:
        typer.echo(f"{change.pipeline}: {change.change}  {change.cron}  {change.version}")
    if not changes:
        typer.echo("no pipeline has a schedule")
    if dry_run:
        typer.echo("(dry run: nothing was changed)")
