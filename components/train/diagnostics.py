"""What the figures of a training say is wrong with it, live and in the report."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from components.train import rules
from components.train.machine_rules import of_gpu, short_of_memory, slowing
from components.train.rules import Finding, Row

log = logging.getLogger("tuneyard.train")


def diagnose(history: Sequence[Row], base_loss: float) -> list[Finding]:
    """Everything that the rules find.

    Args:
        history: a row for each step, see fit.Fit and measures.py.
        base_loss: the loss on eval before the first step.
    """
    found = (
        rules.overfitting(history),
        rules.too_high(history),
        rules.too_low(history, base_loss),
        rules.exploding(history),
        rules.vanishing(history),
        rules.odd_updates(history),
        rules.still_weights(history),
        slowing(history),
        *short_of_memory(history),
        *of_gpu(history),
    )
    return sorted((one for one in found if one), key=lambda one: one.since)


class Watch:
    """Logs each finding once, when it begins.

    Args:
        history: of what was done before; what it shows has been said.
        base_loss: see `diagnose`.
    """

    def __init__(self, history: Sequence[Row], base_loss: float) -> None:
        self._base_loss = base_loss
        self._said = {found.rule for found in diagnose(history, base_loss)} if history else set()

    def see(self, history: Sequence[Row]) -> None:
        """Look again where the last row brings something new: its figures in full, or a large gradient."""
        if not history:
            return
        last = history[-1]
        if "memory_gib" not in last and "eval_loss" not in last and last["grad_norm"] <= rules.EXPLODES:
            return
        for found in diagnose(history, self._base_loss):
            if found.rule not in self._said:
                self._said.add(found.rule)
                log.warning("train: %s", found)
