"""A stage in a process of its own, as in a pipeline, and the most memory it had.

`python -m benchmarks.fitting STAGE FOLDER`: reads STAGE.json (its settings) and what it takes of train.jsonl,
eval.jsonl, test.jsonl, model/ and compressed/ there; leaves its output there; prints one object.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from components.shared import clock
from components.shared.stage import Artifact, Context

_TAKES = {
    "train": ("train", "eval"),
    "compress": ("model",),
    "evaluate": ("test", "train", "model", "compressed"),
}
_LEAVES = {"train": "model", "compress": "compressed", "evaluate": "evaluation"}


def run(stage: str, folder: Path) -> dict[str, Any]:
    """Do a stage there, with MLflow in a file of its own."""
    import kfp.dsl  # noqa: F401  the stage's process has it too

    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    os.environ["TUNEYARD_MLFLOW_ARTIFACTS"] = str(folder / "mlruns")
    module = importlib.import_module(f"components.{stage}.{stage}")
    settings = importlib.import_module(f"components.{stage}.config")
    config = getattr(settings, f"{stage.capitalize()}Config").model_validate_json(
        (folder / f"{stage}.json").read_text()
    )
    work = folder / f"of_{stage}"
    context = Context("run", "footprint", stage, "k" * 64, None, work / "out", work / "work")  # type: ignore[arg-type]
    context.out.mkdir(parents=True)
    result = getattr(module, stage)(config, _inputs(stage, folder), context)
    left = folder / _LEAVES[stage]
    shutil.rmtree(left, ignore_errors=True)
    (context.out / left.name).rename(left)
    return {"peak_gib": clock.peak_memory_gib(), "metrics": result.metrics}


def _inputs(stage: str, folder: Path) -> Mapping[str, Artifact]:
    found = {}
    for name in _TAKES[stage]:
        path = folder / name
        if (folder / f"{name}.jsonl").is_file():
            path = folder / "inputs" / name
            path.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / f"{name}.jsonl", path / "examples.jsonl")
        if path.is_dir():
            found[name] = Artifact(SimpleNamespace(digest=name), path)  # type: ignore[arg-type]
    return found


def main() -> None:
    """See the module."""
    logging.basicConfig(level=logging.WARNING)
    sys.stdout.write(json.dumps(run(sys.argv[1], Path(sys.argv[2]))) + "\n")


if __name__ == "__main__":
    main()
