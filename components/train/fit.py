"""The loop: updates, evaluations on eval, early stopping, checkpoints."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from components.shared import causal, clock, interrupts, prompts
from components.shared.progress import Progress
from components.train import checkpoint, measures, shards
from components.train.config import TrainConfig
from components.train.diagnostics import Watch
from components.train.objectives.base import Objective
from components.train.ongoing import Fit, Ongoing
from components.train.plan import Plan, plan
from components.train.ranks import ALONE, Ranks
from components.train.sharding.whole import Whole
from components.train.update import autocast, make_optimizer, timed_update

log = logging.getLogger("tuneyard.train")


def eval_loss(
    objective: Objective,
    encoded: Sequence[Any],
    config: TrainConfig,
    precision: causal.Precision,
    layout: Whole | None = None,
) -> float:
    """Mean loss over the terms of these examples."""
    layout = layout or Whole(ALONE)
    objective.model.eval()
    batches = causal.by_length(shards.lengths(encoded), config.per_device_batch_size * config.max_length)
    with clock.arithmetic(), layout.forward_only(), autocast(precision):
        total = objective.judged_loss(encoded, batches, layout.ranks)
    objective.model.train()
    return layout.ranks.sum(total) / sum(map(objective.terms, encoded))


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
    first: Mapping[str, Any] | None = None,
    more: bool = False,
    layout: Whole | None = None,
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
        first: of a second phase, how the first one went (see Fit).
        more: whether another phase follows, so that the end is kept as a checkpoint too.
        layout: of weights and optimizer among the processes; None: whole in each.

    Raises:
        TuneyardError: the loss is not finite.
    """
    layout = layout or Whole(ranks)
    start = Fit(first=dict(first or {}))
    made = plan(objective, train, config, precision, folder, ranks, start.before)
    judge = partial(judged, objective, evaluation, made.config, precision, layout)
    lengths = shards.lengths(train)
    spare = train[min(range(len(train)), key=lengths.__getitem__)]
    now = _begin(folder, objective, made, judge, start, layout, spare)
    save = partial(_save, now, folder, config, saved)
    with _saved_when_interrupted(save, ranks) as asked:
        _run(objective, now, made, precision, judge, report, save, asked)
        if more:
            save()
    report(now.state.history, True)
    return _finish(layout, now.best, now.state)


def _run(
    objective: Objective,
    now: Ongoing,
    made: Plan,
    precision: causal.Precision,
    judge: Callable[[], dict[str, float]],
    report: Callable[[list[dict[str, float]], bool], None],
    save: Callable[[], None],
    asked: Callable[[], None],
) -> None:
    """Updates, and evaluations between them, to the end of the plan or of patience."""
    ranks = now.layout.ranks
    config, steps = made.config, len(made.updates)
    every = config.eval_steps or max(1, math.ceil(steps / 10))
    looks = measures.looks(steps, every)
    update = partial(timed_update, objective, now.layout, steps, config, precision, now.note, looks)
    watch = Watch(now.state.history, now.state.base_loss)
    progress = Progress("train", steps, "steps", done=now.done)
    while True:
        if now.due(every, steps):
            now.judge(config, **judge())
        if ranks.writes:
            watch.see(now.state.history)
        report(now.state.history, False)
        if now.done == steps or now.state.stopped_early:
            break
        asked()
        if now.done % config.checkpoint_steps == 0:
            save()
        update(now.done, made.updates[now.done])
        _show(progress, now.state, ranks)


def judged(
    objective: Objective,
    evaluation: Sequence[Any],
    config: TrainConfig,
    precision: causal.Precision,
    layout: Whole,
) -> dict[str, float]:
    """`eval_loss` with what the objective notes of it, and `retention_loss` where there is such a set."""
    found = {"eval_loss": eval_loss(objective, evaluation, config, precision, layout)}
    found |= objective.judged_notes()
    if objective.retained:
        found["retention_loss"] = eval_loss(objective, objective.retained.judged, config, precision, layout)
    return found


def _save(now: Ongoing, folder: Path, config: TrainConfig, saved: Callable[[Path], None]) -> None:
    if now.done <= now.saved:
        return
    if now.written is None or now.written[0] != now.done:
        now.written = now.done, now.save(folder, config)
    if path := now.written[1]:
        saved(path)
    now.saved = now.done  # not before: what was cut off, of writing or of storing, is done again


@contextlib.contextmanager
def _saved_when_interrupted(save: Callable[[], None], ranks: Ranks) -> Iterator[Callable[[], None]]:
    """A machine that is taken away says so some seconds before: what was computed until then is kept.

    Alone, a process saves at once. Several have to agree: what one of them is told all learn between two
    updates, by a function that this gives and that raises KeyboardInterrupt in each.
    """
    with contextlib.ExitStack() as several:
        told = several.enter_context(interrupts.held()) if ranks.count > 1 else []

        def asked() -> None:
            if ranks.count > 1 and ranks.sum(len(told)):
                raise KeyboardInterrupt

        try:
            yield asked
        except KeyboardInterrupt:
            save()
            log.info("train: interrupted; a checkpoint holds what was done")
            raise


def _finish(layout: Whole, best: Any, state: Fit) -> Fit:
    """Leave the best weights in the model, and warn where they are no better than the base's."""
    layout.restore(best)
    layout.model.eval()
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


def _begin(
    folder: Path,
    objective: Objective,
    made: Plan,
    judge: Callable[[], dict[str, float]],
    state: Fit,
    layout: Whole,
    spare: Any,
) -> Ongoing:
    """The start, or where the newest whole checkpoint of this phase leaves off."""
    import torch

    torch.manual_seed(made.config.seed)
    make = partial(make_optimizer, config=made.config)
    layout.begin(objective, make, made.config.max_grad_norm, spare)
    objective.model.train()
    found = checkpoint.newest(folder, state.before)
    if found is None:
        # What a soft prompt begins as is not the base; a second phase begins where the first one ended.
        with contextlib.nullcontext() if state.before else prompts.unread(objective.model):
            losses = judge()
        state.base_loss, state.range_test = losses["eval_loss"], made.range_test
        original = state.first["original"] if state.first else losses
        state.base_retention_loss = original.get("retention_loss", math.nan)
        return Ongoing(layout, state, {}, checkpoint.random_state(), saved=0)
    tensors = checkpoint.read(found[0])
    layout.load(tensors["weights"], tensors["moments"])
    checkpoint.restore_random(tensors["random"])
    log.info("train: resuming after step %d", found[1]["step"])
    state = Fit(**found[1]["state"])
    best = layout.part_of(tensors["best"])
    return Ongoing(layout, state, best, checkpoint.random_state(), saved=len(state.history))
