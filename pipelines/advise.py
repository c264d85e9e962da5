"""Advise: what a training will need and cost before it starts, and what would fit where it does not."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.shared import tasks
from components.shared.store import Store
from components.train.config import TrainConfig
from pipelines import bases, corpus, duration, footprints, pace, sizing, smaller, storage
from pipelines.bases import Base
from pipelines.corpus import Documents
from pipelines.embedded.preflight import available_memory_gib
from pipelines.smaller import gib
from pipelines.spec import PipelineSpec

if TYPE_CHECKING:
    from components.train.footprint import Beside


def limit_gib(
    spec: PipelineSpec, gpu: str, target: str, available_gib: float | None = None
) -> tuple[float, str]:
    """Memory that train has, and of what: a GPU by name, a pod of the hardware section, or this machine."""
    if gpu:
        return sizing.gpu(gpu).memory_gib * 0.95, f"a {gpu}, less a twentieth for its driver"
    if target == "kfp":
        return spec.hardware.of("train").memory_gib or 0.0, "the pod of train (hardware:)"
    return available_gib or available_memory_gib(), "this machine has available"


def advise(
    spec: PipelineSpec,
    store: Store,
    examples: int | None = None,
    gpu: str = "",
    dollars_per_hour: float | None = None,
    target: str = "local",
    available_gib: float | None = None,
) -> dict[str, Any]:
    """Predict what a pipeline's training needs and costs.

    Args:
        spec: the pipeline.
        store: for base and corpus.
        examples: of train; counted in the corpus when None.
        gpu: a name of `sizing.GPUS`; empty for this machine's processors.
        dollars_per_hour: price of the machine; None leaves the cost out.
        target: `local`, or `kfp` for the memory that the hardware section asks for.
        available_gib: memory of this machine where it was looked at before; None looks now.

    Returns:
        memory, run, storage, remarks, and where train does not fit what would.

    Raises:
        TuneyardError: base or corpus cannot be had.
    """
    limit, of = limit_gib(spec, gpu, target, available_gib)
    with tempfile.TemporaryDirectory(prefix="tuneyard-advise-") as scratch:
        read = _read(spec, store, Path(scratch), examples)
        needs, peak, others = _in_memory(spec, read, limit, gpu)
        after, unfit = _after_train(spec, needs, read, target, available_gib)
        left = _left(spec, needs, read)
        run = _run(spec, needs, read, gpu, dollars_per_hour, store)
    return {
        "pipeline": spec.name,
        "memory": _memory(needs, peak, after, partial(_peak, spec, read.base, gpu))
        | {"limit_gib": round(limit, 2), "limit_is": of, "fits": peak <= limit * 2**30}
        | {"unpredicted": unpredicted(spec.train)},
        "settings_that_fit": others,
        "stages_that_do_not_fit": unfit,
        "run": run,
        "storage_gib": gib(sum(left.values())),
        "storage_bytes": left,
        "checkpoints_gib": gib(_checkpoints(spec, needs)),
        "weights": {"total": needs.total_weights, "moving": needs.moving_weights},
        "remarks": sizing.remarks(spec.train, read.count, needs.total_weights),
        "gpus_that_fit": list(sizing.fitting_gpus(needs.device_bytes * sizing.at_once(spec.train))),
        "estimates": _ESTIMATES,
    }


@dataclass(frozen=True)
class _Read:
    """What a prediction reads.

    Args:
        base: the base model.
        beside: what the training has beside it.
        rows: some examples of the corpus.
        documents: domain text, where there is a first phase.
        count: examples of train.
        whole: examples of the corpus that has so many in train, test's too.
    """

    base: Base
    beside: Beside
    rows: Sequence[Mapping[str, Any]]
    documents: Documents | None
    count: int
    whole: float


def _read(spec: PipelineSpec, store: Store, scratch: Path, examples: int | None) -> _Read:
    """Base, models beside it, corpus and retention set, none of the weights.

    Raises:
        TuneyardError: one of them cannot be had.
    """
    from components.train import beginning, footprint, retention

    base = bases.base_of(spec.train, store, scratch / "base")
    rows, counted, in_all = corpus.examples_to_size(spec, store, scratch / "corpus")
    documents = corpus.documents_to_size(spec, store, scratch / "documents")
    count = counted if examples is None else examples
    whole = in_all * count / max(1, counted)
    others = {
        name: bases.weightless(uri, "main", store, scratch / name)
        for name, uri in beginning.models_beside(spec.train).items()
    }
    beside = footprint.Beside(
        **{name: other.folder for name, other in others.items()},
        file_bytes=max((other.file_bytes for other in others.values()), default=0),
        documents=documents.rows if documents else (),
        retained=retention.read(spec.train, store) if spec.train.retain else (),
        examples=count + round(min(spec.train.eval_examples, whole - count)),
    )
    return _Read(base, beside, rows, documents, count, whole)


def unpredicted(config: TrainConfig) -> list[str]:
    """What of the memory of train nobody can know before it starts, a sentence each; it refuses nothing."""
    if config.objective.kind in tasks.ANSWERING:
        return [
            "how long the model's answers will be is not known: they are counted as long as max_new_tokens "
            "allows, so train may need less"
        ]
    if getattr(config.objective, "level", "") == "sequence":
        return [
            "how long the teacher's answers will be is not known: it is counted while it writes the longest "
            "that max_new_tokens allows, and the student while it learns the data's own"
        ]
    return []


def _memory(needs: Any, peak: int, after: Mapping[str, int], of_one: Callable[[Any], int]) -> dict[str, Any]:
    """What each stage that loads the model needs."""
    found: dict[str, Any] = {"train_gib": gib(peak), "train_between_updates_gib": gib(needs.held_bytes)}
    if needs.first:
        alone = {"first": needs.first, "second": replace(needs, first=None)}
        found["train_phases_gib"] = {name: gib(of_one(each)) for name, each in alone.items()}
    return found | {f"{stage}_gib": gib(count) for stage, count in after.items()}


def _in_memory(
    spec: PipelineSpec, read: _Read, limit_gib: float, gpu: str
) -> tuple[Any, int, list[dict[str, Any]]]:
    """What a training needs, the bytes of all that run at once, and what would fit where they do not."""
    from components.train import footprint

    def predict(config: TrainConfig) -> footprint.Footprint:
        return footprint.predict(config, read.base.folder, read.rows, read.base.file_bytes, read.beside)

    at_once = sizing.at_once(spec.train)
    needs = predict(sizing.heaviest(spec.train))
    of_one = partial(_peak, spec, read.base, gpu)
    one = of_one(needs)
    if one * at_once <= limit_gib * 2**30:
        return needs, one * at_once, []
    ways = smaller.in_turn(spec.train, predict, limit_gib, of_one)
    return needs, one * at_once, [*smaller.fewer(one, at_once, limit_gib), *ways]


def _peak(spec: PipelineSpec, base: Base, gpu: str, needs: Any) -> int:
    """Bytes that train needs of what limits it: of one GPU where it is named, else of the machine."""
    if not gpu:
        return int(needs.process_bytes)
    hardware = spec.hardware
    if hardware.sharding == "none" or hardware.processes == 1:
        return int(needs.device_bytes)
    text = base.shape().get("text_config", base.shape())
    return max(
        sizing.bytes_in_pieces(
            hardware.sharding,
            hardware.offload,
            hardware.processes,
            (each.total_weights, each.moving_weights, each.body_weights),
            each.held_bytes,
            each.peak_bytes,
            int(text.get("num_hidden_layers", 1)),
        )
        for each in (needs, needs.first)
        if each
    )


_ESTIMATES = [
    "memory.train_gib with --gpu and hardware.sharding: the dry run of one process, divided; nothing was run",
    "memory.evaluate_gib, memory.compress_gib: few models were measured (docs/figures.md); beside sft and "
    "classification, evaluate is taken for copies of the model",
    "run.seconds and run.dollars: run.seconds_from says what by; early stopping may end it sooner",
    "checkpoints_gib: on train's node and, while it goes on, in the store: by their tensors",
    "anything of a GPU: nothing of it was measured on one",
]


def _after_train(
    spec: PipelineSpec, needs: Any, read: _Read, target: str, available_gib: float | None
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Peak bytes of the later stages that load the model, and which of them do not fit."""
    given = needs, read.base.folder, read.base.file_bytes, read.rows
    peaks = footprints.of_stages(spec, *given)
    machine = available_gib or available_memory_gib()
    limits = {stage: footprints.limit_gib(spec, stage, target, machine) for stage in peaks}
    return peaks, footprints.unfit(spec, peaks, limits, footprints.smaller_batches(spec, *given))


