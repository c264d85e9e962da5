"""One optimizer update: its learning rate, its gradient over all micro-batches, and the step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from components.shared import causal, clock
from components.shared.errors import TuneyardError
from components.train import checkpoint
from components.train.config import TrainConfig
from components.train.data import dealt
from components.train.objectives.base import Objective
from components.train.ranks import ALONE, Ranks


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Rate of update `step` (from 0): linear warm-up, then a cosine down to min_learning_rate.

    The peak is reached on the last update of the warm-up (Loshchilov and Hutter 2017, arXiv:1608.03983).
    """
    peak = config.learning_rate
    warmup = max(1, round(steps * config.warmup_fraction)) if config.warmup_fraction else 0
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = min(config.min_learning_rate, peak)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: Any, config: TrainConfig) -> Any:
    """AdamW (arXiv:1711.05101) with weight decay on matrices, none on biases and norms."""
    import torch

    weights = list(checkpoint.trainable(model).values())
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
    ]
    # fused: one pass over the weights; the default makes one for each operation, six times as long on a CPU.
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, fused=True)


def autocast(precision: causal.Precision) -> Any:
    """bfloat16 arithmetic over float32 weights, or nothing."""
    import torch

    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(causal.device().type, dtype=torch.bfloat16)


def timed_update(
    objective: Objective,
    optimizer: Any,
    total: int,
    config: TrainConfig,
    precision: causal.Precision,
    ranks: Ranks,
    number: int,
    batches: Sequence[Sequence[Any]],
) -> tuple[dict[str, float], float]:
    """Update `number` (from 0) of `total`: its row of the history, and the seconds it took."""
    ranks.seed(config.seed, number)
    began = time.monotonic()
    rate = learning_rate(number, total, config)
    rows = [
        update(objective, turn, optimizer, rate, config, precision, ranks)
        for turn in objective.turns(batches, partial(autocast, precision))
    ]
    row = {"step": number + 1, **{name: sum(r[name] for r in rows) / len(rows) for name in rows[0]}}
    return row, time.monotonic() - began


def update(
    objective: Objective,
    batches: Sequence[Sequence[Any]],
    optimizer: Any,
    rate: float,
    config: TrainConfig,
    precision: causal.Precision,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """One optimizer update; the loss is the mean over all terms of all its micro-batches.

    Each micro-batch divides its sum by the terms of the whole update, so k micro-batches give the gradient of
    one batch however the terms are spread over them, and over processes. Returns loss (nats),
    learning_rate, grad_norm (before clipping) and the objective's own notes.
    """
    import torch

    terms = sum(objective.terms(e) for micro in batches for e in micro)
    micros, arithmetic = dealt(batches, ranks, config), partial(autocast, precision)
    loss = ranks.sum(objective.gradient(micros, terms, config.label_smoothing, arithmetic, ranks))
    if not math.isfinite(loss):
        raise TuneyardError(
            f"train: the loss is {loss} at learning rate {rate:.2e} in {precision}",
            "lower train.learning_rate, or set train.precision: float32",
        )
    weights = list(checkpoint.trainable(objective.model).values())
    ranks.add_gradients(weights)
    for group in optimizer.param_groups:
        group["lr"] = rate
    with clock.arithmetic():
        norm = float(torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "learning_rate": rate, "grad_norm": norm, **objective.notes()}
