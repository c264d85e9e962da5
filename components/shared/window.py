"""How long a text a model can be given at once."""

from __future__ import annotations

from typing import Any

_TABLES = ("position_embeddings", "wpe")


def of_settings(settings: Any) -> int | None:
    """Tokens that a transformers config names as the most; None where it names no limit."""
    text = settings.get_text_config()
    if getattr(text, "position_biased_input", None) is False:
        return None  # DeBERTa's positions are relative then, and the number says how they were trained
    return getattr(text, "max_position_embeddings", None)


def learned(model: Any) -> int | None:
    """Tokens that a transformers model has a learned vector of position for; None where they are computed.

    RoBERTa and its kin count from behind the padding token's number: of a table of 514, 512 serve.
    """
    found = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if name.endswith(_TABLES) and hasattr(module, "num_embeddings")
    ]
    return min(found) if found else None


def of_model(model: Any) -> int | None:
    """Tokens that a transformers model has positions for; None where it names no limit."""
    places = learned(model)
    return of_settings(model.config) if places is None else places
