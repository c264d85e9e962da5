"""Arguments and options that several commands take, and the store that most of them read."""

from __future__ import annotations

from collections.abc import Sequence
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


def nearest_store(also: Sequence[str] = ()) -> Any:
    """The store that the environment names, else that of this machine's platform, which is then brought up.

    Args:
        also: variables that must be named beside a store that is: what else of a cluster is needed. This
            machine's platform sets them all.

    Raises:
        UsageError: some of them are not.
    """
    import os

    from components.shared.errors import UsageError
    from components.shared.store import Store
    from pipelines.embedded import platform

    if store := os.environ.get("TUNEYARD_STORE"):
        missing = [name for name in also if not os.environ.get(name)]
        if missing:
            raise UsageError(
                f"TUNEYARD_STORE is {store}, but not set: {', '.join(missing)}",
                "set them too (docs/kubernetes.md), or unset TUNEYARD_STORE to mean this machine's platform",
            )
    else:
        os.environ.update(platform.environment(platform.up(platform.home_dir())))
    return Store.from_environment()
