"""How much memory `tuneyard advise` says a training will need, beside what the process then had.

Each case is a pipeline file with some settings changed and a few updates: enough for the moments, an
evaluation and a checkpoint, which is when most is held. It has a process of its own, as a stage has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from components.shared import jsonl, sources
from components.shared.store import Store
from components.train import footprint
from pipelines import advise
from pipelines.embedded import platform
from pipelines.samples import fetch
from pipelines.spec import load

_SHORT = ("train.max_steps=3", "train.eval_steps=2", "train.checkpoint_steps=2")
_CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "encoder_full": ("classify_finance", ("train.epochs=null",)),
    "encoder_small_batch": ("classify_finance", ("train.epochs=null", "train.per_device_batch_size=8")),
    "decoder_lora": ("sft_legal", ("train.epochs=null",)),
    "decoder_lora_float32": ("sft_legal", ("train.epochs=null", "train.precision=float32")),
    "decoder_lora_recomputed": ("sft_legal", ("train.epochs=null", "train.gradient_checkpointing=true")),
    "decoder_full": ("sft_legal", ("train.epochs=null", "train.adapter=full", "train.learning_rate=1e-5")),
}
_EXAMPLES = 400


def run() -> dict[str, Any]:
    """Every case: GiB predicted, GiB measured, and the first over the second."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tuneyard-bench-") as scratch:
        home = Path(scratch)
        os.environ["TUNEYARD_HOME"] = scratch
        os.environ.update(platform.environment(platform.up(home)))
        try:
            for name, (pipeline, changes) in _CASES.items():
                (home / name).mkdir()
                predicted, measured = _case(pipeline, (*_SHORT, *changes), home / name)
                figures[f"{name}.predicted_gib"] = round(predicted, 3)
                figures[f"{name}.measured_gib"] = round(measured, 3)
                figures[f"{name}.ratio"] = round(predicted / measured, 3)
                sys.stderr.write(f"  {name}: {predicted:.2f} GiB predicted, {measured:.2f} measured\n")
        finally:
            platform.down(home)
    return figures


def _case(pipeline: str, changes: tuple[str, ...], folder: Path) -> tuple[float, float]:
    spec = load(pipeline, list(changes))
    fetch.ensure([*spec.ingest.external_uris(), *spec.train.external_uris()], folder.parent)
    store = Store.from_environment()
    rows = advise.examples_to_size(spec, store, folder / "corpus")[0][:_EXAMPLES]
    model = sources.model_folder(spec.train.base_model, store)
    file_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    needs = footprint.predict(spec.train, model, rows, file_bytes)
    (folder / "task.json").write_text(
        spec.train.model_copy(update={"base_model": str(model)}).model_dump_json()
    )
    jsonl.write(folder / "train.jsonl", rows)
    jsonl.write(folder / "eval.jsonl", rows[: spec.train.eval_examples])
    command = [sys.executable, "-m", "benchmarks.fitting", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return needs.process_bytes / 2**30, json.loads(done.stdout.splitlines()[-1])["peak_gib"]
