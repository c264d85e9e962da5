"""Settings of the compress stage."""

from __future__ import annotations

from pydantic import Field

from components.shared.settings import Settings


class CompressConfig(Settings):
    """A causal model gets its adapter merged; an encoder becomes ONNX int8.

    Args:
        max_logit_difference: largest absolute logit difference between merged and adapted model. Where the
            base is stored in 16 bits, merged weights are too if that costs at most a hundredth of what the
            tuning moved (proof.MAX_ROUNDING_SHARE), else they stay float32 and are served so.
        min_agreement: smallest share (0-1) of the probe texts in which the int8 encoder must choose the
            float32 model's class.
    """

    max_logit_difference: float = Field(0.05, gt=0)
    min_agreement: float = Field(0.9, gt=0, le=1)
