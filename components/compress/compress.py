"""Compress: an encoder becomes ONNX int8, a causal model's adapter is merged; both with proof."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from components.compress import encoder, merge, page, proof
from components.compress.config import CompressConfig
from components.compress.encoder import EncoderProof
from components.compress.proof import Proof
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context, Result

log = logging.getLogger("tuneyard.compress")


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files of a model folder; the tokenizer is the same before and after."""
    return sum(
        path.stat().st_size for pattern in ("*.safetensors", "*.onnx") for path in folder.glob(pattern)
    )


def compress(config: CompressConfig, inputs: Mapping[str, Artifact], context: Context) -> Result:
    """Write `compressed`, the model that ships, from `model`.

    Raises:
        TuneyardError: the export was refused, or there is nothing to do for this layout.
    """
    folder, target = inputs["model"].path, context.out / "compressed"
    card = ModelCard.read(folder)
    context.work.mkdir(parents=True, exist_ok=True)
    before = weight_bytes(folder)
    match card.task, card.layout:
        case "classification", "transformers":
            int8 = encoder.compress_encoder(folder, target, context.work, config.min_agreement)
            facts, metrics, rows = int8.facts(), _encoder_metrics(int8), page.encoder_rows(int8, config)
        case "causal-lm", "peft" | "transformers":
            make = merge.merge_adapter if card.layout == "peft" else merge.copy_full
            whole = make(folder, target, context.store, config.max_logit_difference)
            facts, metrics, rows = whole.facts(), _causal_metrics(whole), page.causal_rows(whole, config)
            if card.layout == "peft":
                # An adapter answers only together with its base.
                before += weight_bytes(card.base_model.folder(context.store))
        case task, layout:
            raise TuneyardError(
                f"{folder}: nothing to compress in a {task} model of layout {layout!r}",
                "train it with this pipeline, or drop `compress:` from the pipeline file",
            )
    after = weight_bytes(target)
    sizes = {"size_before_bytes": before, "size_after_bytes": after, "size_ratio": after / before}
    log.info("compress: %.1f MB -> %.1f MB (%.0f%%)", before / 1e6, after / 1e6, 100 * after / before)
    (context.out / "page.html").write_text(page.render(card, sizes, rows))
    return Result(
        kinds={"compressed": "model"},
        metadata={"compressed": json.loads((target / "tuneyard.json").read_text())},
        metrics=sizes | metrics,
        summary={**sizes, "proof": facts},
        page=context.out / "page.html",
    )


def _encoder_metrics(found: EncoderProof) -> dict[str, float]:
    return {name: float(value) for name, value in found.facts().items()}


def _causal_metrics(found: Proof) -> dict[str, float]:
    quantised = found.trained_adapted
    left = (
        {"nf4_max_logit_difference": quantised.max_difference, "nf4_kl_nats": quantised.kl_nats}
        if quantised
        else {}
    )
    return left | {
        "max_logit_difference": found.exported_adapted.max_difference,
        "kl_nats": found.exported_adapted.kl_nats,
        "agreement": found.exported_adapted.agreement,
        "base_difference": found.exported_base.max_difference,
        "base_kl_nats": found.exported_base.kl_nats,
        "tuned_tensors": float(found.tuned_tensors),
        "min_base_difference": proof.MIN_BASE_DIFFERENCE,
    }
