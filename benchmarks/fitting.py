"""A training in a process of its own, as the stage runs it, and the most memory it had.

`python -m benchmarks.fitting FOLDER`: reads task.json, train.jsonl and eval.jsonl there, prints one object.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from components.shared import clock, jsonl
from components.shared.stage import Artifact, Context
from components.train.config import TrainConfig


def train(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Train there, with MLflow in a file of its own."""
    import kfp.dsl  # noqa: F401  the stage's process has it too

    from components.train import beginning
    from components.train import train as stage

    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    os.environ["TUNEYARD_MLFLOW_ARTIFACTS"] = str(folder / "mlruns")
    inputs = {}
    for side in ("train", "eval"):
        (folder / side).mkdir()
        jsonl.write(folder / side / "examples.jsonl", jsonl.read(folder / f"{side}.jsonl"))
        inputs[side] = Artifact(SimpleNamespace(digest=side), folder / side)  # type: ignore[arg-type]
    context = Context("run", "footprint", "train", "k" * 64, None, folder / "out", folder / "work")  # type: ignore[arg-type]
    context.out.mkdir()
    marks: dict[str, int] = {}
    started = beginning.open_for

    def opened(*given: Any) -> Any:
        marks["before_opening_gib"] = clock.peak_memory_gib()
        found = started(*given)
        marks["after_opening_gib"] = clock.peak_memory_gib()
        return found

    beginning.open_for = opened
    result = stage.train(config, inputs, context)
    return {
        **marks,
        "peak_gib": clock.peak_memory_gib(),
        "tokens_per_second": result.metrics["tokens_per_second"],
    }


def main() -> None:
    """See the module."""
    logging.basicConfig(level=logging.WARNING)
    folder = Path(sys.argv[1])
    config = TrainConfig.model_validate_json((folder / "task.json").read_text())
    sys.stdout.write(json.dumps(train(config, folder)) + "\n")


if __name__ == "__main__":
    main()
