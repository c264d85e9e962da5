"""Attention of examples laid end to end by one kernel of the GPU, in place of one by one.

The kernel is FlashAttention (Dao 2023, arXiv:2307.08691) over cumulative lengths, as PyTorch brings it.
On some GPU it might go wrong without a word, so it is held against plain products first, with the shape
of the model's own heads: `fault` says what was found.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

# Rows of these lengths are tried: one token, some that fill no block of the kernel, one of several blocks.
_TRIED = (1, 37, 300)
_TRIED_WINDOW = 64
# Of bfloat16's three digits; a row that saw its neighbour would be off by tens of percent.
_TOLERANCE = 0.03


def attend(
    query: Any, key: Any, value: Any, starts: Any, longest: int, scale: float, window: int | None
) -> Any:
    """Causal attention of each row over itself, in half precision.

    Args:
        query: [heads, tokens, width], rows laid end to end.
        key: [key heads, tokens, width].
        value: [key heads, tokens, width].
        starts: int32 [rows + 1], where each row starts, then the end; on the device of the others.
        longest: tokens of the longest row.
        scale: of the scores.
        window: how many tokens back one sees, itself included; None for all.

    Returns:
        [heads, tokens, width], in the precision of `value`.
    """
    from torch.nn.attention.varlen import varlen_attn

    # Rotated queries and keys are float32 where the weights are: the kernel wants three of a kind.
    found = varlen_attn(
        *(part.to(value.dtype).transpose(0, 1) for part in (query, key, value)),
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=len(query) != len(key),
    )
    return found.transpose(0, 1)


def takes(value: Any) -> bool:
    """Whether the kernel reads tensors of this type."""
    import torch

    return value.dtype in (torch.bfloat16, torch.float16)


def fault(settings: Any, device: Any, by_hand: Callable[..., Any]) -> str:
    """Why the kernel cannot be used for a model on this device; empty where it can.

    Value and gradient of a few random rows are held against those of `by_hand`.

    Args:
        settings: the model's text config.
        device: to try it on.
        by_hand: attention of one row; see packed.py.
    """
    import torch

    heads = settings.num_attention_heads
    key_heads = getattr(settings, "num_key_value_heads", None) or heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    random = torch.Generator().manual_seed(0)
    shapes = [(count, sum(_TRIED), width) for count in (heads, key_heads, key_heads, heads)]
    given = [torch.randn(shape, generator=random).to(device, torch.bfloat16) for shape in shapes]
    starts = [0, *itertools.accumulate(_TRIED)]
    for window in (None, _TRIED_WINDOW):
        try:
            found = _slopes(given, lambda q, k, v, w=window: _laid(q, k, v, starts, width**-0.5, w))
        except (RuntimeError, ValueError) as error:
            return f"the kernel refuses heads of {width}: {str(error).splitlines()[0]}"
        exact = _slopes(
            [part.float() for part in given],
            lambda q, k, v, w=window: torch.cat(
                [
                    by_hand(q[:, a:b], k[:, a:b], v[:, a:b], width**-0.5, 0.0, w, None)
                    for a, b in itertools.pairwise(starts)
                ],
                dim=1,
            ),
        )
        apart = max(
            float((one.float() - other).norm() / other.norm())
            for one, other in zip(found, exact, strict=True)
        )
        if not apart <= _TOLERANCE:  # NaN is no agreement
            return f"the kernel is off by {apart:.1%}, rounding explains {_TOLERANCE:.0%}"
    return ""


def _laid(query: Any, key: Any, value: Any, starts: Sequence[int], scale: float, window: int | None) -> Any:
    import torch

    places = torch.tensor(starts, dtype=torch.int32, device=query.device)
    return attend(query, key, value, places, max(_TRIED), scale, window)


def _slopes(given: Sequence[Any], attention: Callable[..., Any]) -> list[Any]:
    """What attention makes of the first three, and its gradient when the fourth comes back."""
    import torch

    inputs = [part.detach().requires_grad_() for part in given[:3]]
    found = attention(*inputs)
    return [found.detach(), *torch.autograd.grad(found, inputs, given[3])]
