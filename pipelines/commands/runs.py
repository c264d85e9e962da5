"""The commands of runs: list, watch, end, repeat and compare them."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pipelines.commands.lines import finish
from pipelines.commands.options import Json, nearest_store

app = typer.Typer()
group = typer.Typer(
    help="List runs; or attach, terminate, retry, compare them (`tuneyard runs --help`).",
    invoke_without_command=True,
)
app.add_typer(group, name="runs")

Run = Annotated[str, typer.Argument(help="Id of a run, as `tuneyard runs` lists it.")]


@group.callback()
def runs(
    context: typer.Context,
    limit: Annotated[int, typer.Option(help="How many, newest first.")] = 20,
    as_json: Json = False,
) -> None:
    """List runs: the cluster's where TUNEYARD_KFP_ENDPOINT is set, else those that this machine has ended."""
    if context.invoked_subcommand:
        return
    from pipelines.cluster import endpoint, listing

    cluster = endpoint.configured()
    newest = listing.runs(cluster, limit) if cluster else _ended(limit)
    if as_json:
        typer.echo(json.dumps(newest, indent=1, ensure_ascii=False))
        return
    for run in newest:
        model = f"{run['model']['name']} v{run['model']['version']}" if run.get("model") else ""
        typer.echo(
            f"{run['run_id']:44} {run['status']:11} {run['seconds']:8.1f} s  {model or run['pipeline']}"
        )


def _ended(limit: int) -> list[dict[str, Any]]:
    store = nearest_store()
    names = [name for name in store.names("runs/") if name.endswith("/run.json")]
    found = [document for name in names if (document := store.read_json(name))]
    return sorted(found, key=lambda run: str(run.get("started", "")), reverse=True)[:limit]


@group.command()
def attach(run: Run, as_json: Json = False) -> None:
    """Watch a run of the cluster to its end, whoever started it. Ctrl-C leaves the run alone."""
    from pipelines.cluster import endpoint, submitting

    finish(submitting.attach(run, endpoint.require()), as_json)


@group.command()
def terminate(run: Run) -> None:
    """End a run of the cluster. What its finished stages did stays, and is not repeated."""
    from pipelines.cluster import endpoint

    endpoint.require().call("Run", "run_service_terminate_run", run)
    typer.echo(f"{run}: asked to end")


@group.command()
def retry(run: Run, as_json: Json = False) -> None:
    """Go on with a failed run of the cluster, from the stage that failed, and watch it."""
    from pipelines.cluster import endpoint, submitting

    cluster = endpoint.require()
    cluster.call("Run", "run_service_retry_run", run)
    finish(submitting.attach(run, cluster), as_json)


@group.command()
def compare(
    first: Run,
    second: Annotated[str, typer.Argument(help="Id of another run.")],
    as_json: Json = False,
) -> None:
    """Put two finished runs side by side: settings, inputs and code that differ, metrics, seconds."""
    from pipelines import compare as comparing

    found = comparing.compare(first, second, nearest_store())
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for part in ("settings", "inputs", "metrics", "seconds"):
        table = Table(title=part if found[part] else f"{part}: no difference")
        table.add_column("")
        for run in found["runs"]:
            table.add_column(run)
        for name, pair in found[part].items():
            table.add_row(name, *[f"{v:.4g}" if isinstance(v, float) else str(v)[:60] for v in pair])
        console.print(table)
    console.print(f"code differs in: {', '.join(found['code']) or 'no stage'}")
