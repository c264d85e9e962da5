"""One vector for a text, in training, when it is judged and in service alike."""

from __future__ import annotations

from typing import Any


def mean_pooled(hidden: Any, mask: Any) -> Any:
    """The mean over a text's own tokens of its last hidden states.

    Args:
        hidden: [texts, longest, width].
        mask: [texts, longest], 1 at tokens and 0 at padding.

    Returns:
        float32 [texts, width].
    """
    weights = mask[:, :, None].float()
    return (hidden.float() * weights).sum(1) / weights.sum(1)


def unit_pooled(hidden: Any, mask: Any) -> Any:
    """`mean_pooled` at length one, so that a product of two is the cosine of their angle."""
    import torch

    return torch.nn.functional.normalize(mean_pooled(hidden, mask), dim=-1)
