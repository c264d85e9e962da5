"""Answers in batches: what a model says, token for token, to prompts of any length."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

from components.shared import causal, clock


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Args:
        tokens: ids without the end token.
        ended: whether the model ended it itself; False when the limit cut it.
        seconds: from the start of its batch to its last token, as a caller in that batch would wait.
        end: the token that ended it; None when the limit did.
    """

    tokens: list[int]
    ended: bool
    seconds: float
    end: int | None = None

    @property
    def chosen(self) -> list[int]:
        """Every token that the model chose, the end token among them."""
        return self.tokens if self.end is None else [*self.tokens, self.end]


def batches(prompts: Sequence[Sequence[int]], per_device_batch_size: int) -> list[list[int]]:
    """Indices of the prompts in batches of similar length, shortest first."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    return [
        order[start : start + per_device_batch_size] for start in range(0, len(order), per_device_batch_size)
    ]


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    end_ids: Container[int],
    max_new_tokens: int,
    per_device_batch_size: int,
    done: Callable[[int], None] = lambda count: None,
    temperature: float = 0.0,
) -> list[Answer]:
    """Answer each prompt, in batches of similar length.

    Args:
        model: causal model in eval mode, PEFT or not.
        prompts: token ids of each prompt.
        end_ids: the tokens that end an answer.
        max_new_tokens: longest answer.
        per_device_batch_size: prompts in one forward pass.
        done: called with 1 for each finished answer.
        temperature: 0 takes the likeliest token; else tokens are drawn, with PyTorch's random state, from the
            softmax of the logits over this.

    Returns:
        One answer for each prompt, in their order. Without rounding differences between batch shapes they
        are those of one prompt at a time (a test holds that in float32).
    """
    answers: dict[int, Answer] = {}
    for batch in batches(prompts, per_device_batch_size):
        asked = [prompts[index] for index in batch]
        found = _answer_batch(model, asked, end_ids, max_new_tokens, done, temperature)
        answers.update(zip(batch, found, strict=True))
    return [answers[index] for index in range(len(prompts))]


def left_padded(prompts: Sequence[Sequence[int]], device: Any) -> tuple[Any, Any]:
    """Token ids and attention mask, [batch, longest]; padded left so that all answers start together."""
    import torch

    longest = max(map(len, prompts))
    # Which id pads does not matter: the mask hides it.
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def next_logits(model: Any, ids: Any, mask: Any, cache: Any) -> Any:
    """Logits [rows, vocabulary], before any cap, after reading `ids` [rows, new tokens] on the cache."""
    # Not model(logits_to_keep=1): that projects a strided slice, and with frozen weights (any PEFT model)
    # PyTorch then copies the vocabulary matrix once for each row: 5 GiB at 16 rows of Gemma 3 270M.
    body, head, _ = causal.body_and_head(model)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    hidden = body(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )[0]
    return head(hidden[:, -1].contiguous())


def choose(model: Any, ids: Any, mask: Any, cache: Any, temperature: float) -> list[int]:
    """The next token of each row, after reading `ids` [rows, new tokens] on top of the cache."""
    import torch

    logits = next_logits(model, ids, mask, cache)
    if temperature:
        _, _, cap = causal.body_and_head(model)
        logits = torch.tanh(logits.float() / cap) * cap if cap else logits.float()
        return torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0].tolist()
    # A soft cap would not change which logit is largest. argmax of bfloat16 takes four times as long as max.
    return logits.max(dim=-1).indices.tolist()


def _answer_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    end_ids: Container[int],
    max_new_tokens: int,
    done: Callable[[int], None],
    temperature: float,
) -> list[Answer]:
    import torch
    from transformers import DynamicCache

    started = time.perf_counter()
    ids, mask = left_padded(prompts, causal.device())
    cache = DynamicCache(config=model.config)
    tokens: list[list[int]] = [[] for _ in prompts]
    answers: dict[int, Answer] = {}
    live = list(range(len(prompts)))  # row of the batch now -> prompt
    with clock.arithmetic(), torch.inference_mode():
        while live:
            chosen = choose(model, ids, mask, cache, temperature)
            keep = []
            for row, (prompt, token) in enumerate(zip(live, chosen, strict=True)):
                ended = token in end_ids
                if not ended:
                    tokens[prompt].append(token)
                if ended or len(tokens[prompt]) == max_new_tokens:
                    took = time.perf_counter() - started
                    answers[prompt] = Answer(tokens[prompt], ended, took, token if ended else None)
                    done(1)
                else:
                    keep.append(row)
            if len(keep) < len(live):
                # A finished answer costs no further arithmetic.
                cache.batch_select_indices(torch.tensor(keep, dtype=torch.long, device=mask.device))
                mask = mask[keep]
            live = [live[row] for row in keep]
            ids = torch.tensor([[chosen[row]] for row in keep], device=mask.device)
            mask = torch.cat([mask, mask.new_ones(len(keep), 1)], dim=1)
    return [answers[prompt] for prompt in range(len(prompts))]
