"""How long a text a model can be given at once."""

from __future__ import annotations

from typing import Any


def of_settings(settings: Any) -> int | None:
    """Tokens that a transformers config names as the most; None where it names no limit."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None)


def of_model(model: Any) -> int | None:
    """Tokens that a transformers model has positions for; None where it names no limit.

    RoBERTa and its kin count positions from behind the padding token's number: of a table of 514, 512 serve.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)
    return of_settings(model.config)
