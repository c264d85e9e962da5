"""Memory of the stages after train that load a model, before anything starts, and what would fit there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines import corpus
from pipelines.smaller import gib
from pipelines.spec import PipelineSpec

# Objectives whose models these predictions were made for; of others evaluate is an estimate by copies, which
# refuses nobody.
_KNOWN = ("sft", "classification")


def known(spec: PipelineSpec) -> bool:
    """Whether evaluate and compress of this objective are predicted from what they do."""
    return spec.train.objective.kind in _KNOWN


def of_stages(
    spec: PipelineSpec, needs: Any, folder: Path, file_bytes: int, rows: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """Stage -> peak bytes of its process: evaluate, and compress where there is that stage.

    Args:
        spec: the pipeline.
        needs: of train, by its dry run.
        folder: of the base, without weights.
        file_bytes: of its weights.
        rows: of the corpus.
    """
    found = {"evaluate": _evaluate(spec, needs, folder, file_bytes, rows)}
    if spec.compress is not None:
        found["compress"] = _compress(spec, needs, folder, file_bytes)
    return found


def _evaluate(
    spec: PipelineSpec, needs: Any, folder: Path, file_bytes: int, rows: Sequence[Mapping[str, Any]]
) -> int:
    from components.evaluate import footprint
    from components.shared import causal

    if not known(spec):
        # Base and tuned are judged one after the other; the file of each is mapped while it is read.
        return footprint.CAUSAL_HOST_BYTES + 4 * int(needs.total_weights) + file_bytes
    tests = corpus.tests_among(rows, spec.split)
    if spec.train.objective.kind == "classification":
        labels = len({row["label"] for row in rows})
        texts = [row["text"] for row in tests]
        return footprint.of_classifier(spec.evaluate, folder, texts, labels, spec.train.max_length)
    fast = causal.preferred_precision("auto")
    # What is stored in float32 is judged in float32: a base of float32, or one that moved as a whole.
    # (Bytes of a weight in the file; it has fewer weights than the model with its adapter.)
    whole = file_bytes >= 3 * int(needs.total_weights) or not spec.train.adapter.frozen
    merged = spec.compress is not None or not spec.train.adapter.frozen
    precision: causal.Precision = "float32" if whole and merged else fast
    return footprint.of_causal(spec.evaluate, folder, tests, file_bytes, precision)


def _compress(spec: PipelineSpec, needs: Any, folder: Path, file_bytes: int) -> int:
    from components.compress import footprint
    from components.shared import chat

    if spec.train.objective.kind.startswith("classification"):
        return footprint.of_encoder(needs.total_weights)
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = chat.prepare(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    text = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    merged = needs.body_weights if spec.train.adapter.frozen else 0
    sizes = footprint.probe_tokens(tokenizer)
    return footprint.of_causal(
        footprint.Shape(needs.total_weights, merged, text.vocab_size, file_bytes, sizes)
    )


def limit_gib(spec: PipelineSpec, stage: str, target: str, machine_gib: float) -> float:
    """Memory that a stage has: that of its pod, or what this machine has available."""
    return (spec.hardware.of(stage).memory_gib or machine_gib) if target == "kfp" else machine_gib


def smaller_batches(
    spec: PipelineSpec, needs: Any, folder: Path, file_bytes: int, rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, int]]:
    """Ways to need less in evaluate, as `--set` spells them, and the peak bytes of each."""
    batch = spec.evaluate.per_device_batch_size
    while batch > 1:
        batch //= 2
        settings = spec.evaluate.model_copy(update={"per_device_batch_size": batch})
        other = spec.model_copy(update={"evaluate": settings})
        yield (
            f"evaluate.per_device_batch_size={batch}",
            _evaluate(other, needs, folder, file_bytes, rows),
        )


def unfit(
    spec: PipelineSpec,
    peaks: Mapping[str, int],
    limits_gib: Mapping[str, float],
    ways: Iterator[tuple[str, int]],
) -> list[dict[str, Any]]:
    """The stages that need more than they have, and what would fit.

    Args:
        spec: the pipeline.
        peaks: stage -> bytes.
        limits_gib: stage -> GiB.
        ways: see `smaller_batches`; asked where evaluate does not fit.
    """
    found = []
    for stage, peak in peaks.items():
        if not known(spec) or peak <= limits_gib[stage] * 2**30:
            continue
        fitting = [
            {"set": said, "peak_gib": gib(other)}
            for said, other in (ways if stage == "evaluate" else ())
            if other <= limits_gib[stage] * 2**30
        ]
        found.append(
            {
                "stage": stage,
                "needs_gib": gib(peak),
                "limit_gib": round(limits_gib[stage], 2),
                "settings_that_fit": fitting[:1],
            }
        )
    return found
