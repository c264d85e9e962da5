"""The loop: updates, evaluations on eval, early stopping, checkpoints."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from components.shared import causal, clock
from components.shared.errors import TuneyardError
from components.shared.progress import Progress
from components.train import checkpoint
from components.train.config import TrainConfig
from components.train.data import dealt, schedule_batches
from components.train.objectives import Objective
from components.train.ranks import ALONE, Ranks

log = logging.getLogger("tuneyard.train")


@dataclass
class Fit:
    """How a fit went.

    Args:
        history: a row for each update, with its time in seconds since the epoch, and eval_loss where it was
            evaluated.
        base_loss: loss on eval before the first update.
        best_loss: the lowest loss on eval, after update `best_step`.
        stale: evaluations in a row that did not improve on it.
        stopped_early: whether that ended the fit.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    base_loss: float = math.inf
    best_loss: float = math.inf
    best_step: int = 0
    stale: int = 0
    stopped_early: bool = False


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


def eval_loss(
    objective: Objective,
    encoded: Sequence[Any],
    config: TrainConfig,
    precision: causal.Precision,
    ranks: Ranks = ALONE,
) -> float:
    """Mean loss in nats over the terms of these examples."""
    import torch

    objective.model.eval()
    total = 0.0
    budget = config.per_device_batch_size * config.max_length
    with clock.arithmetic(), torch.inference_mode(), autocast(precision):
        for indices in ranks.share(list(causal.by_length([len(e) for e in encoded], budget))):
            total += float(objective.summed_loss([encoded[i] for i in indices], 0.0))
    objective.model.train()
    return ranks.sum(total) / sum(map(objective.terms, encoded))


def fit(
    objective: Objective,
    train: Sequence[Any],
    evaluation: Sequence[Any],
    config: TrainConfig,
    precision: causal.Precision,
    folder: Path,
    report: Callable[[list[dict[str, float]], bool], None],
    ranks: Ranks = ALONE,
    saved: Callable[[Path], None] = lambda _: None,
) -> Fit:
    """Fit the model; at the end it holds the weights of the best evaluation.

    Args:
        objective: with its model, adapter applied.
        train: encoded examples.
        evaluation: encoded examples, judged while fitting.
        config: settings.
        precision: to compute in.
        folder: for checkpoints; it goes on from the newest whole one there.
        report: receives the history after each update, and at the end with True.
        ranks: the processes that do this together, each calling this with the same arguments.
        saved: receives the folder of each checkpoint, in the process that writes.

    Raises:
        TuneyardError: the loss is not finite.
    """
    steps = schedule_batches([len(e) for e in train], config)
    judge = partial(eval_loss, objective, evaluation, config, precision, ranks)
    optimizer, state, best, start = _begin(folder, objective.model, config, judge)
    update = partial(_timed_update, objective, optimizer, len(steps), config, precision, ranks)
    every = config.eval_steps or max(1, math.ceil(len(steps) / 10))
    tokens, seconds, progress = 0, 0.0, Progress("train", len(steps), "steps", done=start)
    for number in range(start, len(steps)):
        batches = [[train[i] for i in micro] for micro in steps[number]]
        row, took = update(number, batches)
        tokens, seconds = tokens + sum(len(e) for micro in batches for e in micro), seconds + took
        row |= {"time": time.time(), "tokens_per_second": tokens / seconds}
        last = number + 1 == len(steps)
        if (number + 1) % every == 0 or last:
            best = _judge(state, row, objective, best, config, judge())
        state.history.append(row)
        _show(progress, row, state, ranks)
        if state.stopped_early:
            break
        if (number + 1) % config.checkpoint_steps == 0 and not last and ranks.writes:
            saved(_save(folder, number + 1, objective.model, optimizer, best, state, config))
        report(state.history, False)
    report(state.history, True)
    return _finish(objective.model, best, state)


def _finish(model: Any, best: Any, state: Fit) -> Fit:
    """Leave the best weights in the model, and warn where they are no better than the base's."""
    checkpoint.restore_weights(model, best)
    model.eval()
    if not state.best_loss < state.base_loss:
        log.warning(
            "train: the loss on eval never fell below the base model's (%.3f, at best %.3f): "
            "lower train.learning_rate, or train longer",
            state.base_loss,
            state.best_loss,
        )
    return state


def _show(progress: Progress, row: Mapping[str, float], state: Fit, ranks: Ranks) -> None:
    if not ranks.writes:
        return
    evaluated = f"{state.best_loss if state.best_step else state.base_loss:.3f}"
    speed = f"{row['tokens_per_second']:.0f} tokens/s"
    progress.advance(loss=f"{row['loss']:.3f}", eval=evaluated, speed=speed)
    if state.stopped_early:
        log.info("train: eval loss has not fallen in %d evaluations; stopped early", state.stale)


def _save(
    folder: Path, step: int, model: Any, optimizer: Any, best: Any, state: Fit, config: TrainConfig
) -> Path:
    return checkpoint.save(folder, step, model, optimizer, best, asdict(state), config.keep_checkpoints)


def _begin(
    folder: Path, model: Any, config: TrainConfig, judge: Callable[[], float]
) -> tuple[Any, Fit, Any, int]:
    """(optimizer, state, best weights, updates done), from the newest whole checkpoint where there is one."""
    import torch

    torch.manual_seed(config.seed)
    optimizer = make_optimizer(model, config)
    model.train()
    found = checkpoint.newest(folder)
    if found is None:
        return optimizer, Fit(base_loss=judge()), {}, 0
    best = checkpoint.load(found[0], model, optimizer)
    log.info("train: resuming after step %d", found[1]["step"])
    return optimizer, Fit(**found[1]["state"]), best, int(found[1]["step"])


def _judge(
    state: Fit, row: dict[str, float], objective: Objective, best: Any, config: TrainConfig, eval_loss: float
) -> Any:
    """Note an evaluation, and what it does to best weights and patience. Returns the best weights."""
    row["eval_loss"] = eval_loss
    if not math.isfinite(row["eval_loss"]):
        raise TuneyardError(
            f"train: the eval loss is {row['eval_loss']} after step {row['step']}",
            "lower train.learning_rate, or set train.precision: float32",
        )
    stopping = config.early_stopping
    state.stale = (
        0 if row["eval_loss"] < state.best_loss - (stopping.min_delta if stopping else 0) else state.stale + 1
    )
    state.stopped_early = bool(stopping and state.stale >= stopping.patience)
    if row["eval_loss"] >= state.best_loss:
        return best
    state.best_loss, state.best_step = row["eval_loss"], int(row["step"])
    return checkpoint.copy_weights(objective.model)


def _timed_update(
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
    row = {"step": number + 1, **_update(objective, batches, optimizer, rate, config, precision, ranks)}
    return row, time.monotonic() - began


def _update(
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
    learning_rate and grad_norm (before clipping).
    """
    import torch

    terms = sum(objective.terms(e) for micro in batches for e in micro)
    loss = 0.0
    for micro in dealt(batches, ranks, config):
        with clock.arithmetic():
            with autocast(precision):
                part = objective.summed_loss(micro, config.label_smoothing) / terms
            part.backward()
            loss += float(part.detach())
    loss = ranks.sum(loss)
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
    return {"loss": loss, "learning_rate": rate, "grad_norm": norm}
