"""Judging a model that learned from a reward model: what its answers earn, and how far it went for that."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.evaluate import intervals, resources
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings
from components.shared import causal, chat, examples, generation, rewards
from components.shared.causal import Encoded
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.progress import Progress
from components.shared.stage import Artifact, Context

_DEFAULT_ANSWER_TOKENS = 128


@dataclass(frozen=True)
class Said:
    """What a system answered.

    Args:
        answers: of each prompt.
        texts: them, written out.
        costs: latencies, tokens_per_second and memory_gib.
    """

    answers: list[generation.Answer]
    texts: list[str]
    costs: dict[str, float]


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
) -> Findings:
    """Base and tuned model answer the same prompts greedily; the reward model of the training scores both.

    It is the judge that the model was trained to please, so a gain says that the training worked, not that
    people would agree; `kl_nats` says how far the answers are from what the base would say.

    Args:
        config: see EvaluateConfig.
        tests: prompt-only examples sorted by id.
        inputs: `model`, and `compressed` where there is that stage.
        context: of the stage.

    Raises:
        TuneyardError: the model names no reward model, or that or the base changed since the training.
    """
    card = ModelCard.read(inputs["model"].path)
    _require_judge(card)
    asked = list(tests[: config.max_generated])
    shipped = inputs["compressed" if "compressed" in inputs else "model"].path
    precision = causal.served_precision(shipped)
    model, tokenizer, _ = causal.load(shipped, context.store, precision)
    limit = config.max_new_tokens or _DEFAULT_ANSWER_TOKENS
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    prompts = _prompts(asked, tokenizer, None if window is None else max(1, window - limit))
    tuned = _answer("tuned", model, prompts, tokenizer, limit, config)
    written = [Encoded(p, a.chosen) for p, a in zip(prompts, tuned.answers, strict=True)]
    nats = {"tuned": causal.answer_nats(model, written)}
    del model
    gc.collect()
    model = causal.load_base(card, context.store, precision)
    base = _answer("base", model, prompts, tokenizer, limit, config)
    nats["base"] = causal.answer_nats(model, written)
    del model
    gc.collect()
    scored = _rewards(card, asked, {"base": base, "tuned": tuned}, context)
    systems = _systems(scored, {"base": base, "tuned": tuned}, nats)
    facts = {
        "precision": precision,
        "reward_model": card.reward_model.uri if card.reward_model else "",
        "truncated": {"prompts": 0, "left_out": [], "of": len(tests), "limit_tokens": window},
        "answered": len(asked),
        "max_new_tokens": limit,
        "latency": f"from the start of a batch of {config.per_device_batch_size} prompts to an answer's end",
    }
    return Findings(systems, "tuned", _rows(asked, base, tuned, scored), facts)


def _require_judge(card: ModelCard) -> None:
    if card.reward_model is None:
        raise TuneyardError(
            "test has prompts without answers, and no reward model that could judge them was trained with",
            "give the corpus a column of answers, or train with `objective: ppo`",
        )


def _prompts(rows: Sequence[Mapping[str, Any]], tokenizer: Any, room: int | None) -> list[list[int]]:
    found = [chat.prompt_ids(tokenizer, examples.asked(row)) for row in rows]
    if room is None:
        return found
    return [causal.cut_prompt(prompt, room, tokenizer.bos_token_id) for prompt in found]


def _answer(
    name: str,
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    limit: int,
    config: EvaluateConfig,
) -> Said:
    progress = Progress(f"{name}: answers", len(prompts), "answers")
    ends, batch = chat.end_ids(tokenizer), config.per_device_batch_size
    with resources.peak_memory() as memory:
        began = time.perf_counter()
        answers = generation.generate(model, prompts, ends, limit, batch, progress.advance)
        seconds = time.perf_counter() - began
    written = sum(len(answer.tokens) + answer.ended for answer in answers)
    costs = resources.latencies([answer.seconds for answer in answers])
    costs |= {"tokens_per_second": written / seconds, "memory_gib": memory["gib"]}
    texts = [tokenizer.decode(answer.tokens, skip_special_tokens=True).strip() for answer in answers]
    return Said(answers, texts, costs)


def _rewards(
    card: ModelCard, rows: Sequence[Mapping[str, Any]], said: Mapping[str, Said], context: Context
) -> dict[str, list[float]]:
    """The reward of each system's answers."""
    assert card.reward_model is not None
    model, tokenizer, reward_card = rewards.load(card.reward_model.folder(context.store))
    return {
        name: rewards.of_answers(
            model,
            tokenizer,
            [
                rewards.encode(
                    tokenizer, examples.asked(row), text, reward_card.max_length_tokens, answer.ended
                )
                for row, text, answer in zip(rows, found.texts, found.answers, strict=True)
            ],
        )
        for name, found in said.items()
    }


def _systems(
    scored: Mapping[str, Sequence[float]], said: Mapping[str, Said], nats: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Any]]:
    systems: dict[str, dict[str, Any]] = {
        name: {
            "reward": sum(found) / len(found),
            "intervals": {"reward": intervals.of_mean(found)},
            "answers_cut": sum(not answer.ended for answer in said[name].answers),
            **said[name].costs,
        }
        for name, found in scored.items()
    }
    gains = [after - before for before, after in zip(scored["base"], scored["tuned"], strict=True)]
    won = [float(gain > 0) + 0.5 * (gain == 0) for gain in gains]
    moved = [before - after for before, after in zip(nats["base"], nats["tuned"], strict=True)]
    systems["tuned"] |= {
        "reward_gain": sum(gains) / len(gains),
        "win_rate": sum(won) / len(won),
        "kl_nats": sum(moved) / len(moved),
    }
    systems["tuned"]["intervals"] |= {
        "reward_gain": intervals.of_mean(gains),
        "win_rate": intervals.of_mean(won),
        "kl_nats": intervals.of_mean(moved),
    }
    systems["base"]["about"] = "the base model, untuned"
    systems["tuned"]["about"] = "the tuned model that ships"
    return systems


def _rows(
    rows: Sequence[Mapping[str, Any]], base: Said, tuned: Said, scored: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """What was asked, answered and earned, for answers.jsonl and the page."""
    return [
        {
            "id": row["id"],
            "origin": row.get("origin"),
            "prompt": "\n".join(message["content"] for message in examples.asked(row)),
            "base": base.texts[at],
            "tuned": tuned.texts[at],
            "base_ended": base.answers[at].ended,
            "tuned_ended": tuned.answers[at].ended,
            "base_reward": scored["base"][at],
            "tuned_reward": scored["tuned"][at],
        }
        for at, row in enumerate(rows)
    ]
