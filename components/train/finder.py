"""The learning-rate range test: `learning_rate: auto` (Smith 2017, arXiv:1506.01186, section 3.3).

The rate grows from step to step until the loss does too. What is looked at is not the loss, which differs
more from batch to batch than a step changes it, but how far it is from the base's on the same examples.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import causal
from components.shared.errors import TuneyardError
from components.shared.progress import Progress
from components.train import checkpoint
from components.train.adapters import unfreezing
from components.train.config import TrainConfig
from components.train.objectives.base import Objective
from components.train.ranks import ALONE, Ranks
from components.train.update import gradients, make_optimizer, step

log = logging.getLogger("tuneyard.train")

_LOWEST, _HIGHEST, _PER_DECADE = 1e-7, 10.0, 8
# Of the mean that runs over the points: noise of single batches, dropout's above all, must not look steep.
_SMOOTHING = 0.7
# Nats above the base's loss at which the test ends: the weights are lost.
_LOST = 1.0
_NOTE = "learning_rate.json"


@dataclass(frozen=True)
class Found:
    """What a range test found.

    Args:
        rate: to train with; 0 where none was looked for.
        curve: rows with `learning_rate` and `change`, the loss less the base's on the same examples, in nats.
    """

    rate: float = 0.0
    curve: tuple[dict[str, float], ...] = ()


def settle(
    objective: Objective,
    updates: Sequence[Sequence[Sequence[Any]]],
    config: TrainConfig,
    precision: causal.Precision,
    folder: Path,
    ranks: Ranks = ALONE,
    before: int = 0,
) -> Found:
    """The learning rate where settings say `auto`: what an earlier attempt found, or by a range test.

    Args:
        objective: its weights are left as they are, bit for bit, and so is the random state.
        updates: [update][micro-batch] -> encoded examples.
        config: settings.
        precision: to compute in.
        folder: of the checkpoints; what was found is kept there.
        ranks: the processes. Where there are several, what is found is kept in checkpoints alone.
        before: updates of an earlier phase.
    """
    if config.learning_rate != "auto":
        return Found()
    newest = checkpoint.newest(folder, before)
    known = newest[1]["state"]["range_test"] if newest else None
    note = folder / (f"after-{before}-{_NOTE}" if before else _NOTE)
    if known is None and ranks.count == 1 and note.exists():
        known = json.loads(note.read_text())
    if known is not None:
        return Found(known["rate"], tuple(known["curve"]))
    with _untouched(objective.model):
        unfreezing.thaw(objective.model, config.adapter, len(updates) - 1, len(updates))
        curve = range_test(objective, updates, config, precision, ranks)
    found = Found(pick(curve), tuple(curve))
    log.info("train: learning rate %.2g, by a range test of %d steps", found.rate, len(curve))
    if ranks.count == 1:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{note.name}"
        aside.write_text(json.dumps({"rate": found.rate, "curve": curve}))
        os.replace(aside, note)
    return found


def range_test(
    objective: Objective,
    updates: Sequence[Sequence[Sequence[Any]]],
    config: TrainConfig,
    precision: causal.Precision,
    ranks: Ranks = ALONE,
) -> list[dict[str, float]]:
    """Train for some tens of steps with a growing rate; the weights are changed. See `settle`."""
    steps = round(math.log10(_HIGHEST / _LOWEST) * _PER_DECADE) + 1
    given = [updates[n % len(updates)] for n in range(steps)]
    # Of each batch before any step: the test takes twice as long, and the noise of batches is gone.
    base = [gradients(objective, u, config, precision, ranks)["loss"] for u in given[: len(updates)]]
    optimizer = make_optimizer(objective.model, config)
    curve: list[dict[str, float]] = []
    progress = Progress("learning rate", steps, "steps")
    rate = 0.0
    for number, update in enumerate(given):
        try:
            loss = gradients(objective, update, config, precision, ranks)["loss"]
        except TuneyardError:
            break  # it is not finite: as lost as can be
        if number:
            curve.append({"learning_rate": rate, "change": loss - base[number % len(base)]})
            if curve[-1]["change"] > _LOST:
                break
        rate = _LOWEST * 10 ** (number / _PER_DECADE)
        step(optimizer, rate)
        progress.advance(rate=f"{rate:.1e}", loss=f"{loss:.3f}")
    return curve


def pick(curve: Sequence[dict[str, float]]) -> float:
    """The rate at which the smoothed loss falls most steeply, but at most a tenth of where it is lowest.

    Raises:
        TuneyardError: it never fell.
    """
    smooth, mean = [], 0.0
    for number, row in enumerate(curve, 1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * row["change"]
        smooth.append(mean / (1 - _SMOOTHING**number))
    lowest = min(range(len(smooth)), key=smooth.__getitem__, default=0)
    if len(smooth) < 3 or smooth[lowest] >= 0 or lowest == 0:
        shown = ", ".join(f"{row['learning_rate']:.0e}: {row['change']:+.3f}" for row in curve[::8])
        raise TuneyardError(
            f"train.learning_rate: auto found no rate at which the loss falls (nats by rate: {shown})",
            "look at the examples, or set train.learning_rate to a number",
        )
    steepest = min(range(1, lowest + 1), key=lambda n: smooth[n] - smooth[n - 1])
    return min(curve[steepest]["learning_rate"], curve[lowest]["learning_rate"] / 10)


@contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Afterwards weights, which of them move, buffers, gradients, mode and random states are as before."""
    import numpy
    import torch

    weights = checkpoint.copy_weights(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    moving = {
        name: (weight.requires_grad, weight.__dict__.copy()) for name, weight in model.named_parameters()
    }
    drawn = random.getstate(), numpy.random.get_state()
    devices = [causal.device()] if causal.device().type == "cuda" else []
    training = model.training
    try:
        with torch.random.fork_rng(devices=devices):
            model.train()
            yield
    finally:
        checkpoint.restore_weights(model, weights)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        for name, weight in model.named_parameters():
            weight.requires_grad_(moving[name][0])
            weight.__dict__.update(moving[name][1])
        model.zero_grad(set_to_none=True)
        model.train(training)
        random.setstate(drawn[0])
        numpy.random.set_state(drawn[1])
