"""A training's MLflow run: begun or gone on with, its curves, and how it ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from components.shared import tracking
from components.shared.stage import Artifact, Context
from components.train import checkpoint
from components.train.config import TrainConfig
from components.train.ranks import Ranks
from components.train.search.guide import ALONE_STANDING, Guide, Pruned

_REPORT_SECONDS = 15.0


def begin(
    config: TrainConfig,
    context: Context,
    inputs: Mapping[str, Artifact],
    facts: dict[str, Any],
    guide: Guide = ALONE_STANDING,
) -> str:
    """Start the MLflow run of a training, a trial or a search. Returns its id."""
    settings = {k: v for k, v in config.model_dump(mode="json").items() if not isinstance(v, dict)}
    for axis in ("objective", "adapter"):
        settings |= {f"{axis}.{k}": v for k, v in getattr(config, axis).model_dump(mode="json").items()}
    if config.first:
        settings["first"] = config.first.model_dump(mode="json")
    digests = {f"digest.{name}": artifact.manifest.digest for name, artifact in inputs.items()}
    tags = {"tuneyard.run": context.run, "tuneyard.key": context.key} | digests | dict(guide.tags)
    return tracking.start_run(context.pipeline, context.run + guide.suffix, settings | facts, tags)


@contextlib.contextmanager
def tracked(
    config: TrainConfig,
    context: Context,
    inputs: Mapping[str, Artifact],
    facts: dict[str, Any],
    ranks: Ranks,
    guide: Guide = ALONE_STANDING,
) -> Iterator[str]:
    """Around the fits: their MLflow run, with system metrics; it says how they ended."""
    run_id = (_resumed_run(context) or begin(config, context, inputs, facts, guide)) if ranks.writes else ""
    context.work.mkdir(parents=True, exist_ok=True)
    (context.work / "mlflow_run").write_text(run_id)
    ended: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        with tracking.system_metrics(run_id):
            yield run_id
        ended = "FINISHED"
    except (KeyboardInterrupt, Pruned):
        ended = "KILLED"
        raise
    finally:
        tracking.end_run(run_id, ended)


def curve(
    run_id: str, prefix: str, guide: Guide = ALONE_STANDING
) -> Callable[[list[dict[str, float]], bool], None]:
    """What sends the history of a fit to MLflow as it grows, its columns under a prefix, and to a search."""
    logged, sent = 0, time.monotonic()

    def report(history: list[dict[str, float]], ended: bool) -> None:
        # MLflow keeps a point that it is sent twice, with its own time, once: a resumed run may repeat some.
        nonlocal logged, sent
        if ended or time.monotonic() - sent > _REPORT_SECONDS:
            rows = [
                {name if name in ("step", "time") else prefix + name: value for name, value in row.items()}
                for row in history[logged:]
            ]
            tracking.log_history(run_id, rows)
            logged, sent = len(history), time.monotonic()
        guide.seen(history)

    return report


def _resumed_run(context: Context) -> str:
    """The MLflow run of an attempt that was cut off, so that its curve goes on; empty for none."""
    note = context.work / "mlflow_run"
    return note.read_text() if note.exists() and checkpoint.newest(context.work / "checkpoints") else ""
