"""Settings of the split stage."""

from __future__ import annotations

from pydantic import Field, model_validator

from components.shared.settings import Settings


class SplitConfig(Settings):
    """How examples are divided into train, eval and test.

    Args:
        ratios: fractions of train, eval and test. With a test split of the source's own, train and eval
            share what is left in their proportion.
        stratify_by: `label` (a classification pipeline's default), or a column. The shares of its values are
            right in expectation only; their balance between the sides is measured and gated.
        group_by: a column; examples that share its value stay on one side.
        test_source: the source's own test split: s3:// prefix, path, glob or Hugging Face id.
        seed: moves every example to another side with it.
        max_domain_leaks: largest fraction (0-1) of the documents of domain text (train.first) that may hold
            an example of eval or test; each of them is left out.
        max_kl_nats: largest Kullback-Leibler divergence of a side from the whole; a side so small that chance
            alone exceeds it is held to what chance explains.
    """

    ratios: tuple[float, float, float] = (0.70, 0.15, 0.15)
    stratify_by: str | None = None
    group_by: str | None = None
    test_source: str | None = None
    seed: int = 42
    max_domain_leaks: float = Field(0.05, ge=0, le=1)
    max_kl_nats: float = Field(0.1, gt=0)

    @model_validator(mode="after")
    def _ratios(self) -> SplitConfig:
        if min(self.ratios) <= 0 or abs(sum(self.ratios) - 1) > 1e-6:
            raise ValueError(f"ratios {list(self.ratios)} must be positive and sum to 1")
        return self
