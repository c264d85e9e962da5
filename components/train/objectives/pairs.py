"""Preference pairs: two answers to one prompt, of which one was chosen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.shared import causal, chat, examples
from components.shared.causal import Encoded
from components.shared.errors import StageStopped
from components.train.objectives.config import PairMargin

log = logging.getLogger("tuneyard.train")
_SHOWN = 5
# The loss of a pair is of a difference of two sums over all tokens of an answer, so their rounding adds up:
# on Gemma 3 270M in bfloat16 three short pairs one by one and together were 1.9% apart. An example that sees
# its neighbour moves such a sum by nats, the loss by half of it and more.
ROUNDING = 6.0
# Of a history row: how often the chosen answer has the higher reward, and the rewards in nats.
MEASURES = ("pair_accuracy", "reward_margin", "reward_chosen", "reward_rejected")


@dataclass
class Pair:
    """Token ids of a prompt and of both answers to it.

    Args:
        prompt: what both answer.
        chosen: the answer that was preferred, ended.
        rejected: the other one, ended.
        margin: by how many nats the chosen one shall win (PairMargin).
        reference: log-likelihood of (chosen, rejected) under the base, in nats; None before it is known.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float
    reference: tuple[float, float] | None = None

    def __len__(self) -> int:
        # The two are two sequences, so the longer one is what has to fit.
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    @property
    def sequences(self) -> tuple[Encoded, Encoded]:
        """The prompt with each of its answers, the chosen one first."""
        return Encoded(self.prompt, self.chosen), Encoded(self.prompt, self.rejected)


def encode(tokenizer: Any, example: Mapping[str, Any], margin: PairMargin) -> Pair:
    """Token ids of a preference example."""
    prompt = chat.prompt_ids(tokenizer, examples.asked(example))
    chosen, rejected = (chat.answer_ids(tokenizer, example[name]) for name in ("chosen", "rejected"))
    scores = example["chosen_score"] - example["rejected_score"] if margin.score_weight else 0.0
    return Pair(prompt, chosen, rejected, margin.reward_margin + margin.score_weight * scores)


def shorten(pair: Pair, max_length: int, bos_id: int | None) -> Pair | None:
    """Cut the prompt from its left, but for the first token; None where an answer does not fit."""
    room = max_length - max(len(pair.chosen), len(pair.rejected))
    if room < 1:
        return None
    return Pair(causal.cut_prompt(pair.prompt, room, bos_id), pair.chosen, pair.rejected, pair.margin)


def tokens(pair: Pair) -> int:
    """How many tokens the model reads: the prompt twice."""
    return sum(map(len, pair.sequences))


def _lacks_scores(row: Mapping[str, Any], margin: PairMargin) -> bool:
    return bool(margin.score_weight) and not {"chosen_score", "rejected_score"} <= row.keys()


def refuse_without_scores(rows: Sequence[Mapping[str, Any]], margin: PairMargin) -> None:
    """Check that every row has the scores that the margin is made of.

    Raises:
        StageStopped: some have not; says how many and names the first.
    """
    lacking = [row["origin"] for row in rows if _lacks_scores(row, margin)]
    if lacking:
        first = ", ".join(f"{origin['file']}:{origin['line']}" for origin in lacking[:_SHOWN])
        raise StageStopped(
            f"train.objective.score_weight is {margin.score_weight:g}, and {len(lacking)} of {len(rows)} "
            f"examples lack chosen_score or rejected_score: {first}",
            "name the columns of both scores in ingest.columns, or leave score_weight out",
        )


def usable(rows: Sequence[dict[str, Any]], margin: PairMargin) -> list[dict[str, Any]]:
    """The rows of eval that can be judged; how many lack scores is logged."""
    kept = [row for row in rows if not _lacks_scores(row, margin)]
    if len(kept) < len(rows):
        log.warning("train: %d examples of eval have no scores; they are not judged", len(rows) - len(kept))
    return kept


def noisy_label_losses(log_odds: Any, label_smoothing: float) -> Any:
    """Cross-entropy of "the chosen one is better", said with log-odds, when labels are wrong at some rate.

    -(1 - e) log s(z) - e log s(-z): conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences",
    equation 3); with e = 0 the Bradley-Terry likelihood (Bradley and Terry 1952).

    Args:
        log_odds: [pairs].
        label_smoothing: e, 0-1.

    Returns:
        [pairs] nats.
    """
    from torch.nn.functional import logsigmoid

    wrong = label_smoothing * logsigmoid(-log_odds) if label_smoothing else 0.0
    return -(1 - label_smoothing) * logsigmoid(log_odds) - wrong


def sums(chosen: Any, rejected: Any) -> dict[str, float]:
    """What a micro-batch adds to MEASURES, from the rewards [pairs] of its answers; a tie is half a win."""
    return {
        "pair_accuracy": float((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum()),
        "reward_margin": float((chosen - rejected).sum()),
        "reward_chosen": float(chosen.sum()),
        "reward_rejected": float(rejected.sum()),
    }
