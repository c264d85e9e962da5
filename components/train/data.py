"""Examples as token ids, the token ledger, and the order of batches."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.shared.errors import StageStopped
from components.train.config import TrainConfig
from components.train.ranks import Ranks

# Micro-batches are cut from examples sorted by length within this many optimizer updates: little padding,
# and still a random order.
_SORTED_STEPS = 8


@dataclass
class Ledger:
    """What became of every example and its tokens; the counts add up to what came in.

    Args:
        counts: `kept`, `cut`, `split`, `dropped`, `unanswered` -> examples.
        tokens: `kept`, `removed` -> tokens.
        rows: one for each example that was not kept whole: id, origin, action, tokens, max_length, and
            `pieces` of one that was split.
        pieces: that came out of those that were split.
        parts: what became of the parts of examples where they have some (entities -> how many).
    """

    counts: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    rows: list[dict[str, Any]] = field(default_factory=list)
    pieces: int = 0
    parts: dict[str, int] = field(default_factory=dict)

    def note(
        self, example: Mapping[str, Any], action: str, before: int, after: int, limit: int, pieces: int = 0
    ) -> None:
        """Account for one example: `before` tokens came, `after` stay, in `pieces` if it was split."""
        self.pieces += pieces
        self.counts[action] += 1
        self.tokens["kept"] += after
        self.tokens["removed"] += before - after
        if action != "kept":
            row: dict[str, Any] = {"id": example["id"], "origin": example["origin"], "action": action}
            row |= {"tokens": before, "max_length": limit} | ({"pieces": pieces} if pieces else {})
            self.rows.append(row)

    def leave_out(self, rows: Sequence[dict[str, Any]]) -> None:
        """Account for examples that were not even encoded: rows of the ledger, each with its own action."""
        self.counts.update(row["action"] for row in rows)
        self.tokens["removed"] += sum(row["tokens"] for row in rows)
        self.rows += rows


def fit_lengths(
    rows: Iterable[Mapping[str, Any]],
    encode: Callable[[Mapping[str, Any]], Any],
    shorten: Callable[[Any, int], Any | None],
    config: TrainConfig,
    split: Callable[[Any, int], list[Any]] | None = None,
) -> tuple[list[Any], Ledger]:
    """Encode examples under the over-length policy.

    Args:
        rows: examples.
        encode: example -> encoded, with a length in tokens.
        shorten: (encoded, max_length) -> encoded that fits, or None where only the answer would have to give.
        config: max_length, over_length, max_over_length.
        split: (encoded, max_length) -> pieces that fit and hold all of it, where the policy may be `split`.

    Returns:
        The encoded examples that remain, and the ledger.

    Raises:
        StageStopped: policy `error` met a long example, or more than `max_over_length` of them were touched.
    """
    ledger, kept = Ledger(), []
    for row in rows:
        encoded = encode(row)
        before = len(encoded)
        action = "kept"
        if before > config.max_length and config.over_length == "split" and split is not None:
            parts = split(encoded, config.max_length)
            ledger.note(row, "split", before, before, config.max_length, len(parts))
            kept += parts
            continue
        if before > config.max_length:
            short = shorten(encoded, config.max_length) if config.over_length == "truncate_prompt" else None
            encoded, action = (short, "cut") if short is not None else (None, "dropped")
        ledger.note(row, action, before, len(encoded) if encoded is not None else 0, config.max_length)
        if encoded is not None:
            kept.append(encoded)
    hurt = [row for row in ledger.rows if row["action"] != "split"]
    touched, total = len(hurt), sum(ledger.counts.values())
    first = [f"{r['origin']['file']}:{r['origin']['line']} ({r['tokens']} tokens)" for r in hurt[:5]]
    if touched and (config.over_length == "error" or touched > config.max_over_length * total):
        allowed = 0 if config.over_length == "error" else config.max_over_length
        raise StageStopped(
            f"{touched} of {total} examples ({touched / total:.1%}) are longer than train.max_length "
            f"{config.max_length} tokens, allowed {allowed:.1%} under over_length "
            f"{config.over_length}: {', '.join(first)}",
            "raise train.max_length, choose train.over_length, or raise train.max_over_length",
        )
    return kept, ledger


def refuse_beyond(window_tokens: int | None, longest: int) -> None:
    """Check that the model has a position for each token.

    Args:
        window_tokens: that it has positions for; None for no limit.
        longest: tokens of the longest sequence that it is given.

    Raises:
        StageStopped: there are more.
    """
    if window_tokens is not None and longest > window_tokens:
        raise StageStopped(
            f"an example has {longest} tokens, the base model reads {window_tokens}",
            f"set train.max_length to {window_tokens} or less",
        )


def total_steps(examples: int, config: TrainConfig) -> int:
    """Optimizer updates of the whole run; a last partial group counts as one."""
    if config.max_steps is not None:
        return config.max_steps
    per_step = config.per_device_batch_size * config.gradient_accumulation_steps
    assert config.epochs is not None  # TrainConfig has one of the two
    return max(1, math.ceil(examples * config.epochs / per_step))


def schedule_batches(
    lengths: Sequence[int], config: TrainConfig, packs: bool = False
) -> list[list[list[int]]]:
    """The micro-batches of every optimizer update, decided before the first: a resume needs only a number.

    Args:
        lengths: tokens of each training example.
        config: batch sizes, epochs or max_steps, seed.
        packs: whether lengths may differ within a micro-batch (objectives/base.py). Then an update takes its
            examples just as they were shuffled, and its micro-batches have about as many tokens each.

    Returns:
        [update][micro-batch] -> indices of examples. In each epoch every example comes up once.
    """
    per_step = config.per_device_batch_size * config.gradient_accumulation_steps
    wanted = total_steps(len(lengths), config)
    steps: list[list[list[int]]] = []
    epoch = 0
    while len(steps) < wanted:
        order = random.Random(f"{config.seed}/{epoch}")
        indices = list(range(len(lengths)))
        order.shuffle(indices)
        if packs:
            cuts = range(0, len(indices), per_step)
            steps += [_balanced(indices[a : a + per_step], lengths, config) for a in cuts]
            epoch += 1
            continue
        groups: list[list[list[int]]] = []
        for start in range(0, len(indices), per_step * _SORTED_STEPS):
            window = sorted(indices[start : start + per_step * _SORTED_STEPS], key=lambda i: lengths[i])
            groups += [
                _micro_batches(window[a : a + per_step], config) for a in range(0, len(window), per_step)
            ]
        order.shuffle(groups)
        steps += groups
        epoch += 1
    return steps[:wanted]


def _balanced(indices: Sequence[int], lengths: Sequence[int], config: TrainConfig) -> list[list[int]]:
    """As few micro-batches as hold these examples, alike in tokens: longest first, each to the emptiest."""
    size = config.per_device_batch_size
    found: list[list[int]] = [[] for _ in range(math.ceil(len(indices) / size))]
    tokens = [0] * len(found)
    for index in sorted(indices, key=lambda i: -lengths[i]):
        at = min((n for n in range(len(found)) if len(found[n]) < size), key=lambda n: tokens[n])
        found[at].append(index)
        tokens[at] += lengths[index]
    return found


def dealt(
    batches: Sequence[Sequence[Any]], ranks: Ranks, config: TrainConfig, packs: bool = False
) -> list[list[Any]]:
    """The micro-batches of one update that this process computes; each example is in those of one process.

    The update stays what the settings say however many processes there are: a pipeline's result must not
    depend on the machines it ran on. It is its examples that are dealt out.

    Args:
        batches: [micro-batch] -> examples of the update.
        ranks: the processes.
        config: per_device_batch_size.
        packs: see `schedule_batches`.
    """
    if ranks.count == 1:
        return [list(micro) for micro in batches]
    every = sorted((example for micro in batches for example in micro), key=len)
    mine = ranks.share(every)
    if not packs:
        return _micro_batches(mine, config)
    return [[mine[i] for i in micro] for micro in _balanced(range(len(mine)), list(map(len, mine)), config)]


def _micro_batches(examples: Sequence[Any], config: TrainConfig) -> list[list[Any]]:
    size = config.per_device_batch_size
    return [list(examples[start : start + size]) for start in range(0, len(examples), size)]
