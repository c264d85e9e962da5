"""Answers of a dry run: as long as the settings allow, by the same forward passes, without choosing a token.

How long answers will be nobody knows before they are drawn. What they take at most is what is read at once,
the prompts, and a last token on top of a cache of prompt and answer; the tokens between need no pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from components.shared import causal, generation
from components.shared.dryrun import Live
from components.shared.generation import Answer


@contextmanager
def longest_answers(live: Live) -> Iterator[None]:
    """Within the block models answer each prompt with as many tokens as they may, the last of them an end.

    Args:
        live: of the dry run.
    """
    original = generation.generate

    def generate(
        model: Any,
        prompts: Sequence[Sequence[int]],
        end_ids: Container[int],
        max_new_tokens: int,
        per_device_batch_size: int,
        done: Callable[[int], None] = lambda count: None,
        temperature: float = 0.0,
    ) -> list[Answer]:
        heaviest = generation.batches(prompts, per_device_batch_size)[-1]
        _read(model, [prompts[i] for i in heaviest], max_new_tokens, temperature, live)
        return [_said(prompt, max_new_tokens) for prompt in prompts]

    generation.generate = generate
    try:
        yield
    finally:
        generation.generate = original


def _said(prompt: Sequence[int], tokens: int) -> Answer:
    """The words of the prompt again: a judge's tokenizer makes about as many tokens of them."""
    return Answer(list(itertools.islice(itertools.cycle(prompt), tokens)), True, 0.0)


def _read(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, live: Live
) -> None:
    """The prompts are read, and a last token is chosen on top of prompts and answers."""
    import torch
    from transformers import DynamicCache

    ids, mask = generation.left_padded(prompts, causal.device())
    with torch.inference_mode():
        generation.choose(model, ids, mask, DynamicCache(config=model.config), temperature)
        peak = live.peak
        # Read at once for the cache alone: this peak is not counted.
        longest = ids.shape[1] + max_new_tokens - 1
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=causal.device())
        mask, cache = torch.ones_like(ids), DynamicCache(config=model.config)
        generation.next_logits(model, ids, mask, cache)
        live.mark()
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        generation.choose(model, ids[:, :1], mask, cache, temperature)
    live.peak = max(peak, live.peak)
