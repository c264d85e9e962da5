"""Advise: what a training will need and cost before it starts, and what would fit where it does not."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from components.ingest.ingest import examples_of
from components.shared import sources
from components.shared.errors import TuneyardError
from components.shared.store import Store
from components.train.config import TrainConfig
from pipelines import footprints, sizing, smaller, storage
from pipelines.embedded.preflight import available_memory_gib
from pipelines.smaller import gib
from pipelines.spec import PipelineSpec

# Examples that are tokenised for a prediction; the longest of more are hardly longer.
_READ = 5000


@dataclass(frozen=True)
class Base:
    """A base model without its weights.

    Args:
        folder: with its config.json and tokenizer.
        file_bytes: of its weights.
    """

    folder: Path
    file_bytes: int

    def shape(self) -> dict[str, Any]:
        """Its config.json."""
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return found


def base_of(config: TrainConfig, store: Store, scratch: Path) -> Base:
    """The base model of a pipeline, its weights left where they are.

    Args:
        config: settings of train.
        store: gives the S3 client.
        scratch: a folder for its small files.

    Raises:
        TuneyardError: it cannot be had.
    """
    uri, kind = config.base_model, sources.kind_of(config.base_model)
    if kind == "local":
        folder = Path(uri).expanduser().resolve()
        return Base(folder, sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    if kind == "hub":
        from huggingface_hub import HfApi, snapshot_download

        commit, _ = sources.hub_contents(uri, config.revision, "model")
        wanted = ["*.json", "*.model", "*.txt", "*.jinja"]
        folder = Path(snapshot_download(uri, revision=commit, allow_patterns=wanted))
        info = HfApi().model_info(uri, revision=commit, files_metadata=True)
        sizes = [s.size or 0 for s in info.siblings or [] if s.rfilename.endswith(".safetensors")]
        return Base(folder, sum(sizes))
    bucket, prefix = uri.removeprefix("s3://").partition("/")[::2]
    weights = 0
    for found in store.list_prefix(uri):
        name = found["key"].removeprefix(prefix.rstrip("/") + "/")
        if name.endswith(".safetensors"):
            weights += found["size"]
        elif "/" not in name:
            store.client.download_file(bucket, found["key"], str(scratch / name))
    if not (scratch / "config.json").is_file():
        raise TuneyardError(f"base model {uri}: no config.json there", "name the folder that holds it")
    return Base(scratch, weights)


def examples_to_size(
    spec: PipelineSpec, store: Store, scratch: Path
) -> tuple[list[dict[str, Any]], int, int]:
    """Some thousand examples of the corpus, how many will be trained on, and how many there are with test's.

    Args:
        spec: the pipeline.
        store: gives the S3 client.
        scratch: a folder for the files that examples name.

    Raises:
        TuneyardError: the corpus cannot be read.
    """
    parts: Counter[str] = Counter()
    found = (row for row in examples_of(spec.ingest, store, scratch) if _counted(row, parts))
    rows = [{**row, "id": str(number)} for number, row in enumerate(itertools.islice(found, _READ))]
    if not rows:
        raise TuneyardError(
            f"{spec.ingest.source}: no row of it is an example", "map its columns with ingest.columns"
        )
    for _ in found:
        pass
    return rows, round(parts["main"] * _train_share(spec)), parts.total()


def _counted(row: Mapping[str, Any], parts: Counter[str]) -> bool:
    """Count a row; whether it is of the corpus itself, not of a test split beside it."""
    part = row["origin"]["part"]
    parts[part] += 1
    return bool(part == "main")


def _train_share(spec: PipelineSpec) -> float:
    train, watched, judged = spec.split.ratios
    return train / (train + watched) if spec.split.test_source else train / (train + watched + judged)


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
        base = base_of(spec.train, store, Path(scratch))
        rows, counted, in_all = examples_to_size(spec, store, Path(scratch) / "corpus")
        needs, peak, others = _in_memory(spec, base, rows, limit, gpu)
        after, unfit = _after_train(spec, needs, base, rows, target, available_gib)
        count = counted if examples is None else examples
        left = _left(spec, needs, base, rows, count, in_all * count / max(1, counted))
    return {
        "pipeline": spec.name,
        "memory": _memory(needs, peak, after)
        | {"limit_gib": round(limit, 2), "limit_is": of, "fits": peak <= limit * 2**30},
        "settings_that_fit": others,
        "stages_that_do_not_fit": unfit,
        "run": _run(spec.train, needs, count, gpu, dollars_per_hour),
        "storage_gib": gib(sum(left.values())),
        "storage_bytes": left,
        "checkpoints_gib": gib(_checkpoints(spec, needs)),
        "weights": {"total": needs.total_weights, "moving": needs.moving_weights},
        "remarks": sizing.remarks(spec.train, count, needs.total_weights),
        "gpus_that_fit": list(sizing.fitting_gpus(needs.peak_bytes * sizing.at_once(spec.train))),
        "estimates": _ESTIMATES,
    }


def _memory(needs: Any, peak: int, after: Mapping[str, int]) -> dict[str, float]:
    """What each stage that loads the model needs."""
    found = {"train_gib": gib(peak), "train_between_updates_gib": gib(needs.held_bytes)}
    return found | {f"{stage}_gib": gib(count) for stage, count in after.items()}


def _in_memory(
    spec: PipelineSpec, base: Base, rows: Sequence[Mapping[str, Any]], limit_gib: float, gpu: str
) -> tuple[Any, int, list[dict[str, Any]]]:
    """What a training needs, the bytes of all that run at once, and what would fit where they do not."""
    from components.train import footprint

    at_once = sizing.at_once(spec.train)
    needs = footprint.predict(sizing.heaviest(spec.train), base.folder, rows, base.file_bytes)
    of_one = partial(_peak, spec, base, gpu)
    one = of_one(needs)
    if one * at_once <= limit_gib * 2**30:
        return needs, one * at_once, []
    ways = smaller.in_turn(spec.train, rows, base.folder, base.file_bytes, limit_gib, of_one)
    return needs, one * at_once, [*smaller.fewer(one, at_once, limit_gib), *ways]


def _peak(spec: PipelineSpec, base: Base, gpu: str, needs: Any) -> int:
    """Bytes that train needs of what limits it: of one GPU where it is named, else of the machine."""
    if not gpu:
        return int(needs.process_bytes)
    hardware = spec.hardware
    if hardware.sharding == "none" or hardware.processes == 1:
        return int(needs.peak_bytes)
    text = base.shape().get("text_config", base.shape())
    return sizing.bytes_in_pieces(
        hardware.sharding,
        hardware.offload,
        hardware.processes,
        (needs.total_weights, needs.moving_weights, needs.body_weights),
        needs.held_bytes,
        needs.peak_bytes,
        int(text.get("num_hidden_layers", 1)),
    )


_ESTIMATES = [
    "memory.train_gib with --gpu and hardware.sharding: the dry run of one process, divided; nothing was run",
    "memory.evaluate_gib, memory.compress_gib: few models were measured (docs/figures.md); beside sft and "
    "classification, evaluate is taken for copies of the model",
    "run.seconds and run.dollars: arithmetic over a stated efficiency; early stopping may end it sooner",
    "checkpoints_gib: on train's node and, while it goes on, in the store: by their tensors",
    "anything of a GPU: nothing of it was measured on one",
]


def _after_train(
    spec: PipelineSpec,
    needs: Any,
    base: Base,
    rows: Sequence[Mapping[str, Any]],
    target: str,
    available_gib: float | None,
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Peak bytes of the later stages that load the model, and which of them do not fit."""
    given = needs, base.folder, base.file_bytes, rows
    peaks = footprints.of_stages(spec, *given)
    machine = available_gib or available_memory_gib()
    limits = {stage: footprints.limit_gib(spec, stage, target, machine) for stage in peaks}
    return peaks, footprints.unfit(spec, peaks, limits, footprints.smaller_batches(spec, *given))


