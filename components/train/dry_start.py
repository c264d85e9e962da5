"""What a training does before its first update, on tensors without bytes, and shortened.

Of what is done to every example only as much is done as memory notices: the longest, and those that are run.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from components.shared import examples
from components.shared.dryrun import Live
from components.shared.errors import StageStopped
from components.train import holding, retention
from components.train.config import TrainConfig
from components.train.data import fit_lengths, refuse_beyond, schedule_batches
from components.train.objectives.base import Objective
from components.train.objectives.teacher_answers import SequenceDistillation
from components.train.plan import Updates

# Padded tokens that a model reads at once before the first update, at most (a teacher, the base of dpo), and
# the prompts that a teacher answers: as many of the longest are shown to it.
_READ_TOKENS = 8192
_ANSWERED = 64


def answered(objective: Objective, rows: Sequence[Mapping[str, Any]]) -> None:
    """Let a teacher that writes the answers write those to the longest prompts; the rows stay as they are."""
    if not isinstance(objective, SequenceDistillation):
        return
    longest = sorted(rows, key=lambda row: sum(len(str(each["content"])) for each in examples.asked(row)))
    with tempfile.TemporaryDirectory(prefix="tuneyard-dry-") as scratch, _quiet():
        objective.rewritten({"train": [dict(row) for row in longest[-_ANSWERED:]]}, Path(scratch))


def encoded(objective: Objective, rows: Sequence[Mapping[str, Any]], config: TrainConfig) -> list[Any]:
    """The rows as token ids, under the over-length policy."""
    every = iter(objective.encode_all(rows))
    found, _ = fit_lengths(rows, lambda _: next(every), objective.shorten, config, objective.pieces)
    if not found:
        raise StageStopped("no example of train is left to use", "see train.max_length and train.over_length")
    refuse_beyond(objective.window_tokens, objective.longest_tokens(found))
    return found


def prepared(
    objective: Objective,
    encoded: Sequence[Any],
    run: Sequence[Any],
    times: float,
    arithmetic: Any,
    live: Live,
) -> int:
    """Have the examples prepared that will be run, and the longest; bytes that all the others would keep.

    What an example keeps, such as a teacher's states, grows with its loss terms.

    Args:
        objective: with its base.
        encoded: examples.
        run: those among them that will be run.
        times: how many times as many there are in all.
        arithmetic: context of a forward pass.
        live: of the dry run.
    """
    longest: list[Any] = []
    tokens = 0
    for each in sorted(encoded, key=len, reverse=True):
        tokens += len(each)
        if longest and tokens > _READ_TOKENS:
            break
        longest.append(each)
    sample = list({id(each): each for each in [*run, *longest]}.values())
    weighed = copy.deepcopy(sample)
    with _quiet():
        objective.prepare([*sample, *weighed], arithmetic)
    terms, before = sum(map(objective.terms, weighed)), live.bytes
    del weighed
    others = times * sum(map(objective.terms, encoded)) - terms
    return round((before - live.bytes) / max(1, terms) * max(0.0, others))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Progress of work that nobody does is not shown."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def hold(
    objective: Objective,
    encoded: Sequence[Any],
    rows: Sequence[dict[str, Any]],
    config: TrainConfig,
    arithmetic: Any,
) -> None:
    """Hold the objective to its retention set.

    Args:
        objective: with its adapter.
        encoded: train examples, among which some of the set may be replayed.
        rows: of the set.
        config: settings.
        arithmetic: context of a forward pass.
    """
    found = retention.encode(objective, rows, config)
    # The Fisher information takes as much memory however many examples tell it.
    longest = sorted(found.kept, key=len)[-2:]
    with _quiet():
        holding.hold(objective, replace(found, kept=longest), config, arithmetic)
        objective.retained = found
        run = {id(each): each for micro in heaviest(objective, encoded, config) for each in micro}
        replayed = [each for each in found.kept if id(each) in run]
        if replayed:
            objective.prepare_retained(replayed, arithmetic)


def heaviest(objective: Objective, encoded: Sequence[Any], config: TrainConfig) -> list[list[Any]]:
    """The micro-batches among all of the run that can need most: most tokens, and the longest example."""
    steps = schedule_batches(list(map(len, encoded)), config, objective.packs)
    updates: Sequence[Any] = Updates(encoded, steps)
    if objective.retained and config.retain and config.retain.replay:
        updates = retention.replayed(updates, objective.retained.kept, config.retain.replay, config)
    micros = [(micro, list(map(len, micro))) for update in updates for micro in update]
    if objective.packs:
        most = max(micros, key=lambda found: sum(found[1]))
    else:
        most = max(micros, key=lambda found: len(found[1]) * max(found[1]))
    squares = max(micros, key=lambda found: sum(length**2 for length in found[1]))
    return [list(micro) for micro, _ in ([most] if most is squares else [most, squares])]
