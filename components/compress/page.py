"""The proof as a page that needs nothing but itself."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from components.compress import encoder, proof
from components.compress.config import CompressConfig
from components.compress.encoder import EncoderProof
from components.compress.proof import Proof
from components.shared.modelcard import ModelCard

Row = tuple[str, str, str]


def causal_rows(found: Proof, config: CompressConfig) -> list[Row]:
    """Claim, measurement and bound of each part of a causal model's proof."""
    off, moved, export = found.exported_adapted, found.adapted_base, found.exported_base
    least = f"at least {proof.MIN_BASE_DIFFERENCE:g}"
    rows = [
        ("export equals the adapted model: largest logit difference", f"{off.max_difference:.3g}",
         f"at most {config.max_logit_difference:g}, and a tenth of what the tuning moved"),
        ("… KL divergence of its next-token distribution", f"{off.kl_nats:.3g} nats", ""),
        ("… same most likely next token", f"{off.agreement:.4f} of {found.tokens} tokens", ""),
        ("adapted differs from the base: largest logit difference", f"{moved.max_difference:.3g}", least),
        ("… KL divergence", f"{moved.kl_nats:.3g} nats", ""),
        ("export differs from the base: largest logit difference", f"{export.max_difference:.3g}", least),
        ("tensors that training could move, and that moved",
         f"{found.tuned_tensors - len(found.unmoved)} of {found.tuned_tensors}", "all"),
        ("other tensors that differ from the base in any bit", str(len(found.strayed)), "0"),
        ("tensors on disk other than what was to be written", str(len(found.damaged)), "0"),
        ("stored in", found.storage, ""),
    ]  # fmt: skip
    if found.trained_adapted is not None:
        left = f"{found.trained_adapted.kl_nats:.3g} nats, {found.trained_adapted.max_difference:.3g}"
        rows.append(("the base was quantised in training: KL divergence, largest logit difference", left, ""))
    return rows


def encoder_rows(found: EncoderProof, config: CompressConfig) -> list[Row]:
    """Claim, measurement and bound of each part of an encoder's proof."""
    return [
        ("float32 ONNX equals PyTorch: largest logit difference", f"{found.export_difference:.3g}",
         f"at most {encoder.MAX_EXPORT_DIFFERENCE:g}"),
        ("int8 chooses PyTorch's class", f"{found.agreement:.4f} of {found.texts} texts",
         f"at least {config.min_agreement:g}"),
        ("int8 logits vary between texts, relative to float32's", f"{found.spread_ratio:.3f}",
         f"at least {encoder.MIN_SPREAD_RATIO:g}"),
        ("largest logit difference of int8 and PyTorch", f"{found.max_logit_difference:.3g}", ""),
    ]  # fmt: skip


def render(card: ModelCard, sizes: Mapping[str, float], rows: Sequence[Row]) -> str:
    """The page.

    Args:
        card: of the model before.
        sizes: size_before_bytes, size_after_bytes and size_ratio.
        rows: of causal_rows or encoder_rows.
    """
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) + "</tr>" for row in rows)
    return (
        "<!doctype html><meta charset=utf-8><title>compress</title>"
        "<style>body{font:15px system-ui;margin:2em}"
        "td,th{padding:.3em 1em;border-bottom:1px solid #ddd;text-align:left}</style><h1>Compress</h1>"
        f"<p>{html.escape(card.task)}, tuned from {html.escape(card.base_model.uri)}. "
        f"Weights: {sizes['size_before_bytes'] / 1e6:.1f} MB before, "
        f"{sizes['size_after_bytes'] / 1e6:.1f} MB after ({sizes['size_ratio']:.0%}).</p>"
        f"<table><tr><th>what<th>measured<th>must be</tr>{cells}</table>"
    )
