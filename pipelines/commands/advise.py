"""The command that says what a training will need before it starts."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pipelines.commands.options import Json, Set, Spec, nearest_store

app = typer.Typer()


@app.command()
def advise(
    spec: Spec,
    set_: Set = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Examples of train; counted in the corpus when absent.")
    ] = None,
    gpu: Annotated[
        str, typer.Option(help="Predict for a GPU: 3090, 4090, l4, l40s, a6000, a100, h100, h200.")
    ] = "",
    dollars_per_hour: Annotated[float | None, typer.Option(min=0, help="Price of the machine.")] = None,
    target: Annotated[
        str, typer.Option(help="`local`: this machine's memory; `kfp`: that of the hardware section.")
    ] = "local",
    as_json: Json = False,
) -> None:
    """Say what training a pipeline needs (memory, steps, time, disk, cost), and what would fit if not.

    Example: tuneyard advise sft_legal --gpu h100 --dollars-per-hour 2.5
    """
    from pipelines import advise as advising
    from pipelines import fits, sizing
    from pipelines.spec import load

    loaded = load(spec, set_ or [])
    if gpu:
        sizing.gpu(gpu)
    store = nearest_store()
    _fetch_samples(loaded)
    said = advising.advise(loaded, store, examples, gpu, dollars_per_hour, target)
    if as_json:
        typer.echo(json.dumps(said, indent=1, ensure_ascii=False))
        return
    _show(said)
    if not said["memory"]["fits"] or said["stages_that_do_not_fit"]:
        typer.echo(f"\n{fits.unfit(said)}\n  -> {fits.what_would(said)}")


def _fetch_samples(spec: Any) -> None:
    """Sample data and models, as submit fetches them."""
    from pipelines.embedded import platform
    from pipelines.samples import fetch

    fetch.ensure([*spec.ingest.external_uris(), *spec.train.external_uris()], platform.home_dir())


def _show(said: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=said["pipeline"])
    table.add_column("")
    table.add_column("predicted", justify="right")
    memory, run, weights = said["memory"], said["run"], said["weights"]
    fits = "fits" if memory["fits"] else "does not fit"
    table.add_row("peak memory of train", f"{memory['train_gib']} of {memory['limit_gib']} GiB: {fits}")
    for phase, needed in memory.get("train_phases_gib", {}).items():
        table.add_row(f"  its {phase} phase", f"{needed} GiB")
    for stage in ("evaluate", "compress"):
        if f"{stage}_gib" in memory:
            table.add_row(f"peak memory of {stage}", f"{memory[f'{stage}_gib']} GiB")
    table.add_row("weights, of them trained", f"{weights['total']:,}, {weights['moving']:,}")
    table.add_row("examples of train", f"{run['examples']:,}")
    table.add_row("optimizer steps, tokens", f"{run['steps']:,}, {run['tokens']:,}")
    for name, phase in run.get("phases", {}).items():
        told = f"{phase['steps']:,}, {phase['tokens']:,}, {_duration(phase['seconds'])}"
        table.add_row(f"  of them in its {name} phase, and time", told)
    table.add_row(f"time on {run['on']} ({run['seconds_from']})", _duration(run["seconds"]))
    if "dollars" in run:
        table.add_row("cost of train (estimate)", f"${run['dollars']:,.2f}")
    table.add_row("left in the store", f"{said['storage_gib']} GiB")
    table.add_row("checkpoints while it trains", f"{said['checkpoints_gib']} GiB")
    table.add_row(
        "one GPU that holds it (estimate)", ", ".join(said["gpus_that_fit"]) or "none of those known"
    )
    console = Console()
    console.print(table)
    for note in (*memory["unpredicted"], *run["seconds_notes"]):
        console.print(f"note: {note}")
    for remark in said["remarks"]:
        console.print(f"remark: {remark}")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
