"""What a training will need, before it starts: memory, from its own code run on tensors without bytes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from components.shared import causal, nf4, tasks
from components.shared.dryrun import Live, no_weights_read, shapes_only
from components.train import checkpoint, dry_start, phases, selfcheck
from components.train.adapters.applying import weight_counts
from components.train.beginning import adapt
from components.train.config import TrainConfig
from components.train.data import total_steps
from components.train.fit import eval_loss
from components.train.longest import longest_answers
from components.train.objectives.base import Objective
from components.train.objectives.opening import computed_in, open_objective
from components.train.update import autocast, gradients, make_optimizer, step

# Resident memory of the train process on a CPU that is no tensor: Python, PyTorch, PEFT, MLflow, and what the
# allocator keeps. Seen with benchmarks/fitting.py: MiniLM, full, 32 examples of 128 tokens, peaked at
# 1,701 MiB, its tensors by the dry run at 832.
HOST_BYTES = 950 * 2**20
# Besides, for models that read padded texts: kernels of oneDNN. A whole run of classify_finance, 282 updates,
# peaked at 2,147 MiB.
KERNEL_BYTES = 110 * 2**20
# The same while the base is read, before MLflow and PEFT are imported: Gemma 3 270M peaked there at 2,262
# MiB, file and model being 1,534.
OPENING_BYTES = 720 * 2**20
# What the process holds beyond what lives, as a share of what an update allocates: blocks of lengths that do
# not come again, and a kernel of oneDNN for each of them. Seen with `python -m benchmarks footprint`.
SLACK = 0.18
# Of optimizer updates that one step is made of: the second one has what the first one left.
_UPDATES = 2


@dataclass(frozen=True)
class Beside:
    """What a training has beside its base and its train examples.

    Args:
        reward_model: its folder, without weights; None for none.
        teacher: the same.
        file_bytes: of the weights of the larger of the two.
        documents: of train, for the first of two phases.
        retained: rows of the retention set.
        examples: that a teacher reads, of train and eval; 0 for those that are given.
    """

    reward_model: Path | None = None
    teacher: Path | None = None
    file_bytes: int = 0
    documents: Sequence[Mapping[str, Any]] = ()
    retained: Sequence[dict[str, Any]] = ()
    examples: int = 0


@dataclass(frozen=True)
class Footprint:
    """Memory of a training, in bytes, and how large it is.

    Args:
        total_weights: of the model with its adapter.
        moving_weights: those that are trained.
        body_weights: those that every token passes; the rest is applied at positions with loss alone.
        held_bytes: models and moments, between updates.
        peak_bytes: of tensors, the most at once.
        kept_bytes: of what a teacher said of the examples that were not run, in the memory of the host.
        load_bytes: of tensors and files, while the models are read.
        host_bytes: of the process besides; 0 on a GPU.
        batch_tokens: of the micro-batch that was run.
        tokens_per_example: that are read of an encoded one, on average.
        loss_share: of the tokens that the vocabulary projection sees, 0-1.
        pieces: encoded examples for each that was given: more where they are split, fewer where dropped.
        first: of the first of two phases, where there are two.
    """

    total_weights: int
    moving_weights: int
    body_weights: int
    held_bytes: int
    peak_bytes: int
    kept_bytes: int
    load_bytes: int
    host_bytes: int
    batch_tokens: int
    tokens_per_example: float
    loss_share: float
    pieces: float
    first: Footprint | None = None

    @property
    def process_bytes(self) -> int:
        """Peak memory of the process on a CPU, or of the device; of two phases the larger."""
        working = self.peak_bytes - self.held_bytes
        host = HOST_BYTES if self.first else OPENING_BYTES
        opening = self.load_bytes + (host if self.host_bytes else 0)
        own = max(self.host_bytes + self.peak_bytes + self.kept_bytes + round(SLACK * working), opening)
        return max(own, self.first.process_bytes) if self.first else own

    @property
    def device_bytes(self) -> int:
        """The most tensors at once, on whatever device they are; of two phases the larger."""
        return max(self.peak_bytes, self.first.peak_bytes if self.first else 0)


def predict(
    config: TrainConfig,
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    file_bytes: int,
    beside: Beside | None = None,
) -> Footprint:
    """Dry-run a training, each phase of it: the models, an evaluation, two updates of the heaviest batch.

    Args:
        config: settings.
        folder: with config.json and tokenizer of the base; weights are not read.
        rows: train examples, all of them or some of every length.
        file_bytes: of the base's weights on disk.
        beside: what else it has.

    Raises:
        StageStopped: the examples do not fit the objective.
    """
    beside = beside or Beside()
    opened = partial(_phase, folder=folder, file_bytes=file_bytes)
    with shapes_only() as live, no_weights_read(), longest_answers(live):
        if not config.first:
            return opened(config, rows, beside=beside, live=live)[0]
        documents = Beside(documents=beside.documents)
        # What it moved is held until the second phase has ended, as the stage holds it.
        first, moved = opened(config.first_phase(), beside.documents, beside=documents, live=live)
        second, _ = opened(config, rows, beside=beside, live=live)
        del moved
    return replace(second, first=first)


def _phase(
    config: TrainConfig,
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    file_bytes: int,
    beside: Beside,
    live: Live,
) -> tuple[Footprint, Mapping[str, Any]]:
    """A phase, in the order of beginning.ready; and the weights it moved."""
    live.mark()
    objective = open_objective(config, rows, folder, beside.reward_model, beside.teacher)
    # What qlora quantised had been read whole.
    loaded = live.bytes + nf4.stored_bytes(objective.model) - nf4.held_bytes(objective.model)
    precision = computed_in(config)
    arithmetic = partial(autocast, precision)
    dry_start.answered(objective, rows)
    encoded = dry_start.encoded(objective, rows, config)
    checked = selfcheck.choose(encoded, objective.model)
    run = [*checked, *itertools.chain(*dry_start.heaviest(objective, encoded, config))]
    times = max(1.0, beside.examples / len(rows))
    kept = dry_start.prepared(objective, encoded, run, times, arithmetic, live)
    adapt(objective, config)
    moving, total = weight_counts(objective, config, total_steps(len(encoded), config))
    objective.start()
    selfcheck.measure(objective, checked, precision)
    if config.retain:
        dry_start.hold(objective, encoded, beside.retained, config, arithmetic)
    batches = dry_start.heaviest(objective, encoded, config)
    before = live.peak
    peak, held = _update(objective, config, batches, live)
    read = sum(map(objective.tokens, encoded))
    projected = sum(map(objective.terms, encoded)) if objective.task == "causal-lm" else 0
    on_cpu = causal.device().type == "cpu"
    found = Footprint(
        total_weights=total,
        moving_weights=moving,
        body_weights=total - _vocabulary_weights(objective),
        held_bytes=held,
        peak_bytes=max(peak, before),
        kept_bytes=kept,
        load_bytes=loaded + (max(file_bytes, beside.file_bytes) if on_cpu else 0),
        host_bytes=(HOST_BYTES + (0 if objective.packs else KERNEL_BYTES)) if on_cpu else 0,
        batch_tokens=max(sum(map(len, batch)) for batch in batches),
        tokens_per_example=read / len(encoded),
        loss_share=projected / read,
        pieces=len(encoded) / len(rows),
    )
    return found, phases.taken(objective.model)


def _update(
    objective: Objective, config: TrainConfig, batches: Sequence[Sequence[Any]], live: Live
) -> tuple[int, int]:
    """(peak, held) bytes of updates with these micro-batches, after one that made the moments."""
    import torch

    precision = computed_in(config)
    optimizer = make_optimizer(objective.model, config)
    for weight in checkpoint.trainable(objective.model).values():
        weight.grad = torch.zeros_like(weight)
    rate = 1.0  # no arithmetic is done: any number serves
    step(optimizer, rate)
    best = checkpoint.copy_weights(objective.model)
    live.mark()
    held = live.bytes
    eval_loss(objective, batches[0], config, precision)
    if objective.retained:
        eval_loss(objective, objective.retained.judged, config, precision)
    objective.model.train()
    # Where a step's prompts are answered first, all of them are in memory; else two micro-batches tell.
    many = config.gradient_accumulation_steps
    times = many if config.objective.kind in tasks.ANSWERING else min(2, many)
    for batch in batches:
        turns = objective.turns([batch] * times, partial(autocast, precision))
        for turn in itertools.islice(turns, _UPDATES):
            gradients(objective, turn, config, precision)
            step(optimizer, rate)
    checkpoint.copy_weights(objective.model)
    del best
    return live.peak, held


def _vocabulary_weights(objective: Objective) -> int:
    """Weights of the input and output embeddings, counted once where they are tied; 0 without them."""
    if objective.task in ("image-classification", "speech-recognition"):
        return 0
    found = {
        id(layer.weight): layer.weight.numel()
        for get in ("get_input_embeddings", "get_output_embeddings")
        if (layer := getattr(objective.model, get, lambda: None)()) is not None and hasattr(layer, "weight")
    }
    return sum(found.values())
