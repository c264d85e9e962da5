"""Judging a reward model by preference pairs, beside two plainer ways to guess which answer was chosen."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from components.evaluate import pairs, resources, sitting
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings
from components.evaluate.pairs import Pairs
from components.evaluate.slices.share import Part, Share, joined, rows
from components.shared import causal, examples, rewards
from components.shared.modelcard import ModelCard
from components.shared.progress import Progress
from components.shared.stage import Artifact, Context

Tests = Sequence[Mapping[str, Any]]
_BATCH_TOKENS = 4096


def _read(tests: Tests, tokenizer: Any, limit: int) -> Pairs:
    found = [rewards.pair(tokenizer, row, limit) for row in tests]
    return Pairs(list(tests), [chosen for chosen, _ in found], [rejected for _, rejected in found])


def take(
    config: EvaluateConfig, tests: Tests, inputs: Mapping[str, Artifact], context: Context, share: Share
) -> Part:
    """Read a share of the answers, by the reward model and by its base.

    Raises:
        TuneyardError: the base has changed.
    """
    model, tokenizer, card = rewards.load(inputs["model"].path)
    found = _read(tests, tokenizer, card.max_length_tokens)
    batches = share.take(list(causal.by_length([len(each) for each in found.both], _BATCH_TOKENS)))
    of = [index for batch in batches for index in batch]
    with resources.peak_memory() as memory:
        progress = Progress(share.label("tuned: answers"), len(of), "answers")
        began = time.perf_counter()
        values: list[float] = []
        for batch in batches:
            asked = [found.both[index] for index in batch]
            values += rewards.of_answers(model, tokenizer, asked, progress.advance)
        seconds = time.perf_counter() - began
    del model
    gc.collect()
    arrays = rows("tuned/rewards", of, values)
    base = causal.load_base(card, context.store, causal.preferred_precision("auto"))
    arrays |= sitting.losses("base", base, found.both, share)
    costs = {"texts_per_second": len(of) / max(seconds, 1e-9), "memory_gib": memory["gib"]}
    return Part(arrays, {}, {"tuned": costs} if share.measures else {})


def judge(
    config: EvaluateConfig,
    tests: Tests,
    inputs: Mapping[str, Artifact],
    context: Context,
    parts: Sequence[Part],
) -> Findings:
    """How often the chosen answer has the higher reward.

    Args:
        config: see EvaluateConfig.
        tests: preference examples sorted by id.
        inputs: `model`.
        context: of the stage.
        parts: what `take` found in every share.

    Raises:
        TuneyardError: the parts do not add up.
    """
    limit = ModelCard.read(inputs["model"].path).max_length_tokens
    tokenizer = sitting.tokenizer_of(inputs)
    found, whole = _read(tests, tokenizer, limit), _read(tests, tokenizer, 1 << 30)
    chosen, rejected = found.halves(joined(parts, "tuned/rewards").tolist())
    tuned = {"about": "the reward model, PyTorch float32", **pairs.score(chosen, rejected)}
    tuned |= parts[0].measured["tuned"]
    cut = sum(max(map(len, both)) > limit for both in zip(whole.chosen, whole.rejected, strict=True))
    facts = {
        "truncated": {"texts": cut, "of": len(tests), "limit_tokens": limit},
        "latency": "not measured; texts per second in batches of similar length",
        "threads": _threads(),
    }
    systems = {"tuned": tuned, **pairs.plainer(found, joined(parts, "base/nats").tolist())}
    return Findings(systems, "tuned", _rows(tests, chosen, rejected), facts)


def _threads() -> int:
    import torch

    return int(torch.get_num_threads())


def _rows(tests: Tests, chosen: Sequence[float], rejected: Sequence[float]) -> list[dict[str, Any]]:
    """What the reward model said of each pair, for answers.jsonl and the page."""
    return [
        {
            "id": row["id"],
            "origin": row.get("origin"),
            "prompt": "\n".join(message["content"] for message in examples.asked(row)),
            "reference": "chosen",
            "tuned": "chosen" if better > worse else "rejected",
            "tuned_probability": 1 / (1 + math.exp(-abs(better - worse))),
            "chosen": row["chosen"],
            "rejected": row["rejected"],
            "chosen_reward": better,
            "rejected_reward": worse,
        }
        for row, better, worse in zip(tests, chosen, rejected, strict=True)
    ]
