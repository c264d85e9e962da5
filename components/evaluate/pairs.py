"""Preference pairs as judges: how often the chosen answer is put above the rejected one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.evaluate import intervals
from components.shared import causal, chat, examples
from components.shared.causal import Encoded
from components.shared.errors import TuneyardError

Tests = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Pairs:
    """The test pairs that fit into a model, as it reads them.

    Args:
        tests: the examples.
        chosen: the prompt with its chosen answer.
        rejected: the prompt with its rejected answer.
    """

    tests: list[Mapping[str, Any]]
    chosen: list[Encoded]
    rejected: list[Encoded]

    @property
    def both(self) -> list[Encoded]:
        """All sequences, the chosen ones first."""
        return [*self.chosen, *self.rejected]

    def halves(self, values: Sequence[float]) -> tuple[list[float], list[float]]:
        """What belongs to the chosen and to the rejected ones, of values for `both`."""
        return list(values[: len(self.tests)]), list(values[len(self.tests) :])


def read(tests: Tests, tokenizer: Any, window_tokens: int | None) -> Pairs:
    """The pairs that fit: a prompt is cut beside its answer, a pair with a longer answer is left out.

    Raises:
        TuneyardError: none fits.
    """
    kept: list[tuple[Mapping[str, Any], Encoded, Encoded]] = []
    for row in tests:
        prompt = chat.prompt_ids(tokenizer, examples.asked(row))
        pair = [chat.answer_ids(tokenizer, row[name]) for name in ("chosen", "rejected")]
        if window_tokens is not None:
            if max(map(len, pair)) >= window_tokens:
                continue
            room = window_tokens - max(map(len, pair))
            prompt = causal.cut_prompt(prompt, room, tokenizer.bos_token_id)
        kept.append((row, Encoded(prompt, pair[0]), Encoded(prompt, pair[1])))
    if not kept:
        raise TuneyardError(
            f"none of the {len(tests)} test pairs fits into the model's window of {window_tokens} tokens",
            "use a base model with a longer context, or shorter answers",
        )
    rows, chosen, rejected = (list(column) for column in zip(*kept, strict=True))
    return Pairs(rows, chosen, rejected)


def score(chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, Any]:
    """pair_accuracy (a tie is half a win) and pair_margin_nats, with their 95% intervals.

    Args:
        chosen: rewards of the chosen answers, in nats.
        rejected: of the rejected ones.
    """
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    won = [float(margin > 0) + 0.5 * (margin == 0) for margin in margins]
    return {
        "pair_accuracy": sum(won) / len(won),
        "pair_margin_nats": sum(margins) / len(margins),
        "intervals": {
            "pair_accuracy": intervals.of_mean(won),
            "pair_margin_nats": intervals.of_mean(margins),
        },
    }


def plainer(pairs: Pairs, base_nats: Sequence[float]) -> dict[str, dict[str, Any]]:
    """What needs no training to guess the chosen answer: its length, and what the base would rather say."""
    per_token = [-nats / len(sequence.answer) for nats, sequence in zip(base_nats, pairs.both, strict=True)]
    lengths = pairs.halves(
        [len(row["chosen"]) for row in pairs.tests] + [len(r["rejected"]) for r in pairs.tests]
    )
    systems = {}
    for name, about, values in (
        ("likelier", "the answer that the base finds likelier, by token", pairs.halves(per_token)),
        ("longer", "the answer with more characters", lengths),
    ):
        found = score(*values)
        bounds = {"pair_accuracy": found["intervals"]["pair_accuracy"]}
        systems[name] = {"about": about, "pair_accuracy": found["pair_accuracy"], "intervals": bounds}
    return systems
