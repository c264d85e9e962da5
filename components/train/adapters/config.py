"""Settings of the adapters: which weights move."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from components.shared.settings import Settings


class LoraAdapter(Settings):
    """Low-rank adaptation: W + (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685).

    Args:
        rank: of A and B.
        alpha: scale; 2 x rank is a common choice.
        dropout: on the adapter's input, in training.
    """

    kind: Literal["lora"]
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)


class FullAdapter(Settings):
    """No adapter: every weight moves."""

    kind: Literal["full"]


AdapterConfig = Annotated[LoraAdapter | FullAdapter, Field(discriminator="kind")]
