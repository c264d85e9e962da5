"""The commands around a pipeline and its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from components.shared.errors import TuneyardError, UsageError
from pipelines.commands.options import Json, Set, Spec, connect

app = typer.Typer()


@app.command()
def submit(
    spec: Spec,
    target: Annotated[
        str, typer.Option(help="`local`: this machine. A cluster cannot be submitted to yet.")
    ] = "local",
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Run a pipeline: corpus in, registered and served model out. What is done already is not repeated.

    Example: tuneyard submit sft_legal --set train.learning_rate=1e-4
    """
    from pipelines import report as reporting
    from pipelines import submit as submitting

    if target != "local":
        todo = "leave it out; `tuneyard compile` writes what Kubeflow Pipelines takes"
        raise UsageError(f"--target {target}: only `local` can be submitted to", todo)
    submitting.interruptible()
    try:
        report = submitting.run_local(spec, set_ or [])
    except TuneyardError as error:
        if as_json:
            report = reporting.Report(run_id="", pipeline=spec)
            report.end(error.facts())
            typer.echo(report.to_json())
        raise
    if as_json:
        typer.echo(report.to_json())
    else:
        _show_run(report)
    if report.exit_code:
        typer.echo(reporting.explain(report), err=True)
    raise typer.Exit(report.exit_code)


def _show_run(report: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("stage", "status", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for stage in report.stages:
        seconds = "unchanged" if stage["cached"] else f"{stage['seconds']:.1f}"
        table.add_row(stage["name"], stage["status"], seconds)
    console = Console()
    console.print(f"\n{report.run_id}: {report.status} in {report.seconds:.0f} s")
    if report.stages:
        console.print(table)
    if report.metrics:
        metrics = Table()
        systems = list(report.metrics)
        metrics.add_column("on test")
        for system in systems:
            metrics.add_column(system, justify="right")
        names = sorted({name for values in report.metrics.values() for name in values})
        for name in names:
            values = [report.metrics[system].get(name) for system in systems]
            metrics.add_row(name, *["" if v is None else f"{v:.4g}" for v in values])
        console.print(metrics)
    if report.model:
        aliases = ", ".join(report.model["aliases"]) or "none"
        console.print(f"model {report.model['name']} version {report.model['version']}, aliases: {aliases}")
    if report.endpoint:
        console.print(f"served at {report.endpoint}\nask it: tuneyard ask {report.model['name']} '...'")


@app.command()
def compile(
    spec: Spec,
    output: Annotated[Path | None, typer.Option(help="File to write; build/NAME.yaml when absent.")] = None,
    set_: Set = None,
) -> None:
    """Write a pipeline as KFP IR YAML."""
    from pipelines.compile import compile_pipeline

    typer.echo(compile_pipeline(spec, output, set_ or []))


@app.command()
def runs(
    limit: Annotated[int, typer.Option(help="How many, newest first.")] = 20,
    as_json: Json = False,
) -> None:
    """List the runs of this store."""
    store = connect()
    names = [name for name in store.names("runs/") if name.endswith("/run.json")]
    # A run's id ends in its UTC time and four random digits.
    newest = sorted(names, key=lambda name: name.split("/")[1].split("-")[-3:], reverse=True)[:limit]
    found = [document for name in newest if (document := store.read_json(name))]
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for run in found:
        model = f"{run['model']['name']} v{run['model']['version']}" if run["model"] else ""
        typer.echo(f"{run['run_id']:44} {run['status']:11} {run['seconds']:8.1f} s  {model}")
