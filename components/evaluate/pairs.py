"""Judging by preference pairs: how often a model puts the chosen answer above the rejected one."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.evaluate import answers, intervals, resources
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings
from components.shared import causal, chat, examples, rewards
from components.shared.causal import Encoded
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.progress import Progress
from components.shared.stage import Artifact, Context

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


def judge(config: EvaluateConfig, tests: Tests, inputs: Mapping[str, Artifact], context: Context) -> Findings:
    """A causal model that learned from preferences, beside its base: what it answers, and what it prefers.

    The reward of an answer is log(p / p_base), the implicit one of DPO without its beta (Rafailov et al.
    2023, arXiv:2305.18290, section 4), so the base prefers nothing: 0.5 and 0 by definition.

    Args:
        config: see EvaluateConfig.
        tests: preference examples sorted by id.
        inputs: `model`, and `compressed` where there is that stage.
        context: of the stage.

    Raises:
        TuneyardError: as `answers.judge`, or no pair fits into the model.
    """
    findings = answers.judge(config, tests, inputs, context)
    shipped = inputs["compressed" if "compressed" in inputs else "model"].path
    precision = causal.served_precision(shipped)
    card = ModelCard.read(inputs["model"].path)
    model = causal.load_base(card, context.store, precision)
    tokenizer = _tokenizer(inputs["model"])
    pairs = read(tests, tokenizer, getattr(model.config.get_text_config(), "max_position_embeddings", None))
    base = _nats("base: pairs", model, pairs)
    del model
    gc.collect()
    model, _, _ = causal.load(shipped, context.store, precision)
    tuned = _nats("tuned: pairs", model, pairs)
    moved = pairs.halves([before - after for before, after in zip(base, tuned, strict=True)])
    findings.systems["base"] |= {"pair_accuracy": 0.5, "pair_margin_nats": 0.0}
    found = score(*moved)
    findings.systems["tuned"]["intervals"] |= found.pop("intervals")
    findings.systems["tuned"] |= found
    findings.systems |= _plainer(pairs, base)
    findings.facts["pairs"] = {"judged": len(pairs.tests), "of": len(tests)}
    margins = {row["id"]: c - r for row, c, r in zip(pairs.tests, *moved, strict=True)}
    rejected = {row["id"]: row["rejected"] for row in tests}
    for row in findings.answers:
        row |= {"rejected": rejected[row["id"]], "tuned_margin_nats": margins.get(row["id"])}
    return findings


def judge_rewards(
    config: EvaluateConfig, tests: Tests, inputs: Mapping[str, Artifact], context: Context
) -> Findings:
    """A reward model, beside two plainer ways to guess which answer was chosen.

    Args:
        config: see EvaluateConfig.
        tests: preference examples sorted by id.
        inputs: `model`.
        context: of the stage.

    Raises:
        TuneyardError: the base has changed.
    """
    model, tokenizer, card = rewards.load(inputs["model"].path)
    limit = card.max_length_tokens
    found = [rewards.pair(tokenizer, row, limit) for row in tests]
    pairs = Pairs(list(tests), [chosen for chosen, _ in found], [rejected for _, rejected in found])
    with resources.peak_memory() as memory:
        progress = Progress("tuned: answers", 2 * len(tests), "answers")
        began = time.perf_counter()
        values = rewards.of_answers(model, tokenizer, pairs.both, progress.advance)
        seconds = time.perf_counter() - began
    del model
    gc.collect()
    chosen, rejected = pairs.halves(values)
    tuned = {
        "about": "the reward model, PyTorch float32",
        **score(chosen, rejected),
        "texts_per_second": 2 * len(tests) / seconds,
        "memory_gib": memory["gib"],
    }
    base = causal.load_base(card, context.store, causal.preferred_precision("auto"))
    systems = {"tuned": tuned, **_plainer(pairs, _nats("base: pairs", base, pairs))}
    whole = [rewards.pair(tokenizer, row, 1 << 30) for row in tests]
    cut = sum(max(map(len, pair)) > limit for pair in whole)
    facts = {
        "truncated": {"texts": cut, "of": len(tests), "limit_tokens": limit},
        "latency": "not measured; texts per second in batches of similar length",
        "threads": _threads(),
    }
    return Findings(systems, "tuned", _rows(tests, chosen, rejected), facts)


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


def _plainer(pairs: Pairs, base_nats: Sequence[float]) -> dict[str, dict[str, Any]]:
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


def _nats(what: str, model: Any, pairs: Pairs) -> list[float]:
    progress = Progress(what, len(pairs.both), "answers")
    return causal.answer_nats(model, pairs.both, done=progress.advance)


def _tokenizer(model: Artifact) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.path, local_files_only=True)


def _threads() -> int:
    import torch

    return int(torch.get_num_threads())


def _rows(tests: Tests, chosen: Sequence[float], rejected: Sequence[float]) -> list[dict[str, Any]]:
    """What the reward model said of each pair, for answers.jsonl and the page."""
    from math import exp

    found = []
    for row, better, worse in zip(tests, chosen, rejected, strict=True):
        said, margin = ("chosen", better - worse) if better > worse else ("rejected", worse - better)
        asked = "\n".join(message["content"] for message in examples.asked(row))
        found.append(
            {
                "id": row["id"],
                "origin": row.get("origin"),
                "prompt": asked,
                "reference": "chosen",
                "tuned": said,
                "tuned_probability": 1 / (1 + exp(-margin)),
                "chosen": row["chosen"],
                "rejected": row["rejected"],
                "chosen_reward": better,
                "rejected_reward": worse,
            }
        )
    return found
