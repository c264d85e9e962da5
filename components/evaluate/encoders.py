"""What the judges of encoders share: texts through a model, what that costs, and under which conditions."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.evaluate import predictions, resources
from components.evaluate.config import EvaluateConfig
from components.evaluate.predictions import Encodings
from components.shared.modelcard import ModelCard
from components.shared.progress import Progress


def measured(
    name: str,
    folder: Path,
    forward: predictions.Forward,
    texts: Sequence[str],
    card: ModelCard,
    config: EvaluateConfig,
) -> tuple[Any, dict[str, float], Encodings]:
    """Put texts through a model.

    Args:
        name: of the system, for the progress lines.
        folder: with its tokenizer.
        forward: the model.
        texts: to be judged.
        card: its limit of length.
        config: see EvaluateConfig.

    Returns:
        outputs [texts, ...], latency, throughput and memory (names: config.METRICS), and the encodings.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encodings = predictions.encode(tokenizer, texts, card.max_length_tokens)
    progress = Progress(f"{name}: texts", len(encodings), "texts")
    with resources.peak_memory() as memory:
        timed = predictions.run(forward, encodings, config.per_device_batch_size, True, progress.advance)
    gc.collect()
    costs = {
        **resources.latencies(timed.single_seconds),
        "texts_per_second": len(encodings) / timed.seconds,
        "memory_gib": memory["gib"],
    }
    return timed.outputs, costs, encodings


def settings(encodings: Encodings, card: ModelCard) -> dict[str, Any]:
    """The conditions under which an encoder's numbers hold."""
    import torch

    return {
        "truncated": {
            "texts": encodings.cut,
            "of": len(encodings),
            "limit_tokens": card.max_length_tokens,
        },
        "latency": "of one text alone; texts per second in batches sorted by length",
        "threads": int(torch.get_num_threads()),
    }
