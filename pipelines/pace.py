"""How fast trainings that ran were: the newest one like the one that is asked about tells its time.

A training leaves its curve in the store, with the tokens and seconds of every update, and in its commit how
long the stage took and on what (components/train/saving.py). Updates tell the rate; what lies between them
tells evaluations and checkpoints; the rest is the start: libraries, models, self-check, and what is written.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from components.shared import jsonl
from components.shared.errors import TuneyardError
from components.shared.store import Store
from components.train.config import TrainConfig

# Commits of train that are looked at, the newest first.
_LOOKED_AT = 50
# What must be the same for an update to compute the same per token.
_ALIKE = ("objective", "base_model", "revision", "adapter", "precision", "gradient_checkpointing", "retain")
# What moves the rate less; where it differs, that is said.
_NEARLY = ("per_device_batch_size", "max_length", "dropout")
_HISTORY, _FIRST_HISTORY = "history.jsonl", "first_history.jsonl"


@dataclass(frozen=True)
class Pace:
    """How fast a training, or a phase of one, was.

    Args:
        run: its id.
        tokens_per_second: of updates alone.
        evaluation_seconds: of one evaluation on eval; 0 where the curve has none by itself.
        checkpoint_seconds: of one checkpoint; 0 likewise.
        start_seconds: of the stage besides: libraries, models, self-check, what is written; of both phases.
        differing: settings that were others then, as `name value`.
    """

    run: str
    tokens_per_second: float
    evaluation_seconds: float
    checkpoint_seconds: float
    start_seconds: float
    differing: tuple[str, ...] = ()


def newest(configs: Sequence[TrainConfig], hardware: str, store: Store) -> list[Pace | None]:
    """The pace of each phase: that of the newest training with a phase like it.

    Args:
        configs: of the phases, none of them with a phase before it.
        hardware: as measures.hardware says it, or part of it (the name of a GPU).
        store: with the commits.

    Returns:
        One for each of them; None where there is no such training, or the store does not answer.
    """
    found: list[Pace | None] = [None] * len(configs)
    try:
        for commit, stored in _phases(hardware, store):
            for at, config in enumerate(configs):
                if found[at] is None and _alike(config, stored.config):
                    found[at] = _pace(config, commit, stored, store)
            if all(found):
                break
    except TuneyardError:
        return found  # a prediction does without
    return found


@dataclass(frozen=True)
class _Phase:
    """A phase of a training that was done: its settings, and the file of its curve."""

    config: TrainConfig
    curve: str


def _phases(hardware: str, store: Store) -> Iterator[tuple[dict[str, Any], _Phase]]:
    """The phases of trainings on this hardware, with their commits, the newest first."""
    store = store.impatient()
    listed = sorted(store.listing("stages/train/"), key=lambda each: each.age_seconds)
    for each in listed[:_LOOKED_AT]:
        commit = store.read_json(each.name)
        if commit is None or hardware.lower() not in commit["summary"].get("hardware", "").lower():
            continue
        try:
            config = TrainConfig.model_validate(commit["made_by"]["settings"])
        except ValidationError:
            continue  # of a release whose settings were others
        yield commit, _Phase(config.model_copy(update={"first": None}), _HISTORY)
        if config.first:
            yield commit, _Phase(config.first_phase(), _FIRST_HISTORY)


def _alike(one: TrainConfig, other: TrainConfig) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in _ALIKE)


def _pace(config: TrainConfig, commit: Mapping[str, Any], stored: _Phase, store: Store) -> Pace | None:
    curves = _curves(commit, store)
    rows = curves.get(stored.curve, [])
    if not rows:
        return None
    others = [
        f"{name} {getattr(stored.config, name)}"
        for name in _NEARLY
        if getattr(config, name) != getattr(stored.config, name)
    ]
    found = of_curve(rows, stored.config.checkpoint_steps)
    spent = sum(
        _spent(each, of_curve(each, stored.config.checkpoint_steps)) for each in curves.values() if each
    )
    start = max(0.0, float(commit["seconds"]) - spent)
    return replace(found, run=str(commit["run"]), start_seconds=start, differing=tuple(others))


def _curves(commit: Mapping[str, Any], store: Store) -> dict[str, list[dict[str, float]]]:
    """Name of each curve that a training left -> its updates."""
    manifest = store.read_manifest(commit["outputs"]["ledger"])
    wanted = tuple(entry for entry in manifest.files if entry.path in (_HISTORY, _FIRST_HISTORY))
    with tempfile.TemporaryDirectory(prefix="tuneyard-pace-") as scratch:
        folder = store.get_tree(replace(manifest, files=wanted), Path(scratch) / "ledger")
        rows = {entry.path: list(jsonl.read(folder / entry.path)) for entry in wanted}
    return {name: [row for row in curve if "step_seconds" in row] for name, curve in rows.items()}


def of_curve(rows: Sequence[Mapping[str, float]], checkpoint_steps: int) -> Pace:
    """What a curve tells. The first update, which makes the kernels, counts as part of the start.

    Args:
        rows: a row for each update, its `time` the end of it; evaluations and checkpoints follow it.
        checkpoint_steps: updates between checkpoints.
    """
    counted = rows[1:] or rows
    rate = sum(row["step_tokens"] for row in counted) / sum(row["step_seconds"] for row in counted)
    gaps: dict[tuple[bool, bool], list[float]] = {}
    for number, (row, after) in enumerate(itertools.pairwise(rows), 1):
        kind = "eval_loss" in row, number % checkpoint_steps == 0
        gaps.setdefault(kind, []).append(max(0.0, after["time"] - row["time"] - after["step_seconds"]))
    # The middle one: an attempt that was cut off leaves a gap of hours.
    middle = {kind: statistics.median(found) for kind, found in gaps.items()}
    plain = middle.get((False, False), 0.0)
    saved = max(0.0, middle[False, True] - plain) if (False, True) in middle else 0.0
    judged = middle.get((True, False), middle.get((True, True), plain + saved) - saved) - plain
    return Pace("", rate, max(0.0, judged), saved, 0.0)


def _spent(rows: Sequence[Mapping[str, float]], pace: Pace) -> float:
    """Seconds of a phase's updates and of all between them, and of the evaluations before and after."""
    between = rows[-1]["time"] - rows[0]["time"]
    return between + rows[0]["step_tokens"] / pace.tokens_per_second + 2 * pace.evaluation_seconds
