"""One optimizer update: its learning rate, its gradient over all micro-batches, and the step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from components.shared import causal, clock, interrupts
from components.shared.errors import TuneyardError
from components.train import checkpoint, measures
from components.train.adapters import unfreezing
from components.train.config import TrainConfig
from components.train.data import dealt
from components.train.objectives.base import Objective
from components.train.ranks import ALONE, Ranks
from components.train.sharding.whole import Whole


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Rate of update `step` (from 0): linear warm-up, then a cosine or a line down to min_learning_rate.

    The peak is reached on the last update of the warm-up (Loshchilov and Hutter 2017, arXiv:1608.03983).
    """
    peak = config.peak_rate
    warmup = max(1, round(steps * config.warmup_fraction)) if config.warmup_fraction else 0
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = min(config.min_learning_rate, peak)
    left = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (peak - floor) * left


def make_optimizer(model: Any, config: TrainConfig) -> Any:
    """AdamW (arXiv:1711.05101) with weight decay on matrices, none on biases, norms and scales.

    A group's `share` is what part of the learning rate its weights get: see the adapter's `layer_decay`.
    """
    import torch

    shares = unfreezing.rate_shares(model, config.adapter)
    groups: dict[tuple[bool, float], list[Any]] = {}
    for name, weight in checkpoint.trainable(model).items():
        # IA3's scales begin at one; decay would pull them to zero.
        decays = weight.ndim > 1 and ".ia3_" not in name
        groups.setdefault((decays, shares.get(name, 1.0)), []).append(weight)
    settings = [
        {"params": weights, "weight_decay": config.weight_decay if decays else 0.0, "share": share}
        for (decays, share), weights in groups.items()
    ]
    # fused: one pass over the weights; the default makes one for each operation, six times as long on a CPU.
    return torch.optim.AdamW(settings, fused=True)


def autocast(precision: causal.Precision) -> Any:
    """bfloat16 arithmetic over float32 weights, or nothing."""
    import torch

    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(causal.device().type, dtype=torch.bfloat16)


def timed_update(
    objective: Objective,
    layout: Whole,
    total: int,
    config: TrainConfig,
    precision: causal.Precision,
    note: Callable[[dict[str, float], int, float], None],
    looked_at: Callable[[int], bool],
    number: int,
    batches: Sequence[Sequence[Any]],
) -> None:
    """Step `number` (from 0) of `total`, and take note of it in the same breath.

    Args:
        objective: with its model.
        layout: of its weights and their optimizer, among the processes.
        total: updates of the run.
        config: settings.
        precision: to compute in.
        note: receives the row of the history, the tokens of the update, and its seconds.
        looked_at: whether the row of an update has the figures of each group and of the machine.
        number: of the update.
        batches: [micro-batch] -> encoded examples.
    """
    layout.ranks.seed(config.seed, number)
    unfreezing.thaw(objective.model, config.adapter, number, total)
    began = time.monotonic()
    rate = learning_rate(number, total, config)
    tokens = sum(objective.tokens(e) for micro in batches for e in micro)
    moving = checkpoint.trainable(objective.model) if looked_at(number) else {}
    weights = layout.parts({name: weight for name, weight in moving.items() if weight.requires_grad})
    before = measures.sample(weights)
    rows: list[dict[str, float]] = []
    with contextlib.ExitStack() as whole:
        for turn in objective.turns(batches, partial(autocast, precision)):
            found = gradients(objective, turn, config, precision, layout.ranks, layout)
            if not rows:
                whole.enter_context(interrupts.held())
            rows.append(found | step(layout.optimizer, rate, layout))
        row = {"step": number + 1, "learning_rate": rate}
        row |= {name: sum(each[name] for each in rows) / len(rows) for name in rows[0]}
        row = row | layout.moved(before, weights) | measures.machine() if weights else measures.plain(row)
        note(row, tokens, time.monotonic() - began)


def gradients(
    objective: Objective,
    batches: Sequence[Sequence[Any]],
    config: TrainConfig,
    precision: causal.Precision,
    ranks: Ranks = ALONE,
    layout: Whole | None = None,
) -> dict[str, float]:
    """The gradient of one update, clipped; the loss is the mean over all terms of all its micro-batches.

    Each micro-batch divides its sum by the terms of the whole update, so k micro-batches give the gradient of
    one batch however the terms are spread over them, and over processes.

    Returns:
        The loss, the figures of penalties, of the gradient before clipping what measures.clip says, and the
        objective's own notes.

    Raises:
        TuneyardError: the loss is not finite.
    """
    layout = layout or Whole(ranks)
    terms = sum(objective.terms(e) for micro in batches for e in micro)
    for weight in checkpoint.trainable(objective.model).values():
        weight.grad = None  # of an update that was interrupted
    micros, arithmetic = dealt(batches, ranks, config, objective.packs), partial(autocast, precision)
    loss = ranks.sum(objective.gradient(micros, terms, config.label_smoothing, arithmetic, ranks))
    if not math.isfinite(loss):
        raise TuneyardError(
            f"train: the loss is {loss} in {precision}",
            "lower train.learning_rate, or set train.precision: float32",
        )
    besides: dict[str, float] = {}
    for penalty in objective.penalties:
        besides |= penalty(micros, terms, arithmetic, ranks)
    weights = checkpoint.trainable(objective.model)
    layout.reduce(weights)
    with clock.arithmetic():
        norms = layout.clip(weights, config.max_grad_norm)
    return {"loss": loss, **besides, **norms, **objective.notes()}


def step(optimizer: Any, rate: float, layout: Whole | None = None) -> dict[str, float]:
    """Move the weights by their gradients at a learning rate. Returns what the history is to have of it."""
    layout = layout or Whole(ALONE, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]
    with clock.arithmetic():
        return layout.step()
