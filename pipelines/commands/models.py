"""The commands of registered and served models."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pipelines.commands.options import Json, Model, Who, nearest_store

app = typer.Typer()

_REGISTRY = ("MLFLOW_TRACKING_URI",)
_SERVING = ("TUNEYARD_SERVING_URL", "TUNEYARD_SERVING_TOKEN")


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

    nearest_store(also=(*_REGISTRY, *_SERVING))
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

    nearest_store(also=(*_REGISTRY, *_SERVING))
    _say(promotion.rollback(model, who=who or promotion.default_who(), why=why), as_json)


@app.command()
def history(model: Model, as_json: Json = False) -> None:
    """Say which versions were registered and made champion: when, by whom, why, on what evidence."""
    from dataclasses import asdict

    from pipelines import promotion

    nearest_store(also=_REGISTRY)
    entries = promotion.history(model)
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], default=str, ensure_ascii=False))
        return
    for entry in entries:
        typer.echo(promotion.told(entry))


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
    import os

    from pipelines import asking

    url = os.environ.get("TUNEYARD_SERVING_URL", "")
    if not url:
        nearest_store(also=_SERVING[:1])
        url = os.environ["TUNEYARD_SERVING_URL"]
    asking.ask(url, model, question, system, max_tokens, as_json)
