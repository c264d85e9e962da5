"""The commands of the local platform."""

from __future__ import annotations

import json

import typer

from pipelines.commands.options import Json

app = typer.Typer()


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
