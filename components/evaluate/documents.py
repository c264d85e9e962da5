"""Judging a causal model on documents: how well base and tuned model predict text that neither has seen."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.evaluate import intervals, resources
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings
from components.shared import causal, documents
from components.shared.causal import Encoded
from components.shared.modelcard import ModelCard
from components.shared.progress import Progress
from components.shared.stage import Artifact, Context


@dataclass(frozen=True)
class Reading:
    """What one system made of the documents: nats of each, over all its pieces."""

    nats: list[float]
    seconds: float
    memory_gib: float


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
) -> Findings:
    """Base and tuned model side by side; `tuned` is the compressed artifact where there is one.

    Args:
        config: see EvaluateConfig; nothing is generated.
        tests: test examples sorted by id.
        inputs: `model`, and `compressed` where there is that stage.
        context: of the stage.
    """
    from transformers import AutoTokenizer

    folder = inputs["model"].path
    card = ModelCard.read(folder)
    shipped = "compressed" if "compressed" in inputs else "model"
    precision = causal.served_precision(inputs[shipped].path)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    whole = [documents.encode(tokenizer, row["text"]) for row in tests]
    # As in training: the loss of a document depends on how far back the model can look.
    cut = [documents.pieces(e, card.max_length_tokens, tokenizer.bos_token_id) for e in whole]
    found: dict[str, Reading] = {}
    for name, path in (("base", None), ("tuned", inputs[shipped].path), ("uncompressed", folder)):
        if name == "uncompressed" and shipped == "model":
            continue
        opened = causal.load(path, context.store, precision)[0] if path else None
        model = opened if path else causal.load_base(card, context.store, precision)
        found[name] = read(name, model, cut)
        del model, opened
        gc.collect()
    characters = [len(row["text"]) for row in tests]
    tokens = [e.terms for e in whole]
    systems = {name: score(found[name], tokens, characters) for name in ("base", "tuned")}
    systems["base"]["about"] = "the base model, untuned"
    systems["tuned"]["about"] = f"the tuned model that ships (artifact {shipped!r})"
    systems["tuned"]["loss_reduction"] = 1 - systems["tuned"]["loss"] / systems["base"]["loss"]
    between = intervals.of_reduction(found["base"].nats, found["tuned"].nats)
    systems["tuned"]["intervals"]["loss_reduction"] = between
    if "uncompressed" in found:
        systems["uncompressed"] = _uncompressed(found, sum(tokens))
    facts = {
        "precision": precision,
        "documents": {
            "count": len(tests),
            "tokens": sum(tokens),
            "pieces": sum(map(len, cut)),
            "piece_tokens": card.max_length_tokens,
        },
        "latency": "none: documents are read, and nothing is answered",
    }
    return Findings(systems, "tuned", rows(tests, tokens, cut, found), facts)


def read(name: str, model: Any, cut: Sequence[Sequence[Encoded]]) -> Reading:
    """Let one system read the documents, with progress lines under its name."""
    every = [piece for pieces in cut for piece in pieces]
    started = time.perf_counter()
    with resources.peak_memory() as memory:
        progress = Progress(f"{name}: loss", len(every), "pieces")
        nats = iter(causal.answer_nats(model, every, done=progress.advance))
    seconds = time.perf_counter() - started
    return Reading([sum(next(nats) for _ in pieces) for pieces in cut], seconds, memory["gib"])


def score(reading: Reading, tokens: Sequence[int], characters: Sequence[int]) -> dict[str, Any]:
    """The metrics of one system (names and units: config.METRICS), and their 95% intervals.

    Those for each character can be compared between models whose tokens differ.
    """
    nats = sum(reading.nats)
    loss, by_character = nats / sum(tokens), nats / sum(characters)
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else None,
        "loss_per_character": by_character,
        "perplexity_per_character": math.exp(by_character) if by_character < 700 else None,
        "tokens_per_second": sum(tokens) / reading.seconds,
        "memory_gib": reading.memory_gib,
        "intervals": {
            "loss": intervals.of_ratio(reading.nats, list(tokens)),
            "loss_per_character": intervals.of_ratio(reading.nats, list(characters)),
        },
    }


def _uncompressed(found: Mapping[str, Reading], tokens: int) -> dict[str, Any]:
    """The loss before compression: merging must not cost any."""
    before, after = (sum(found[name].nats) / tokens for name in ("uncompressed", "tuned"))
    return {
        "about": "artifact 'model': what compression changed",
        "loss": before,
        "compressed_loss": after,
        "loss_increase": after - before,
        "examples": len(found["tuned"].nats),
    }


def rows(
    tests: Sequence[Mapping[str, Any]],
    tokens: Sequence[int],
    cut: Sequence[Sequence[Encoded]],
    found: Mapping[str, Reading],
) -> list[dict[str, Any]]:
    """What each document cost each system, for answers.jsonl."""
    return [
        {
            "id": row["id"],
            "origin": row.get("origin"),
            "characters": len(row["text"]),
            "tokens": tokens[at],
            "pieces": len(cut[at]),
            "base_nats": found["base"].nats[at],
            "tuned_nats": found["tuned"].nats[at],
        }
        for at, row in enumerate(tests)
    ]
