"""The retention set: examples of what the base could, judged beside eval and replayed among train."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import examples, media, sources, tasks
from components.shared.errors import StageStopped, TuneyardError
from components.shared.store import Store
from components.train.config import TrainConfig
from components.train.data import fit_lengths, refuse_beyond
from components.train.objectives.base import Objective

_SHOWN = 5


@dataclass
class Retained:
    """The retention set, encoded.

    Args:
        judged: examples whose loss is watched; none of them is trained on.
        kept: the others, for replay and for the Fisher information.
    """

    judged: Sequence[Any]
    kept: Sequence[Any]


def read(config: TrainConfig, store: Store) -> list[dict[str, Any]]:
    """The rows of the retention set: each line of its *.jsonl files, with the fields of the objective's data.

    Raises:
        TuneyardError: there is no such file, or lines lack a field; names the first of them.
    """
    assert config.retain is not None
    folder = _folder(config.retain.source, store)
    files = sorted(folder.rglob("*.jsonl")) if folder.is_dir() else [folder]
    formats = tasks.OBJECTIVES[config.objective.kind].formats
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            row, fault = _row(line, formats)
            if fault:
                faults.append(f"{path.name}:{number} {fault}")
            elif row is not None:
                origin = {"file": path.name, "line": number, "part": "main"}
                rows += media.rooted([{"id": f"{path.name}:{number}", "origin": origin, **row}], path.parent)
    if faults or len(rows) < 2:
        first = "; ".join(faults[:_SHOWN]) or f"{len(rows)} rows in {len(files)} *.jsonl files"
        raise TuneyardError(
            f"train.retain.source {config.retain.source}: {len(faults)} unusable lines: {first}",
            f"give JSON lines, two or more, with the fields of {' or '.join(formats)} data",
        )
    return rows


def _folder(uri: str, store: Store) -> Path:
    if sources.kind_of(uri) == "s3":
        return store.get_prefix(uri)
    path = Path(uri).expanduser()
    if not path.exists():
        raise TuneyardError(
            f"train.retain.source {uri}: nothing is there",
            "name an s3:// prefix, or a folder or file of JSON lines on this machine",
        )
    return path


def _row(line: str, formats: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
    """(row, what is wrong with the line); neither for an empty line."""
    if not line.strip():
        return None, ""
    try:
        row = json.loads(line)
    except ValueError:
        return None, "is no JSON"
    if not isinstance(row, dict):
        return None, "is no JSON object"
    lacking = [[n for n in examples.REQUIRED[kind] if row.get(n) is None] for kind in formats]
    return (row, "") if [] in lacking else (None, f"lacks {' or '.join(', '.join(n) for n in lacking)}")


def encode(objective: Objective, rows: Sequence[dict[str, Any]], config: TrainConfig) -> Retained:
    """The retention set, its rows dealt into those that are judged and those that are trained on.

    Raises:
        StageStopped: too few rows fit, or one is longer than the model reads.
    """
    assert config.retain is not None
    usable = objective.usable(list(rows))
    random.Random(f"{config.seed}/retain").shuffle(usable)
    judged = min(config.retain.judged_examples, len(usable) // 2)
    sides = []
    for part in (usable[:judged], usable[judged:]):
        encoded, _ = fit_lengths(part, objective.encode, objective.shorten, config)
        sides.append(encoded)
    if not all(sides):
        raise StageStopped(
            f"of {len(rows)} retention examples {len(sides[0])} can be judged and {len(sides[1])} trained on",
            "give train.retain.source more examples that fit, see train.max_length",
        )
    for side in sides:
        refuse_beyond(objective.window_tokens, objective.longest_tokens(side))
    return Retained(*sides)


def figures(history: Sequence[Mapping[str, float]], best_step: int, base_loss: float) -> dict[str, float]:
    """What became of the retention set.

    Args:
        history: of fit.Fit.
        best_step: the one whose weights are kept.
        base_loss: on the set before the first step; NaN where there is no set.

    Returns:
        `retention_loss`, `base_retention_loss` and `retention_loss_increase`, in nats; empty without a set.
    """
    if math.isnan(base_loss) or not best_step:
        return {}
    now = history[best_step - 1]["retention_loss"]
    increase = now - base_loss
    return {"retention_loss": now, "base_retention_loss": base_loss, "retention_loss_increase": increase}


def replayed(
    updates: Sequence[Sequence[Sequence[Any]]], kept: Sequence[Any], fraction: float, config: TrainConfig
) -> list[list[list[Any]]]:
    """Updates with retention examples among theirs, so many that they are this fraction of all so far.

    Every example of train still comes up as before. Those of the retention set come in a random order, each
    once before any comes again.

    Args:
        updates: [update][micro-batch] -> encoded examples.
        kept: encoded retention examples.
        fraction: 0-1, of all examples of the run.
        config: seed, and the most that a micro-batch holds.
    """
    if not fraction:
        return [[list(micro) for micro in update] for update in updates]
    supply = _forever(kept, config)
    found, trained, added = [], 0, 0
    for update in updates:
        trained += sum(map(len, update))
        due = round(trained * fraction / (1 - fraction)) - added
        added += due
        found.append(_filled(update, [next(supply) for _ in range(due)], config.per_device_batch_size))
    return found


def _forever(kept: Sequence[Any], config: TrainConfig) -> Iterator[Any]:
    order = random.Random(f"{config.seed}/replay")
    while True:
        yield from order.sample(list(kept), len(kept))


def _filled(update: Sequence[Sequence[Any]], more: Sequence[Any], size: int) -> list[list[Any]]:
    """The micro-batches with more examples: in those that have room, then in new ones."""
    micros, rest = [list(micro) for micro in update], list(more)
    for micro in micros:
        while rest and len(micro) < size:
            micro.append(rest.pop())
    return micros + [rest[at : at + size] for at in range(0, len(rest), size)]
