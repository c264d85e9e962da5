"""The commands around a pipeline and its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from components.shared.errors import TuneyardError, UsageError
from pipelines.commands.options import Json, Set, Spec
from pipelines.images import lock

app = typer.Typer()


@app.command()
def submit(
    spec: Spec,
    target: Annotated[
        str | None,
        typer.Option(
            help="`local`: this machine; `kfp`: the cluster of TUNEYARD_KFP_ENDPOINT, if that is set."
        ),
    ] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Run a pipeline: corpus in, registered and served model out. What is done already is not repeated.

    Example: tuneyard submit sft_legal --set train.learning_rate=1e-4
    """
    from pipelines import report as reporting

    try:
        report = _submitted(spec, target, set_ or [])
    except TuneyardError as error:
        if as_json:
            report = reporting.Report(run_id="", pipeline=spec)
            report.end(error.facts())
            typer.echo(report.to_json())
        raise
    finish(report, as_json)


def _submitted(spec: str, target: str | None, overrides: list[str]) -> Any:
    """Submit to where the command or the environment says."""
    from pipelines import submit as submitting
    from pipelines.cluster import endpoint as endpoints

    if target not in (None, "local", "kfp"):
        raise UsageError(
            f"--target {target}: there are local and kfp", "leave it out to use what is configured"
        )
    if target == "kfp" or (target is None and endpoints.configured()):
        from pipelines.cluster import submitting as cluster

        return cluster.run_cluster(spec, endpoints.require(), overrides)
    submitting.interruptible()
    return submitting.run_local(spec, overrides)


def finish(report: Any, as_json: bool) -> NoReturn:
    """Show how a run ended, and end as it did."""
    from pipelines import report as reporting

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
    images: Annotated[Path, typer.Option(help="Lock of the images.")] = lock.PATH,
    set_: Set = None,
) -> None:
    """Write a pipeline as KFP IR YAML with its platform spec, as Kubeflow Pipelines takes it."""
    from pipelines.compile import compile_pipeline

    typer.echo(compile_pipeline(spec, output, set_ or [], images))