def _left(spec: PipelineSpec, needs: Any, read: _Read) -> dict[str, int]:
    """What a run leaves in the store."""
    share = corpus.train_share(spec)
    test = 1 - read.count / share / read.whole if spec.split.test_source else spec.split.ratios[2]
    given = needs, read.base.folder, read.base.file_bytes, read.rows, round(read.whole), test
    return storage.left_bytes(spec, *given, read.documents)


def _checkpoints(spec: PipelineSpec, needs: Any) -> int:
    """Bytes of all that exist at once; one more than are kept while it is written."""
    count = (spec.train.keep_checkpoints + 1) * sizing.at_once(spec.train)
    return sizing.checkpoint_bytes(needs.moving_weights, count)


def _run(
    spec: PipelineSpec, needs: Any, read: _Read, gpu: str, dollars_per_hour: float | None, store: Store
) -> dict[str, Any]:
    """How long a training goes on: as one like it did where one has run, else by arithmetic."""
    from components.train import measures

    documents = read.documents.train if read.documents else 0
    parts = duration.parts_of(spec.train, needs, read.count, documents)
    paces: list[pace.Pace | None] = [None] * len(parts)
    if not spec.train.search:  # trials share the machine
        hardware = gpu or measures.hardware(spec.hardware.processes)
        paces = pace.newest([part.config for part in parts], hardware, store)
    return duration.run(parts, paces, gpu, dollars_per_hour)
