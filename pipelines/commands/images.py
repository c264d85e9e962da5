"""The command that builds the images of a cluster's pods."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import Json

app = typer.Typer()


@app.command()
def images(
    registry: Annotated[str, typer.Option(help="Where to push: registry.example.com/tuneyard.")] = "",
    base: Annotated[str, typer.Option(help="Base image; a Debian bookworm when absent.")] = "",
    builder: Annotated[
        str | None, typer.Option(help="docker, podman or buildah; the first one found when absent.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="cpu, gpu or serving; may be given again.")] = None,
    push: Annotated[bool, typer.Option(help="Push them and lock their digests.")] = False,
    base_from_debootstrap: Annotated[
        bool, typer.Option(help="Make the base image from Debian's packages; as root.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build the images that pods run; with --push write docker/images.json too.

    Example: tuneyard images --registry registry.example.com/tuneyard --push
    """
    from pipelines.images import build, lock

    built = build.build(only or lock.NAMES, registry, base, builder, push, base_from_debootstrap)
    if as_json:
        typer.echo(build.as_json(built))
        return
    for each in built:
        where = each.reference or f"{each.tag} (not pushed, so not locked)"
        typer.echo(f"{each.image:8} {each.size_bytes / 2**30:6.2f} GiB {each.seconds:7.0f} s  {where}")
