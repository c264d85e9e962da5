"""Judging a model of speech: what base and tuned model write of the same recordings."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.evaluate import resources, speech_metrics
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings
from components.evaluate.slices.share import Part, Share, joined, rows
from components.shared import causal, clock, opening, sounds, transcribing
from components.shared.encoded import Encoded
from components.shared.modelcard import ModelCard
from components.shared.progress import Progress
from components.shared.stage import Artifact, Context
from components.shared.store import Store

_TIMED_SINGLY = 12
# A model that goes on and on is stopped; nobody says twice as much as the longest reference.
_TIMES_LONGEST = 2
_NO_TOKEN = -1

# From indices of recordings to token ids written of each, and nats of each reference.
Heard = Callable[[Sequence[int]], tuple[list[list[int]], list[float]]]


def take(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    share: Share,
) -> Part:
    """Put a share of the test recordings through the base and the tuned model.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model`.
        context: of the stage.
        share: which batches.

    Raises:
        StageStopped: a recording is longer than the model hears at once.
        TuneyardError: speech is no longer prepared as in the training, or the base has changed.
    """
    import torch

    folder, part = inputs["model"].path, Part({})
    card, processor = ModelCard.read(folder), sounds.open_processor(folder)
    sounds.refuse_other(processor, card.preprocess_probe, folder)
    sounds.refuse_long(tests, processor, "test")
    references = [transcribing.encode(processor.tokenizer, row["text"]) for row in tests]
    size, every = config.per_device_batch_size, range(len(tests))
    batches = share.take([every[a : a + size] for a in range(0, len(tests), size)])

    for name in ("base", "tuned"):
        progress = Progress(share.label(f"{name}: recordings"), sum(map(len, batches)), "recordings")
        with resources.peak_memory() as memory:
            model = _opened(name, folder, card, context.store).to(causal.device())
            most = _most(model, processor, references)
            hear = _hearing(model, processor, tests, references, most)
            costs = _put(name, hear, most, batches, tests, part, share.measures, progress)
        del model, hear
        gc.collect()
        if share.measures:
            part.measured[name] = costs | {"memory_gib": memory["gib"]}
    part.measured["machine"] = {"threads": int(torch.get_num_threads())}
    return part


def _opened(name: str, folder: Path, card: ModelCard, store: Store) -> Any:
    """The tuned model of a folder, or its base."""
    import torch
    from transformers import AutoModelForSpeechSeq2Seq

    if name == "tuned":
        return opening.tuned(folder, store, AutoModelForSpeechSeq2Seq)
    return AutoModelForSpeechSeq2Seq.from_pretrained(
        card.base_model.folder(store), dtype=torch.float32, local_files_only=True, use_safetensors=True
    ).eval()


def _most(model: Any, processor: Any, references: Sequence[Encoded]) -> int:
    """Tokens of the longest transcript that is waited for; the same in every share."""
    room = model.config.max_target_positions - len(processor.tokenizer.prefix_tokens)
    return min(room, _TIMES_LONGEST * max(len(e.answer) for e in references))


def _hearing(
    model: Any,
    processor: Any,
    tests: Sequence[Mapping[str, Any]],
    references: Sequence[Encoded],
    most: int,
) -> Heard:
    """What a model makes of recordings by index."""
    import torch

    tokenizer = processor.tokenizer

    def hear(of: Sequence[int]) -> tuple[list[list[int]], list[float]]:
        sound = [sounds.read(tests[i]["audio"], processor.feature_extractor) for i in of]
        heard = torch.tensor(sounds.features(processor, sound), device=causal.device())
        asked = [references[i] for i in of]
        with clock.arithmetic(), torch.inference_mode():
            logits, targets = transcribing.transcript_logits(model, heard, asked)
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu()
        nats = [float(p.double().sum()) for p in losses.split([len(e.answer) for e in asked])]
        written = transcribing.write(model, heard, tokenizer.prefix_tokens, tokenizer.eos_token_id, most)
        return written, nats

    return hear


def _put(
    name: str,
    hear: Heard,
    most: int,
    batches: Sequence[Sequence[int]],
    tests: Sequence[Mapping[str, Any]],
    part: Part,
    measures: bool,
    progress: Progress,
) -> dict[str, float]:
    """Put batches through a model: tokens and nats go into the part. Returns what it cost."""
    import numpy as np

    written: list[list[int]] = []
    nats: list[float] = []
    started = time.perf_counter()
    for batch in batches:
        found, losses = hear(batch)
        written, nats = written + found, nats + losses
        progress.advance(len(batch))
    seconds = time.perf_counter() - started
    of = [index for batch in batches for index in batch]
    table = np.full((len(of), most), _NO_TOKEN, dtype=np.int64)
    for row, ids in zip(table, written, strict=True):
        row[: len(ids)] = ids
    part.arrays.update(rows(f"{name}/tokens", of, table) | rows(f"{name}/nats", of, nats))
    if not measures:
        return {}
    alone = []
    for index in range(0, len(tests), max(1, len(tests) // _TIMED_SINGLY)):
        began = time.perf_counter()
        hear([index])
        alone.append(time.perf_counter() - began)
    spoken = sum(tests[index]["seconds"] for index in of)
    return {**resources.latencies(alone), "audio_seconds_per_second": spoken / seconds}


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    parts: Sequence[Part],
) -> Findings:
    """Base and tuned model side by side.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model`.
        context: of the stage.
        parts: what `take` found in every share.

    Raises:
        TuneyardError: the parts do not add up.
    """
    tokenizer = sounds.open_processor(inputs["model"].path).tokenizer
    said = [row["text"] for row in tests]
    tokens = sum(len(transcribing.encode(tokenizer, text).answer) for text in said)
    abouts = {"base": "the base model, untouched", "tuned": "the tuned model, PyTorch float32"}
    systems: dict[str, dict[str, Any]] = {}
    written: dict[str, list[str]] = {}
    wrong: list[int] = []
    for name, about in abouts.items():
        table = joined(parts, f"{name}/tokens")
        kept = [[int(token) for token in row if token != _NO_TOKEN] for row in table]
        written[name] = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in kept]
        found = speech_metrics.score(said, written[name])
        wrong = found.pop("wrong_words")  # of the tuned model in the end, which comes last
        nats = float(joined(parts, f"{name}/nats").sum())
        systems[name] = {"about": about, **found, "loss": nats / tokens, **parts[0].measured[name]}
    facts = {
        "latency": "of one recording alone, its features and the loss of its reference included",
        "threads": parts[0].measured["machine"]["threads"],
        "prefix": tokenizer.convert_ids_to_tokens(tokenizer.prefix_tokens),
    }
    return Findings(systems, "tuned", _rows(tests, written, wrong), facts)


def _rows(
    tests: Sequence[Mapping[str, Any]], written: Mapping[str, Sequence[str]], wrong: Sequence[int]
) -> list[dict[str, Any]]:
    """What each system wrote of each recording; `wrong` words of the tuned one."""
    return [
        {
            "id": row["id"],
            "origin": row["origin"],
            "prompt": f"{row['origin']['file']}:{row['origin']['line']}",
            "reference": row["text"],
            **{name: texts[index] for name, texts in written.items()},
            "off_by": wrong[index],
        }
        for index, row in enumerate(tests)
    ]
