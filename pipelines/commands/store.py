"""The commands of the artifact store: what can go, and what must stay."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pipelines.commands.options import Json, Who, nearest_store

app = typer.Typer()
hold = typer.Typer(
    help="Keep an artifact whatever `gc` finds: for a lawsuit, an audit.", no_args_is_help=True
)
app.add_typer(hold, name="hold")

What = Annotated[
    str, typer.Argument(help="A registered version (sft_legal/3), a manifest's digest or its s3:// URI.")
]
Why = Annotated[str, typer.Option(help="The reason; it stays on record.")]


@app.command()
def gc(
    delete: Annotated[
        bool, typer.Option("--delete/--dry-run", help="Remove it; else only say what would be.")
    ] = False,
    keep_days: Annotated[
        float, typer.Option(min=0, help="What a run younger than this made or used stays.")
    ] = 30.0,
    as_json: Json = False,
) -> None:
    """Remove from the store what no alias, deployment, hold or young run leads to.

    Nothing younger than a day is removed. The champion, the candidate and what a rollback would bring back
    stay with all they were made from. --keep-days must be longer than the longest run.
    """
    from pipelines import gc as collecting

    store = nearest_store()
    found = (collecting.sweep if delete else collecting.look)(store, keep_days)
    if as_json:
        names = [item.name for item in found.removed] + [upload.key for upload in found.uploads]
        typer.echo(
            json.dumps(
                {"deleted": delete, "keep_days": keep_days, "kinds": found.by_kind(), "names": names},
                indent=1,
            )
        )
        return
    _show(found)


def _show(found: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    done = "removed" if found.deleted else "would go"
    table = Table()
    table.add_column("")
    for column in (done, "bytes", "stays", "bytes"):
        table.add_column(column, justify="right")
    rows = found.by_kind()
    for kind, row in rows.items():
        table.add_row(kind, *(f"{row[c]:,}" for c in ("removed", "removed_bytes", "kept", "kept_bytes")))
    Console().print(table)
    total = sum(row["removed_bytes"] for row in rows.values())
    if found.deleted:
        typer.echo(f"{total:,} bytes removed")
    elif found.removed or found.uploads:
        typer.echo(f"{total:,} bytes can go: tuneyard gc --delete")
    else:
        typer.echo("nothing can go")


@hold.command("add")
def hold_add(what: What, why: Why, who: Who = None, as_json: Json = False) -> None:
    """Hold an artifact, with its files and all it was made from."""
    from dataclasses import asdict

    from pipelines import holds, promotion

    made = holds.add(what, why, who or promotion.default_who(), nearest_store())
    typer.echo(json.dumps(asdict(made), ensure_ascii=False) if as_json else f"held: {_line(asdict(made))}")


@hold.command("remove")
def hold_remove(what: What, why: Why, who: Who = None, as_json: Json = False) -> None:
    """End every hold of an artifact; the next `gc` may then remove it."""
    from dataclasses import asdict

    from pipelines import holds, promotion

    ended = [asdict(each) for each in holds.end(what, why, who or promotion.default_who(), nearest_store())]
    if as_json:
        typer.echo(json.dumps(ended, ensure_ascii=False))
        return
    for each in ended:
        typer.echo(f"no longer held: {_line(each)}")


@hold.command("list")
def hold_list(as_json: Json = False) -> None:
    """List what is held, by whom and why."""
    from pipelines import holds

    standing = holds.standing(nearest_store())
    if as_json:
        typer.echo(json.dumps(standing, ensure_ascii=False))
        return
    for each in standing:
        typer.echo(_line(each))
    if not standing:
        typer.echo("nothing is held")


def _line(held: dict[str, Any]) -> str:
    return f"{held['what']} (manifest {held['digest'][:12]}) since {held['at']}, {held['who']}: {held['why']}"
