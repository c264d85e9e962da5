"""A fit as it goes: its history, its best weights, and what a checkpoint holds of it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from components.shared import interrupts
from components.shared.errors import TuneyardError
from components.train import checkpoint
from components.train.config import TrainConfig
from components.train.sharding.whole import Whole

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
        base_retention_loss: loss on the retention set before the first update; NaN where there is none.
        range_test: `rate` and `curve`, see finder.Found, where the learning rate was looked for.
        first: of a second phase, how the first one went: the fields of its own Fit, and `original`, the
            losses of the base before either, on eval and retention set; empty without a first phase.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    base_loss: float = math.inf
    best_loss: float = math.inf
    best_step: int = 0
    stale: int = 0
    stopped_early: bool = False
    base_retention_loss: float = math.nan
    range_test: dict[str, Any] = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)

    @property
    def before(self) -> int:
        """Updates of the first phase, where this is the second."""
        return len(self.first["history"]) if self.first else 0


@dataclass
class Ongoing:
    """A fit between two updates: all that a checkpoint holds.

    Args:
        layout: of the model, with the weights after the last update, and of their optimizer.
        state: how it went so far; its history has a row for each update.
        best: this process's parts of the weights of the best evaluation.
        random: random state after the last update.
        saved: updates in the newest checkpoint that is where it belongs, in the store too.
        written: updates in the newest that is on this disk, and its folder in the process that writes.
        tokens: trained on by this process.
        seconds: that took.
    """

    layout: Whole
    state: Fit
    best: Mapping[str, Any]
    random: Mapping[str, Any]
    saved: int
    written: tuple[int, Path | None] | None = None
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
        of_step = {"step_tokens": tokens, "step_seconds": seconds}
        self.state.history.append({**row, **of_step, "time": time.time(), "tokens_per_second": speed})
        self.random = checkpoint.random_state()

    def due(self, every: int, total: int) -> bool:
        """Whether the last update is to be followed by an evaluation that has not been yet."""
        if not self.done or "eval_loss" in self.state.history[-1]:
            return False
        return self.done % every == 0 or self.done == total

    def judge(self, config: TrainConfig, eval_loss: float, **notes: float) -> None:
        """Take note of an evaluation, and of what it does to best weights and patience."""
        row, state, loss = self.state.history[-1], self.state, eval_loss
        if not math.isfinite(loss):
            raise TuneyardError(
                f"train: the eval loss is {loss} after step {self.done}",
                "lower train.learning_rate, or set train.precision: float32",
            )
        stopping = config.early_stopping
        with interrupts.held():
            row |= {"eval_loss": loss, **notes}
            improved = loss < state.best_loss - (stopping.min_delta if stopping else 0)
            state.stale = 0 if improved else state.stale + 1
            state.stopped_early = bool(stopping and state.stale >= stopping.patience)
            if loss < state.best_loss:
                state.best_loss, state.best_step = loss, self.done
                self.best = self.layout.copy()
        if state.stopped_early:
            log.info("train: eval loss has not fallen in %d evaluations; stopped early", state.stale)

    def save(self, folder: Path, config: TrainConfig) -> Path | None:
        """Write a checkpoint, all processes together; those of two phases are numbered on.

        Returns:
            Its folder, in the process that writes.
        """
        layout = self.layout
        if not layout.ranks.writes and not layout.in_pieces:
            return None
        tensors = {
            "weights": layout.whole(layout.copy()),
            "moments": layout.moments(),
            "random": self.random,
            "best": layout.whole(self.best),
        }
        if not layout.ranks.writes:
            return None
        number = self.state.before + self.done
        return checkpoint.save(folder, number, tensors, asdict(self.state), config.keep_checkpoints)
