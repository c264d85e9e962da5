"""Choosing the next token."""

from __future__ import annotations

from typing import Any

# Nucleus sampling looks at this many likeliest tokens first: sorting a vocabulary of 262 144 costs more than
# a small model's whole step, and the nucleus is nearly always among them.
_LIKELIEST = 1024


def choose(logits: Any, temperature: float, top_p: float, generator: Any) -> int:
    """Sample a token (nucleus sampling: Holtzman et al. 2019, arXiv:1904.09751).

    Args:
        logits: [vocabulary], float32 on the CPU.
        temperature: above 0.
        top_p: the smallest set of likeliest tokens with at least this probability is kept; 1 keeps all.
        generator: torch.Generator of the request, so that a seed gives one answer whoever decodes beside it.
    """
    import torch

    probabilities = torch.softmax(logits / temperature, dim=-1)
    if top_p >= 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    values, indices = probabilities.topk(min(_LIKELIEST, len(probabilities)))
    if float(values.sum()) < top_p:
        values, indices = probabilities.sort(descending=True)
    # A token belongs to the nucleus when what is likelier than it does not reach top_p yet.
    nucleus = values.cumsum(0) - values < top_p
    return int(indices[torch.multinomial(values * nucleus, 1, generator=generator)])
