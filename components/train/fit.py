"""The loop: updates, evaluations on eval, early stopping, checkpoints."""

from __future__ import annotations

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
from components.train.data import schedule_batches
from components.train.objectives.base import Objective
from components.train.ranks import ALONE, Ranks
from components.train.update import autocast, make_optimizer, timed_update

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


def eval_loss(
    objective: Objective,
    encoded: Sequence[Any],
    config: TrainConfig,
    precision: causal.Precision,
    ranks: Ranks = ALONE,
) -> float:
    """Mean loss over the terms of these examples."""
    import torch

    objective.model.eval()
    batches = causal.by_length([len(e) for e in encoded], config.per_device_batch_size * config.max_length)
    with clock.arithmetic(), torch.inference_mode(), autocast(precision):
        total = objective.judged_loss(encoded, batches, ranks)
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
    update = partial(timed_update, objective, optimizer, len(steps), config, precision, ranks)
    every = config.eval_steps or max(1, math.ceil(len(steps) / 10))
    tokens, seconds, progress = 0, 0.0, Progress("train", len(steps), "steps", done=start)
    for number in range(start, len(steps)):
        batches = [[train[i] for i in micro] for micro in steps[number]]
        row, took = update(number, batches)
        tokens += sum(objective.tokens(e) for micro in batches for e in micro)
        seconds += took
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
    row |= {"eval_loss": eval_loss, **objective.judged_notes()}
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
