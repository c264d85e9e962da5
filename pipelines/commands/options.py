"""Arguments and options that several commands take, and the store that most of them read."""

from __future__ import annotations

from typing import Annotated, Any

import typer

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


def connect() -> Any:
    """Bring the local platform up and return its store."""
    import os

    from components.shared.store import Store
    from pipelines.embedded import platform

    os.environ.update(platform.environment(platform.up(platform.home_dir())))
    return Store.from_environment()


def nearest_store() -> Any:
    """The store that the environment names, else that of this machine's platform."""
    import os

    from components.shared.store import Store

    return Store.from_environment() if os.environ.get("TUNEYARD_STORE") else connect()
