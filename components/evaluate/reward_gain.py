"""Judging a model that learned from a reward model: what its answers earn, and how far it went for that."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from components.evaluate import intervals, resources, sitting
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings
from components.evaluate.slices.share import Part, Share, joined, rows
from components.shared import causal, chat, examples, generation, rewards, window
from components.shared.causal import Encoded
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.progress import Progress
from components.shared.stage import Artifact, Context

_DEFAULT_ANSWER_TOKENS = 128


def take(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    share: Share,
) -> Part:
    """Answer a share of the prompts with base and tuned model, and have both judged.

    Raises:
        TuneyardError: the model names no reward model, or that or the base changed since the training.
    """
    card = ModelCard.read(inputs["model"].path)
    judge_folder = _judge_of(card, context)
    shipped = inputs[sitting.shipped(inputs)].path
    precision = causal.served_precision(shipped)
    model, tokenizer, _ = causal.load(shipped, context.store, precision)
    limit = config.max_new_tokens or _DEFAULT_ANSWER_TOKENS
    most = window.of_model(model)
    room = None if most is None else max(1, most - limit)
    prompts = _prompts(_asked(config, tests), tokenizer, room)
    batches = share.take(generation.batches(prompts, config.per_device_batch_size))
    arrays, measured = _said("tuned", model, tokenizer, prompts, batches, limit, share)
    of = [index for batch in batches for index in batch]
    written = [Encoded(prompts[i], _tokens(row)) for i, row in zip(of, arrays["tuned/answers"], strict=True)]
    nats = _in_batches(partial(causal.answer_nats, model), written, batches)
    del model
    gc.collect()
    model = causal.load_base(card, context.store, precision)
    found, costs = _said("base", model, tokenizer, prompts, batches, limit, share)
    before = _in_batches(partial(causal.answer_nats, model), written, batches)
    del model
    gc.collect()
    arrays |= found
    arrays |= rows("kl", of, [b - n for b, n in zip(before, nats, strict=True)])
    for name in ("base", "tuned"):
        arrays |= _scored(name, arrays, _asked(config, tests), tokenizer, judge_folder, batches)
    return Part(arrays, {"window_tokens": most, "precision": precision}, measured | costs)


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    parts: Sequence[Part],
) -> Findings:
    """Base and tuned model answer the same prompts greedily; the reward model of the training scores both.

    It is the judge that the model was trained to please, so a gain says that the training worked, not that
    people would agree; `kl_nats` says how far the answers are from what the base would say.

    Args:
        config: see EvaluateConfig.
        tests: prompt-only examples sorted by id.
        inputs: `model`, and `compressed` where there is that stage.
        context: of the stage.
        parts: what `take` found in every share.

    Raises:
        TuneyardError: the parts do not add up.
    """
    card = ModelCard.read(inputs["model"].path)
    asked = _asked(config, tests)
    systems = _systems(parts)
    facts = {
        "precision": parts[0].facts["precision"],
        "reward_model": card.reward_model.uri if card.reward_model else "",
        "truncated": {"prompts": 0, "left_out": [], "of": len(tests)}
        | {"limit_tokens": parts[0].facts["window_tokens"]},
        "answered": len(asked),
        "max_new_tokens": config.max_new_tokens or _DEFAULT_ANSWER_TOKENS,
        "latency": f"from the start of a batch of {config.per_device_batch_size} prompts to an answer's end",
    }
    return Findings(systems, "tuned", _rows(asked, parts, sitting.tokenizer_of(inputs)), facts)


def _asked(config: EvaluateConfig, tests: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return list(tests[: config.max_generated])


def _judge_of(card: ModelCard, context: Context) -> Path:
    """The folder of the reward model that the training used."""
    if card.reward_model is None:
        raise TuneyardError(
            "test has prompts without answers, and no reward model that could judge them was trained with",
            "give the corpus a column of answers, or train against a reward model",
        )
    return card.reward_model.folder(context.store)


def _prompts(asked: Sequence[Mapping[str, Any]], tokenizer: Any, room: int | None) -> list[list[int]]:
    found = [chat.prompt_ids(tokenizer, examples.asked(row)) for row in asked]
    if room is None:
        return found
    return [causal.cut_prompt(prompt, room, tokenizer.bos_token_id) for prompt in found]


def _said(
    name: str,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    batches: Sequence[Sequence[int]],
    limit: int,
    share: Share,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Arrays of what a system answered (the tokens that it chose, -1 for none), and what that cost."""
    import numpy as np

    of = [index for batch in batches for index in batch]
    progress = Progress(share.label(f"{name}: answers"), len(of), "answers")
    ends, answers = chat.end_ids(tokenizer), []
    with resources.peak_memory() as memory:
        began = time.perf_counter()
        for batch in batches:
            asked = [prompts[index] for index in batch]
            answers += generation.generate(model, asked, ends, limit, len(batch), progress.advance)
        seconds = time.perf_counter() - began
    tokens = np.full((len(answers), limit + 1), -1, dtype=np.int64)
    for row, answer in zip(tokens, answers, strict=True):
        row[: len(answer.chosen)] = answer.chosen
    arrays = rows(f"{name}/answers", of, tokens)
    arrays |= rows(f"{name}/ended", of, np.asarray([answer.ended for answer in answers], dtype=bool))
    if not share.measures:
        return arrays, {}
    costs = resources.latencies([answer.seconds for answer in answers])
    costs |= {"tokens_per_second": sum(len(a.chosen) for a in answers) / seconds}
    return arrays, {name: {**costs, "memory_gib": memory["gib"]}}


