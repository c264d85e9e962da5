"""How much memory `tuneyard advise` says train, compress and evaluate will need, beside what each then had.

Each case is a pipeline file with some settings changed and a few updates: enough for the moments, an
evaluation and a checkpoint, which is when most is held; two are longer. Each stage has a process of its own,
as in a line; compress and evaluate take what train made, for the cases that say so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.evaluate.config import EvaluateConfig
from components.shared import jsonl, sources
from components.shared.store import Store
from components.train import footprint
from pipelines import corpus, footprints
from pipelines.embedded import platform
from pipelines.samples import fetch
from pipelines.spec import PipelineSpec, load

_SHORT = ("train.max_steps=3", "train.eval_steps=2", "train.checkpoint_steps=2")
_CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "encoder_full": ("classify_finance", ("train.epochs=null",)),
    # Longer: what a process keeps of each length it has seen must not grow with them.
    "encoder_longer": (
        "classify_finance",
        ("train.epochs=null", "train.max_steps=72", "train.eval_steps=24"),
    ),
    "encoder_small_batch": ("classify_finance", ("train.epochs=null", "train.per_device_batch_size=8")),
    "decoder_lora": ("sft_legal", ("train.epochs=null",)),
    "decoder_lora_longer": ("sft_legal", ("train.epochs=null", "train.max_steps=24", "train.eval_steps=12")),
    "decoder_lora_float32": ("sft_legal", ("train.epochs=null", "train.precision=float32")),
    "decoder_lora_recomputed": ("sft_legal", ("train.epochs=null", "train.gradient_checkpointing=true")),
    "decoder_full": ("sft_legal", ("train.epochs=null", "train.adapter=full", "train.learning_rate=1e-5")),
}
_EXAMPLES = 400
# Whose model is compressed and judged too: an encoder, and a causal model twice.
_WHOLE_LINE = ("encoder_full", "decoder_lora", "decoder_lora_float32")
_TESTS = 48
_JUDGED = {"gates": {}, "max_generated": 24, "max_new_tokens": 96}


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
                spec = load(pipeline, [*_SHORT, *changes])
                for stage, predicted, measured in _case(spec, home / name, name in _WHOLE_LINE):
                    figures[f"{name}.{stage}.predicted_gib"] = round(predicted, 3)
                    figures[f"{name}.{stage}.measured_gib"] = round(measured, 3)
                    figures[f"{name}.{stage}.ratio"] = round(predicted / measured, 3)
                    said = f"{predicted:.2f} GiB predicted, {measured:.2f} measured"
                    sys.stderr.write(f"  {name}, {stage}: {said}\n")
        finally:
            platform.down(home)
    return figures


def _case(spec: PipelineSpec, folder: Path, whole_line: bool) -> Iterator[tuple[str, float, float]]:
    """Stage, GiB predicted and GiB measured: of train, and of the two after it."""
    fetch.ensure([*spec.ingest.external_uris(), *spec.train.external_uris()], folder.parent)
    store = Store.from_environment()
    # What occurs twice would be in train and in test.
    found = {row["id"]: row for row in corpus.examples_to_size(spec, store, folder / "corpus")[0]}
    rows = list(found.values())[: _EXAMPLES + _TESTS]
    model = sources.model_folder(spec.train.base_model, store)
    file_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    learned, tests = rows[:_EXAMPLES], rows[_EXAMPLES:]
    judged = EvaluateConfig.model_validate(_JUDGED)
    spec = spec.model_copy(
        update={
            "train": spec.train.model_copy(update={"base_model": str(model)}),
            "evaluate": judged,
            "split": spec.split.model_copy(update={"ratios": (0.8, 0.1, 0.1), "test_source": str(folder)}),
        }
    )
    needs = footprint.predict(spec.train, model, learned, file_bytes)
    after = footprints.of_stages(spec, needs, model, file_bytes, tests) if whole_line else {}
    for stage in ("train", "compress", "evaluate"):
        (folder / f"{stage}.json").write_text(getattr(spec, stage).model_dump_json())
    sides = {"train": learned, "eval": learned[: spec.train.eval_examples], "test": tests}
    for side, some in sides.items():
        jsonl.write(folder / f"{side}.jsonl", some)
    yield "train", needs.process_bytes / 2**30, _peak_gib("train", folder)
    for stage in ("compress", "evaluate"):
        if stage in after:
            yield stage, after[stage] / 2**30, _peak_gib(stage, folder)


def _peak_gib(stage: str, folder: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.fitting", stage, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_gib"])
