"""Gradient surgery: tasks that pull the same weights apart are kept from undoing each other's work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def projected(gradients: Sequence[Any]) -> tuple[Any, int]:
    """PCGrad (Yu et al. 2020, arXiv:2001.06782, algorithm 1).

    Each task's gradient loses what points against another's, task after task in random order; then they are
    summed. The random order is drawn from torch's own state, which a resume restores.

    Args:
        gradients: one vector [weights] for each task.

    Returns:
        the sum [weights], and how many ordered pairs of tasks were in conflict.
    """
    import torch

    total, conflicts = torch.zeros_like(gradients[0]), 0
    squares = [float(g @ g) for g in gradients]
    for i, original in enumerate(gradients):
        gradient = original.clone()
        for j in torch.randperm(len(gradients)).tolist():
            along = float(gradient @ gradients[j])
            if j != i and along < 0:
                gradient -= along / squares[j] * gradients[j]
                conflicts += 1
        total += gradient
    return total, conflicts