def _in_batches(
    read: Callable[[Sequence[Encoded]], list[float]],
    sequences: Sequence[Encoded],
    batches: Sequence[Sequence[int]],
) -> list[float]:
    """What is read of answers, batch by batch as they were written: a share's are then those of the whole."""
    left = iter(sequences)
    return [found for batch in batches for found in read(list(itertools.islice(left, len(batch))))]


def _tokens(row: Any) -> list[int]:
    return [token for token in row.tolist() if token >= 0]


def _text(row: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode(_tokens(row), skip_special_tokens=True)).strip()


def _scored(
    name: str,
    arrays: Mapping[str, Any],
    asked: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    folder: Path,
    batches: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Array of the rewards of a system's answers."""
    model, reads, card = rewards.load(folder)
    of = arrays[f"{name}/answers:of"].tolist()
    sequences = [
        rewards.encode(
            reads, examples.asked(asked[index]), _text(row, tokenizer), card.max_length_tokens, bool(ended)
        )
        for index, row, ended in zip(of, arrays[f"{name}/answers"], arrays[f"{name}/ended"], strict=True)
    ]
    found = _in_batches(partial(rewards.of_answers, model, reads), sequences, batches)
    return rows(f"{name}/rewards", of, found)


def _systems(parts: Sequence[Part]) -> dict[str, dict[str, Any]]:
    scored = {name: joined(parts, f"{name}/rewards").tolist() for name in ("base", "tuned")}
    systems: dict[str, dict[str, Any]] = {
        name: {
            "reward": sum(found) / len(found),
            "intervals": {"reward": intervals.of_mean(found)},
            "answers_cut": int((~joined(parts, f"{name}/ended")).sum()),
            **parts[0].measured[name],
        }
        for name, found in scored.items()
    }
    gains = [after - before for before, after in zip(scored["base"], scored["tuned"], strict=True)]
    won = [float(gain > 0) + 0.5 * (gain == 0) for gain in gains]
    moved = joined(parts, "kl").tolist()
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


def _rows(asked: Sequence[Mapping[str, Any]], parts: Sequence[Part], tokenizer: Any) -> list[dict[str, Any]]:
    """What was asked, answered and earned, for answers.jsonl and the page."""
    found: list[dict[str, Any]] = [
        {
            "id": row["id"],
            "origin": row.get("origin"),
            "prompt": "\n".join(message["content"] for message in examples.asked(row)),
        }
        for row in asked
    ]
    for name in ("base", "tuned"):
        columns = (joined(parts, f"{name}/{what}") for what in ("answers", "ended", "rewards"))
        for row, tokens, ended, reward in zip(found, *columns, strict=True):
            row |= {name: _text(tokens, tokenizer), f"{name}_ended": bool(ended)}
            row |= {f"{name}_reward": float(reward)}
    return found
