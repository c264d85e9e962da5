"""Judging a causal model on documents: how well base and tuned model predict text that neither has seen."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.evaluate import intervals, resources, sitting
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings
from components.evaluate.slices.share import Part, Share, joined
from components.shared import causal, documents
from components.shared.causal import Encoded
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context


@dataclass(frozen=True)
class Reading:
    """What one system made of the documents: nats of each, over all its pieces; speed and memory."""

    nats: list[float]
    measured: Mapping[str, Any]


@dataclass(frozen=True)
class Cut:
    """The documents as every system reads them.

    Args:
        tokens: of each document that carry loss.
        pieces: of all of them.
        counts: how many of the pieces are each document's.
    """

    tokens: list[int]
    pieces: list[Encoded]
    counts: list[int]


def prepare(tests: Sequence[Mapping[str, Any]], inputs: Mapping[str, Artifact]) -> Cut:
    """The documents in pieces as in training: their loss depends on how far back the model can look."""
    tokenizer = sitting.tokenizer_of(inputs)
    length = ModelCard.read(inputs["model"].path).max_length_tokens
    whole = [documents.encode(tokenizer, row["text"]) for row in tests]
    cut = [documents.pieces(each, length, tokenizer.bos_token_id) for each in whole]
    return Cut([e.terms for e in whole], [piece for pieces in cut for piece in pieces], list(map(len, cut)))


def take(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    share: Share,
) -> Part:
    """Read a share of the pieces with each system.

    Args:
        config: see EvaluateConfig; nothing is generated.
        tests: test examples sorted by id.
        inputs: `model`, and `compressed` where there is that stage.
        context: of the stage.
        share: which batches.

    Raises:
        TuneyardError: the base has changed.
    """
    card, ships = ModelCard.read(inputs["model"].path), sitting.shipped(inputs)
    precision = causal.served_precision(inputs[ships].path)
    pieces = prepare(tests, inputs).pieces
    systems: dict[str, Callable[[], Any]] = {
        "base": lambda: causal.load_base(card, context.store, precision),
        "tuned": lambda: causal.load(inputs[ships].path, context.store, precision)[0],
    }
    if ships == "compressed":
        systems["uncompressed"] = lambda: causal.load(inputs["model"].path, context.store, precision)[0]
    arrays: dict[str, Any] = {}
    measured: dict[str, dict[str, Any]] = {}
    for name, load in systems.items():
        # More slices than batches: nothing to load a model for.
        model = load() if sitting.loss_batches(pieces, share) else None
        started = time.perf_counter()
        with resources.peak_memory() as memory:
            arrays |= sitting.losses(name, model, pieces, share)
        seconds = time.perf_counter() - started
        read = sum(pieces[at].terms for at in arrays[f"{name}/nats:of"].tolist())
        measured[name] = {"tokens_per_second": read / seconds, "memory_gib": memory["gib"]}
        del model
        gc.collect()
    return Part(arrays, {"precision": precision}, measured if share.measures else {})


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    parts: Sequence[Part],
) -> Findings:
    """Base and tuned model side by side; `tuned` is the compressed artifact where there is one.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model`, and `compressed` where there is that stage.
        context: of the stage.
        parts: what `take` found in every share.

    Raises:
        TuneyardError: the parts do not add up.
    """
    cut, ships = prepare(tests, inputs), sitting.shipped(inputs)
    names = ["base", "tuned"] + (["uncompressed"] if ships == "compressed" else [])
    found = {name: whole(name, cut, parts) for name in names}
    characters = [len(row["text"]) for row in tests]
    systems = {name: score(found[name], cut.tokens, characters) for name in ("base", "tuned")}
    systems["base"]["about"] = "the base model, untuned"
    systems["tuned"]["about"] = f"the tuned model that ships (artifact {ships!r})"
    systems["tuned"]["loss_reduction"] = 1 - systems["tuned"]["loss"] / systems["base"]["loss"]
    between = intervals.of_reduction(found["base"].nats, found["tuned"].nats)
    systems["tuned"]["intervals"]["loss_reduction"] = between
    if "uncompressed" in found:
        systems["uncompressed"] = _uncompressed(found, sum(cut.tokens))
    facts = {
        "precision": parts[0].facts["precision"],
        "documents": {
            "count": len(tests),
            "tokens": f"{sum(cut.tokens):,}",
            "pieces": len(cut.pieces),
            "piece_tokens": ModelCard.read(inputs["model"].path).max_length_tokens,
        },
        "latency": "none: documents are read, and nothing is answered",
    }
    return Findings(systems, "tuned", rows(tests, cut, found), facts)


def whole(name: str, cut: Cut, parts: Sequence[Part]) -> Reading:
    """What one system did, put together from all shares."""
    nats = iter(joined(parts, f"{name}/nats").tolist())
    of_documents = [sum(next(nats) for _ in range(count)) for count in cut.counts]
    return Reading(of_documents, parts[0].measured.get(name, {}))


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
        **reading.measured,
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
    cut: Cut,
    found: Mapping[str, Reading],
) -> list[dict[str, Any]]:
    """What each document cost each system, for answers.jsonl."""
    return [
        {
            "id": row["id"],
            "origin": row.get("origin"),
            "characters": len(row["text"]),
            "tokens": cut.tokens[at],
            "pieces": cut.counts[at],
            "base_nats": found["base"].nats[at],
            "tuned_nats": found["tuned"].nats[at],
        }
        for at, row in enumerate(tests)
    ]
