"""The loop: updates, evaluations on eval, early stopping, checkpoints."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from components.shared import causal, clock, interrupts
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


@dataclass
class Ongoing:
    """A fit between two updates: all that a checkpoint holds.

    Args:
        model: with the weights after the last update.
        optimizer: of them.
        state: how it went so far; its history has a row for each update.
        best: weights of the best evaluation.
        random: random state after the last update.
        saved: updates in the newest checkpoint.
        tokens: trained on by this process.
        seconds: that took.
    """

    model: Any
    optimizer: Any
    state: Fit
    best: Mapping[str, Any]
    random: Mapping[str, Any]
    saved: int
    tokens: int = 0
    seconds: float = 0.0

    @property
    def done(self) -> int:
        """Updates done."""
        return len(self.state.history)

    def note(self, row: dict[str, float], tokens: int, seconds: float) -> None:
        """Take note of an update, together with which this must be done or not at all."""
        self.tokens += tokens
        self.seconds += seconds
        speed = self.tokens / self.seconds
        self.state.history.append({**row, "time": time.time(), "tokens_per_second": speed})
        self.random = checkpoint.random_state()

    def due(self, every: int, total: int) -> bool:
        """Whether the last update is to be followed by an evaluation that has not been yet."""
        if not self.done or "eval_loss" in self.state.history[-1]:
            return False
        return self.done % every == 0 or self.done == total

    def judge(self, config: TrainConfig, loss: float) -> None:
        """Take note of an evaluation, and of what it does to best weights and patience."""
        row, state = self.state.history[-1], self.state
        if not math.isfinite(loss):
            raise TuneyardError(
                f"train: the eval loss is {loss} after step {self.done}",
                "lower train.learning_rate, or set train.precision: float32",
            )
        stopping = config.early_stopping
        with interrupts.held():
            row["eval_loss"] = loss
            improved = loss < state.best_loss - (stopping.min_delta if stopping else 0)
            state.stale = 0 if improved else state.stale + 1
            state.stopped_early = bool(stopping and state.stale >= stopping.patience)
            if loss < state.best_loss:
                state.best_loss, state.best_step = loss, self.done
                self.best = checkpoint.copy_weights(self.model)
        if state.stopped_early:
            log.info("train: eval loss has not fallen in %d evaluations; stopped early", state.stale)

    def save(self, folder: Path, config: TrainConfig) -> Path:
        """Write a checkpoint. Returns its folder."""
        path = checkpoint.save(
            folder,
            self.done,
            self.model,
            self.optimizer,
            self.best,
            asdict(self.state),
            config.keep_checkpoints,
            self.random,
        )
        self.saved = self.done
        return path


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
    steps = schedule_batches([len(e) for e in train], config, objective.packs)
    judge = partial(eval_loss, objective, evaluation, config, precision, ranks)
    now = _begin(folder, objective.model, config, judge)
    update = partial(timed_update, objective, now.optimizer, len(steps), config, precision, ranks, now.note)
    every = config.eval_steps or max(1, math.ceil(len(steps) / 10))
    progress = Progress("train", len(steps), "steps", done=now.done)

    save = partial(_save, now, folder, config, ranks, saved)
    with _saved_when_interrupted(save):
        while True:
            if now.due(every, len(steps)):
                now.judge(config, judge())
            report(now.state.history, False)
            if now.done == len(steps) or now.state.stopped_early:
                break
            if now.done % config.checkpoint_steps == 0:
                save()
            update(now.done, [[train[i] for i in micro] for micro in steps[now.done]])
            _show(progress, now.state, ranks)
    report(now.state.history, True)
    return _finish(objective.model, now.best, now.state)


def _save(
    now: Ongoing, folder: Path, config: TrainConfig, ranks: Ranks, saved: Callable[[Path], None]
) -> None:
    if ranks.writes and now.done > now.saved:
        saved(now.save(folder, config))


@contextlib.contextmanager
def _saved_when_interrupted(save: Callable[[], None]) -> Iterator[None]:
    """A machine that is taken away says so some seconds before: what was computed until then is kept."""
    try:
        yield
    except KeyboardInterrupt:
        save()
        log.info("train: interrupted; a checkpoint holds what was done")
        raise


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


def _show(progress: Progress, state: Fit, ranks: Ranks) -> None:
    if not ranks.writes:
        return
    row = state.history[-1]
    evaluated = f"{state.best_loss if state.best_step else state.base_loss:.3f}"
    speed = f"{row['tokens_per_second']:.0f} tokens/s"
    progress.advance(loss=f"{row['loss']:.3f}", eval=evaluated, speed=speed)


def _begin(folder: Path, model: Any, config: TrainConfig, judge: Callable[[], float]) -> Ongoing:
    """The start, or where the newest whole checkpoint leaves off."""
    import torch

    torch.manual_seed(config.seed)
    optimizer = make_optimizer(model, config)
    model.train()
    found = checkpoint.newest(folder)
    if found is None:
        return Ongoing(model, optimizer, Fit(base_loss=judge()), {}, checkpoint.random_state(), saved=0)
    best = checkpoint.load(found[0], model, optimizer)
    log.info("train: resuming after step %d", found[1]["step"])
    state = Fit(**found[1]["state"])
    return Ongoing(model, optimizer, state, best, checkpoint.random_state(), saved=len(state.history))
