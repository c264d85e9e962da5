"""What a training will need, before it starts: memory, from its own code run on tensors without bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import causal
from components.shared.dryrun import Live, no_weights_read, shapes_only
from components.train import checkpoint, selfcheck
from components.train.adapters.applying import apply_adapter, weight_counts
from components.train.config import TrainConfig
from components.train.data import fit_lengths, schedule_batches, total_steps
from components.train.fit import eval_loss
from components.train.objectives.base import Objective
from components.train.objectives.opening import open_objective
from components.train.update import gradients, make_optimizer, step

# Resident memory of the train process on a CPU that is no tensor: Python, PyTorch, PEFT, MLflow, and what the
# allocator keeps. Seen with benchmarks/fitting.py: MiniLM, full, 32 examples of 128 tokens, peaked at
# 1,701 MiB, its tensors by the dry run at 832.
HOST_BYTES = 950 * 2**20
# The same while the base is read, before MLflow and PEFT are imported: Gemma 3 270M peaked there at 2,262
# MiB, file and model being 1,534.
OPENING_BYTES = 720 * 2**20
# What the process holds beyond what lives, as a share of what an update allocates: blocks of lengths that do
# not come again, and a kernel of oneDNN for each of them. Seen with `python -m benchmarks footprint`.
SLACK = 0.22


@dataclass(frozen=True)
class Footprint:
    """Memory of a training, in bytes, and how large it is.

    Args:
        total_weights: of the model with its adapter.
        moving_weights: those that are trained.
        body_weights: those that every token passes; the rest is applied at positions with loss alone.
        held_bytes: model and moments, between updates.
        peak_bytes: of tensors, the most at once.
        load_bytes: of tensors and files, while the base is read.
        host_bytes: of the process besides; 0 on a GPU.
        batch_tokens: of the micro-batch that was run.
        tokens_per_example: on average.
        loss_share: of the tokens that the vocabulary projection sees, 0-1.
    """

    total_weights: int
    moving_weights: int
    body_weights: int
    held_bytes: int
    peak_bytes: int
    load_bytes: int
    host_bytes: int
    batch_tokens: int
    tokens_per_example: float
    loss_share: float

    @property
    def process_bytes(self) -> int:
        """Peak memory of the process on a CPU, or of the device."""
        working = self.peak_bytes - self.held_bytes
        opening = self.load_bytes + (OPENING_BYTES if self.host_bytes else 0)
        return max(self.host_bytes + self.peak_bytes + round(SLACK * working), opening)


def predict(
    config: TrainConfig, folder: Path, rows: Sequence[Mapping[str, Any]], file_bytes: int
) -> Footprint:
    """Dry-run a training: base and adapter, an evaluation, two updates of the heaviest micro-batch.

    Args:
        config: settings.
        folder: with config.json and tokenizer of the base; weights are not read.
        rows: train examples, all of them or some of every length.
        file_bytes: of the base's weights on disk.

    Raises:
        StageStopped: the examples do not fit the objective.
    """
    with shapes_only() as live, no_weights_read():
        objective = open_objective(config, rows, folder)
        loaded = live.bytes
        apply_adapter(objective, config)
        if config.gradient_checkpointing:
            objective.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            if hasattr(objective.model, "enable_input_require_grads"):
                objective.model.enable_input_require_grads()
        steps = total_steps(len(rows), config)
        moving, total = weight_counts(objective, config, steps)
        encoded, _ = fit_lengths(rows, objective.encode, objective.shorten, config)
        batches = heaviest(encoded, objective, config)
        precision = causal.preferred_precision(config.precision)
        selfcheck.measure(objective, selfcheck.choose(encoded, objective.model), precision)
        checked = live.peak
        peak, held = _update(objective, config, batches, live)
    tokens = sum(map(len, encoded))
    predicted = sum(map(objective.terms, encoded)) if objective.task == "causal-lm" else 0
    on_cpu = causal.device().type == "cpu"
    return Footprint(
        total_weights=total,
        moving_weights=moving,
        body_weights=total - _vocabulary_weights(objective),
        held_bytes=held,
        peak_bytes=max(peak, checked),
        load_bytes=loaded + (file_bytes if on_cpu else 0),
        host_bytes=HOST_BYTES if on_cpu else 0,
        batch_tokens=max(sum(map(len, batch)) for batch in batches),
        tokens_per_example=tokens / len(encoded),
        loss_share=predicted / tokens,
    )


def heaviest(encoded: Sequence[Any], objective: Objective, config: TrainConfig) -> list[list[Any]]:
    """The micro-batches among all of the run that can need most: most tokens, and the longest example."""
    lengths = [len(e) for e in encoded]
    micros = [m for update in schedule_batches(lengths, config, objective.packs) for m in update]
    padded = 0 if objective.packs else 1

    def tokens(micro: Sequence[int]) -> int:
        return len(micro) * max(lengths[i] for i in micro) if padded else sum(lengths[i] for i in micro)

    most = max(micros, key=tokens)
    squares = max(micros, key=lambda m: sum(lengths[i] ** 2 for i in m))
    return [[encoded[i] for i in micro] for micro in ([most] if most == squares else [most, squares])]


def _update(
    objective: Objective, config: TrainConfig, batches: Sequence[Sequence[Any]], live: Live
) -> tuple[int, int]:
    """(peak, held) bytes of updates with these micro-batches, after one that made the moments."""
    import torch

    precision = causal.preferred_precision(config.precision)
    optimizer = make_optimizer(objective.model, config)
    for weight in checkpoint.trainable(objective.model).values():
        weight.grad = torch.zeros_like(weight)
    rate = 1.0  # no arithmetic is done: any number serves
    step(optimizer, rate)
    best = checkpoint.copy_weights(objective.model)
    live.mark()
    held = live.bytes
    eval_loss(objective, batches[0], config, precision)
    objective.model.train()
    for batch in batches:
        gradients(objective, [batch] * min(2, config.gradient_accumulation_steps), config, precision)
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
