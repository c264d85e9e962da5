"""The `tuneyard` command."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from components.shared.errors import EXIT_INTERRUPTED, EXIT_USAGE, TuneyardError, UsageError

app = typer.Typer(
    name="tuneyard",
    help="Turn a domain corpus and a base model into a fine-tuned model, and keep it in service.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or file, 3 stopped by a gate or a data check, "
    "130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Spec = Annotated[
    str, typer.Argument(help="A name in pipelines/ (sft_legal) or the path of any pipeline YAML.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output; the log goes to stderr.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting; may be given again."),
]
Model = Annotated[str, typer.Argument(help="Name of a registered model.")]
Who = Annotated[str | None, typer.Option(help="Who decides; the git or login name when absent.")]


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
def up() -> None:
    """Start the local platform: the S3 store and the model server."""
    from pipelines.embedded import platform

    started = platform.up(platform.home_dir())
    typer.echo(
        f"S3 store      {started.s3_url}\nmodel server  {started.serving_url}\n"
        f"MLflow        {started.mlflow_uri}"
    )


@app.command()
def down() -> None:
    """Stop the local platform; the data stays."""
    from pipelines.embedded import platform

    stopped = platform.down(platform.home_dir())
    typer.echo(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")


@app.command()
def status(as_json: Json = False) -> None:
    """Show what runs of the local platform."""
    from dataclasses import asdict

    from pipelines.embedded import platform

    services = platform.status(platform.home_dir())
    if as_json:
        typer.echo(json.dumps([asdict(service) for service in services], default=str, indent=1))
        return
    for service in services:
        typer.echo(f"{service.name:8} {service.state:8} {service.url or '':28} {service.pid or ''}")


@app.command()
def ui() -> None:
    """Serve MLflow's page and print its address."""
    from pipelines.embedded import platform

    typer.echo(platform.ui(platform.home_dir()))


@app.command()
def runs(
    limit: Annotated[int, typer.Option(help="How many, newest first.")] = 20,
    as_json: Json = False,
) -> None:
    """List the runs of this store."""
    store = _connect()
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


@app.command()
def promote(
    model: Model,
    version: Annotated[int | None, typer.Option(help="Version; the candidate when absent.")] = None,
    why: Annotated[str, typer.Option(help="The reason, for the ledger.")] = "",
    who: Who = None,
    force: Annotated[bool, typer.Option(help="Also when its verdict failed.")] = False,
    as_json: Json = False,
) -> None:
    """Make a version the champion and put it in service."""
    from pipelines import promotion

    _connect()
    _say(promotion.promote(model, version, who=who or promotion.default_who(), why=why, force=force), as_json)


@app.command()
def rollback(
    model: Model,
    why: Annotated[str, typer.Option(help="The reason, for the ledger.")] = "",
    who: Who = None,
    as_json: Json = False,
) -> None:
    """Make the previous champion the champion again and put it in service."""
    from pipelines import promotion

    _connect()
    _say(promotion.rollback(model, who=who or promotion.default_who(), why=why), as_json)


def _say(change: Any, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        typer.echo(json.dumps(asdict(change), default=str, ensure_ascii=False))
    else:
        typer.echo(str(change))


@app.command()
def ask(
    model: Model,
    question: Annotated[str, typer.Argument(help="What to ask it, or the text to classify.")],
    system: Annotated[str | None, typer.Option(help="System message, for a causal model.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    as_json: Json = False,
) -> None:
    """Ask the served champion."""
    from pipelines import asking
    from pipelines.embedded import platform

    _connect()
    asking.ask(platform.up(platform.home_dir()).serving_url, model, question, system, max_tokens, as_json)


def _connect() -> Any:
    """Bring the local platform up and return its store."""
    import os

    from components.shared.store import Store
    from pipelines.embedded import platform

    os.environ.update(platform.environment(platform.up(platform.home_dir())))
    return Store.from_environment()


def main() -> None:
    """Entry point: our errors become a message and an exit code, never a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("botocore", "boto3", "urllib3", "s3transfer", "httpx", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        # Not standing alone, click hands an Exit's code back instead of ending with it.
        code = app(standalone_mode=False)
    except TuneyardError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            _usage(error)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> None:
    """Show click's own usage errors and exits as it would itself."""
    if hasattr(error, "exit_code") and not hasattr(error, "show"):
        sys.exit(error.exit_code)
    error.show()
    sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
