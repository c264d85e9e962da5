"""What the judges of encoders share: texts through a model, what that costs, and under which conditions."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from components.evaluate import predictions, resources
from components.evaluate.config import EvaluateConfig
from components.evaluate.slices.share import Part, Share, rows
from components.shared.modelcard import ModelCard
from components.shared.progress import Progress


def put(
    name: str,
    folder: Path,
    opened: Callable[[], predictions.Forward],
    texts: Sequence[str],
    card: ModelCard,
    config: EvaluateConfig,
    share: Share,
    part: Part,
) -> None:
    """Put a share of some texts through a model.

    Args:
        name: of the system; its outputs are `<name>/outputs` of the part.
        folder: with its tokenizer.
        opened: opens the model.
        texts: all of them.
        card: its limit of length.
        config: see EvaluateConfig.
        share: which batches.
        part: gets the outputs, how many texts are cut, and, of the share that measures, latency, throughput
            and memory (names: config.METRICS).
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encodings = predictions.encode(tokenizer, texts, card.max_length_tokens)
    part.facts["cut"] = encodings.cut
    batches = share.take(encodings.batches(config.per_device_batch_size))
    if not batches:
        part.arrays.update(rows(f"{name}/outputs", [], []))
        return
    progress = Progress(share.label(f"{name}: texts"), sum(map(len, batches)), "texts")
    with resources.peak_memory() as memory:
        timed = predictions.run(opened(), encodings, batches, share.measures, progress.advance)
    gc.collect()
    part.arrays.update(rows(f"{name}/outputs", timed.of, timed.outputs))
    if share.measures:
        part.measured[name] = {
            **resources.latencies(timed.single_seconds),
            "texts_per_second": len(timed.of) / timed.seconds,
            "memory_gib": memory["gib"],
        }
        part.measured["machine"] = {"threads": int(torch.get_num_threads())}


def settings(parts: Sequence[Part], count: int, card: ModelCard) -> dict[str, Any]:
    """The conditions under which an encoder's numbers hold.

    Args:
        parts: of all shares.
        count: of the texts.
        card: of the model.
    """
    cut, limit = parts[0].facts["cut"], card.max_length_tokens
    latency = "of one text alone; texts per second in batches sorted by length"
    if len(parts) > 1:
        latency += f"; measured, as memory, on slice 1 of {len(parts)} alone"
    return {
        "truncated": {"texts": cut, "of": count, "limit_tokens": limit},
        "latency": latency,
        "threads": parts[0].measured["machine"]["threads"],
    }
