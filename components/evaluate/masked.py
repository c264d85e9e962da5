"""Judging a masked language model: the hidden tokens of unseen documents, the same ones for every system."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from components.evaluate import intervals, resources, sitting
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings
from components.evaluate.slices.share import Part, Share, joined, rows
from components.shared import causal, masked
from components.shared.masked import Piece
from components.shared.modelcard import ModelCard
from components.shared.progress import Progress
from components.shared.stage import Artifact, Context

_BATCH_TOKENS = 4096
# Of the tokens that are asked for, as BERT's authors chose, whatever training hid.
_FRACTION = 0.15


def _cut(tests: Sequence[Mapping[str, Any]], inputs: Mapping[str, Artifact]) -> list[list[Piece]]:
    """Each document in pieces as in training."""
    tokenizer = sitting.tokenizer_of(inputs)
    length = ModelCard.read(inputs["model"].path).max_length_tokens
    whole = [masked.encode(tokenizer, row["text"], _FRACTION) for row in tests]
    return [masked.pieces(each, length) for each in whole]


def take(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    share: Share,
) -> Part:
    """Ask each system for the hidden tokens of a share of the pieces.

    Args:
        config: see EvaluateConfig; nothing is generated.
        tests: test examples sorted by id.
        inputs: `model`.
        context: of the stage.
        share: which batches.
    """
    card, tokenizer = ModelCard.read(inputs["model"].path), sitting.tokenizer_of(inputs)
    every = [piece for pieces in _cut(tests, inputs) for piece in pieces]
    chosen = share.take(list(causal.by_length([len(piece) for piece in every], _BATCH_TOKENS)))
    order = [at for batch in chosen for at in batch]
    batches = [[every[at] for at in batch] for batch in chosen]
    systems: dict[str, Callable[[], Any]] = {
        "base": lambda: masked.load_base(card, context.store),
        "tuned": lambda: masked.open_model(inputs["model"].path),
    }
    arrays: dict[str, Any] = {}
    measured: dict[str, dict[str, Any]] = {}
    for name, load in systems.items():
        model = load() if batches else None
        progress = Progress(share.label(f"{name}: loss"), len(order), "pieces")
        started = time.perf_counter()
        with resources.peak_memory() as memory:
            found = masked.nats(model, tokenizer, batches, progress.advance)
        speed = sum(len(every[at]) for at in order) / (time.perf_counter() - started)
        measured[name] = {"tokens_per_second": speed, "memory_gib": memory["gib"]}
        arrays |= rows(f"{name}/nats", order, [nats for nats, _ in found])
        arrays |= rows(f"{name}/right", order, [right for _, right in found])
        del model
        gc.collect()
    return Part(arrays, {}, measured if share.measures else {})


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
    cut = _cut(tests, inputs)
    tokens = [sum(piece.terms for piece in pieces) for pieces in cut]
    nats = {name: _by_document(joined(parts, f"{name}/nats").tolist(), cut) for name in ("base", "tuned")}
    right = {name: _by_document(joined(parts, f"{name}/right").tolist(), cut) for name in nats}
    systems: dict[str, dict[str, Any]] = {}
    for name in nats:
        systems[name] = score(nats[name], right[name], tokens) | parts[0].measured.get(name, {})
    systems["base"]["about"] = "the base model, untuned; one without a head for masks has a new one"
    systems["tuned"]["about"] = "the tuned model (artifact 'model')"
    systems["tuned"]["loss_reduction"] = 1 - systems["tuned"]["loss"] / systems["base"]["loss"]
    facts = {
        "precision": "float32",
        "documents": {
            "count": len(tests),
            "tokens": f"{sum(tokens):,} hidden",
            "pieces": sum(map(len, cut)),
            "piece_tokens": ModelCard.read(inputs["model"].path).max_length_tokens,
        },
        "latency": "none: documents are read, and nothing is answered",
    }
    answers = [
        {"id": row["id"], "origin": row.get("origin"), "hidden_tokens": tokens[at], "pieces": len(cut[at])}
        | {f"{name}_nats": nats[name][at] for name in nats}
        for at, row in enumerate(tests)
    ]
    return Findings(systems, "tuned", answers, facts)


def score(nats: Sequence[float], right: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    """The metrics of one system over documents with so many hidden tokens, and their 95% intervals."""
    loss = sum(nats) / sum(tokens)
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else None,
        "masked_accuracy": sum(right) / sum(tokens),
        "intervals": {
            "loss": intervals.of_ratio(list(nats), list(tokens)),
            "masked_accuracy": intervals.of_ratio(list(right), list(tokens)),
        },
    }


def _by_document(values: Sequence[float], cut: Sequence[Sequence[Piece]]) -> list[float]:
    """Sums over the pieces of each document."""
    rest = iter(values)
    return [sum(next(rest) for _ in pieces) for pieces in cut]
