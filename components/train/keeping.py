"""Checkpoints in the store, for a training whose disk may go before it ends: that of a pod.

`work/train/<key>/` has `step-N/`, the newest ones, and `mlflow.json`, the MLflow run that they belong to.
Checkpoints are removed when the stage has committed.
"""

from __future__ import annotations

from pathlib import Path

from components.shared.errors import StoreError
from components.shared.stage import Context
from components.train import checkpoint
from components.train.ranks import Ranks


def folder(key: str) -> str:
    """Name in the store under which a training keeps what must outlast its machines."""
    return f"work/train/{key}"


def keep(path: Path, context: Context, checkpoints: int) -> None:
    """Copy a checkpoint to the store, and remember its MLflow run.

    Args:
        path: of the checkpoint.
        context: of the stage.
        checkpoints: how many stay there.
    """
    checkpoint.upload(context.store, folder(context.key), path, checkpoints)
    run = (context.work / "mlflow_run").read_text()
    context.store.write_json(f"{folder(context.key)}/mlflow.json", {"run": run})


def resume(context: Context, ours: Ranks) -> None:
    """Lay the newest whole checkpoint of the store into the work folder: the same one in every process.

    Raises:
        StoreError: it arrived damaged in a process that only reads.
    """
    here, prefix = context.work / "checkpoints", folder(context.key)
    step = 0
    if ours.writes:
        # A node that was killed while it wrote leaves a newer one without its state; that is none.
        steps = checkpoint.uploaded(context.store, prefix)
        step = next((s for s in steps if checkpoint.fetch(context.store, prefix, s, here)), 0)
        note = context.store.read_json(f"{prefix}/mlflow.json")
        if step and note:
            (context.work / "mlflow_run").write_text(note["run"])
    step = ours.told(step)
    if step and not ours.writes and not checkpoint.fetch(context.store, prefix, step, here):
        # As a fault of the store, for which torchrun starts all processes again.
        raise StoreError(f"the checkpoint of step {step} arrived damaged in process {ours.rank}")
