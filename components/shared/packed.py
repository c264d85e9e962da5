"""Examples laid end to end, without padding, that do not see each other.

The rows of a batch differ in length, and padding them to the longest computes for nothing. Laid into one row
with positions that start again, every layer but attention does not notice; attention is computed for each
example by itself, so that no mask is needed and nothing can leak from one into the next. On a GPU one kernel
does it for all: ragged.py. (Others put a mask over one row: Krell et al. 2021, arXiv:2107.02027.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from components.shared import ragged

ATTENTION = "tuneyard_packed"
# Beyond this many tokens the matrix of plain attention, [heads, tokens, tokens] kept for the backward pass,
# costs more than the fused kernel's slow backward pass on a CPU.
_PLAIN_TOKENS = 1024


def possible(model: Any) -> bool:
    """Whether a model takes its attention from outside and has nothing else that runs along a row.

    Args:
        model: a transformers model, PEFT or not.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = inner.config.get_text_config()
    kinds = set(getattr(settings, "layer_types", None) or ["full_attention"])
    return bool(
        getattr(inner, "_supports_attention_backend", False)
        and kinds <= {"full_attention", "sliding_attention"}
        and not getattr(inner, "_is_stateful", False)
        # A bidirectional decoder, or one whose attention has sinks of its own, is another computation.
        and not getattr(settings, "use_bidirectional_attention", None)
        and not any(name.endswith("sinks") for name, _ in inner.named_parameters())
    )


def kernel_fault(model: Any, device: Any) -> str:
    """Why a GPU has no kernel for the rows of a model, for which it is `possible`; empty where it has."""
    settings = model.config.get_text_config()
    if getattr(settings, "attn_logit_softcapping", None):
        return "the kernel caps no scores"
    if getattr(settings, "attention_dropout", 0.0):
        return "the kernel drops nothing out (dropout: 0.0 would do)"
    return ragged.fault(settings, device, _of_one)


def use(model: Any) -> None:
    """Switch a model, for which it is `possible`, to inputs of `lay`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    model.set_attn_implementation(ATTENTION)


def used(model: Any) -> bool:
    """Whether a model takes inputs of `lay`."""
    return bool(model.config.get_text_config()._attn_implementation == ATTENTION)


@contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """While it lasts a model takes padded batches, and a cache, in place of examples laid end to end."""
    before = used(model)
    if before:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if before:
            use(model)


def lay(rows: Sequence[Sequence[int]], device: Any) -> dict[str, Any]:
    """Inputs of a model that holds these rows of token ids end to end.

    Returns:
        `input_ids` and `position_ids` [1, tokens], `cu_seq_lens_q` [rows + 1]: where each starts, then the
        end; for a GPU the same once more, there, and the longest row's tokens.
    """
    import torch

    starts = list(itertools.accumulate(map(len, rows), initial=0))
    positions = [at for row in rows for at in range(len(row))]
    laid = {
        "input_ids": torch.tensor([[token for row in rows for token in row]], device=device),
        "position_ids": torch.tensor([positions], device=device),
        # Read as numbers by each layer, so it stays on the CPU.
        "cu_seq_lens_q": torch.tensor(starts, dtype=torch.int32),
    }
    if torch.device(device).type == "cuda":
        laid |= kernel_inputs(laid["cu_seq_lens_q"], device)
    return laid


def kernel_inputs(starts: Any, device: Any) -> dict[str, Any]:
    """What the kernel reads besides: the starts of `lay` on its device, and the longest row's tokens."""
    return {"cu_seq_lens_k": starts.to(device), "max_length_q": int(starts.diff().max())}


def _attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None,
    max_length_q: int = 0,
    **_: Any,
) -> tuple[Any, None]:
    """Causal attention of each example over itself; the interface is that of transformers.

    Args:
        module: the attention layer.
        query: [1, heads, tokens, width].
        key: [1, key heads, tokens, width].
        value: [1, key heads, tokens, width].
        attention_mask: None; examples are told apart by `cu_seq_lens_q`.
        scaling: of the scores.
        dropout: of the probabilities.
        sliding_window: how many tokens back one sees, itself included; None for all.
        softcap: of the scores; None for none.
        cu_seq_lens_q: see `lay`.
        cu_seq_lens_k: the same on a GPU; None where there is no kernel.
        max_length_q: tokens of the longest example, with it.

    Returns:
        [1, tokens, heads, width], and no probabilities.
    """
    import torch

    if cu_seq_lens_q is None or attention_mask is not None or len(query) != 1:
        raise ValueError(f"{type(module).__name__} takes packed rows alone: give it what packed.lay returns")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cu_seq_lens_k is not None and ragged.takes(value) and not dropout and not softcap:
        whole = (query[0], key[0], value[0])
        found = ragged.attend(*whole, cu_seq_lens_k, max_length_q, scale, sliding_window)
        return found.transpose(0, 1)[None], None
    parts = [
        _of_one(query[0, :, a:b], key[0, :, a:b], value[0, :, a:b], scale, dropout, sliding_window, softcap)
        for a, b in itertools.pairwise(cu_seq_lens_q.tolist())
    ]
    return torch.cat(parts, dim=1).transpose(0, 1)[None], None


def _of_one(
    query: Any, key: Any, value: Any, scale: float, dropout: float, window: int | None, cap: float | None
) -> Any:
    """Attention of one example: [heads, tokens, width] of each, key and value perhaps of fewer heads."""
    import torch

    heads, tokens, width = query.shape
    shared = heads // len(key)
    sees_all = window is None or window >= tokens
    if tokens > _PLAIN_TOKENS and sees_all and not cap:
        return torch.nn.functional.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            dropout_p=dropout,
            is_causal=True,
            scale=scale,
            enable_gqa=shared > 1,
        )[0]
    # The query heads that share a key head are one product.
    scores = (query.reshape(len(key), shared * tokens, width) * scale) @ key.transpose(1, 2)
    scores = scores.view(heads, tokens, tokens)
    if cap:
        scores = (torch.tanh(scores.float() / cap) * cap).to(value.dtype)
    blocked = _blocked(tokens, tokens if sees_all or window is None else window)
    # The kernel computes in float32 inside, whatever it reads and writes.
    weights = torch.softmax(scores.masked_fill(blocked.to(scores.device), -torch.inf), -1)
    weights = torch.nn.functional.dropout(weights, dropout)
    return (weights.view(len(key), shared * tokens, tokens) @ value).view(heads, tokens, width)


@cache
def _blocked(tokens: int, window: int) -> Any:
    """[tokens, tokens], true where a token must not be seen: after the one that looks, or too far back."""
    import torch

    # A mask that an evaluation made first must serve training too.
    with torch.inference_mode(False):
        ones = torch.ones(tokens, tokens, dtype=torch.bool)
        return ones.triu(1) | ones.tril(-window)
