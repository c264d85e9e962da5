"""The base under an adapter that can be switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from components.shared import prompts


def possible(model: Any) -> bool:
    """Whether what an adapter added to a model can be switched off: PEFT's kinds and soft prompts can."""
    return hasattr(model, "disable_adapter") or prompts.of(model) is not None


@contextmanager
def off(model: Any) -> Iterator[None]:
    """While it lasts, a model computes without the adapter, if it is one for which that is `possible`.

    A soft prompt begins as noise, or as words drawn from the vocabulary: unlike a LoRA that has not moved, a
    model behind it is not the base even before the first update.
    """
    with prompts.unread(model):
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                yield
        else:
            yield