def _left(
    spec: PipelineSpec, needs: Any, base: Base, rows: Sequence[Mapping[str, Any]], train: int, whole: float
) -> dict[str, int]:
    """What a run leaves in the store, of a corpus of `whole` examples, so many of them in train."""
    test = 1 - train / _train_share(spec) / whole if spec.split.test_source else spec.split.ratios[2]
    return storage.left_bytes(spec, needs, base.folder, base.file_bytes, rows, round(whole), test)


def _checkpoints(spec: PipelineSpec, needs: Any) -> int:
    """Bytes of all that exist at once; one more than are kept while it is written."""
    count = (spec.train.keep_checkpoints + 1) * sizing.at_once(spec.train)
    return sizing.checkpoint_bytes(needs.moving_weights, count)


def _run(
    config: TrainConfig, needs: Any, examples: int, gpu: str, dollars_per_hour: float | None
) -> dict[str, Any]:
    sizes = needs.tokens_per_example, needs.loss_share, needs.body_weights
    head = needs.total_weights - needs.body_weights
    ends = [sizing.work(each(config), examples, *sizes, head) for each in (sizing.heaviest, sizing.lightest)]
    times = sizing.trainings(config)
    steps, tokens, flop = (
        times * max(getattr(e, name) for e in ends) for name in ("steps", "tokens", "flop")
    )
    if gpu:
        rate, efficiency = sizing.gpu(gpu).flop_per_second, sizing.GPU_EFFICIENCY
    else:
        rate, efficiency = sizing.matmul_flop_per_second(), sizing.CPU_EFFICIENCY
    seconds = flop / (rate * efficiency)
    found = {
        "examples": examples,
        "steps": steps,
        "tokens": round(tokens),
        "seconds": round(seconds, 1),
        "on": gpu or "this machine's processors",
        "peak_gflop_per_second": round(rate / 1e9),
        "efficiency": efficiency,
    }
    if config.search:
        found["trials"] = times  # none of them ended early: an upper bound
    if dollars_per_hour is not None:
        found["dollars"] = round(seconds / 3600 * dollars_per_hour, 2)
    return found
