"""Judging a token classifier by the entities that it finds, beside a dictionary of train's entities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from components.evaluate import predictions, span_metrics
from components.evaluate.config import EvaluateConfig
from components.evaluate.encoders import put, settings
from components.evaluate.findings import Findings
from components.evaluate.slices.share import Part, Share, joined
from components.shared import clock, jsonl, tagging
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context
from components.shared.tagging import Span


def take(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    share: Share,
) -> Part:
    """Tag a share of the test texts with the tuned model.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model` and `train`.
        context: of the stage.
        share: which batches.
    """
    folder, part = inputs["model"].path, Part({})
    card, texts = ModelCard.read(folder), [row["text"] for row in tests]
    opened = partial(predictions.torch_tagger, folder, card.max_length_tokens)
    put("tuned", folder, opened, texts, card, config, share, part)
    return part


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    parts: Sequence[Part],
) -> Findings:
    """The entities that the tuned model and the dictionary find in the test texts.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id; one of a label that the model does not know counts as missed.
        inputs: `model` and `train`.
        context: of the stage.
        parts: what `take` found in every share.
    """
    from transformers import AutoTokenizer

    folder = inputs["model"].path
    card = ModelCard.read(folder)
    train = list(jsonl.read(inputs["train"].path / "examples.jsonl"))
    texts = [row["text"] for row in tests]
    truth = [tagging.spans_of(row) for row in tests]
    outputs = joined(parts, "tuned/outputs")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    said = {"tuned": [read(tokenizer, t, card, tags) for t, tags in zip(texts, outputs, strict=True)]}
    systems = {
        "tuned": {
            "about": "the tuned model, PyTorch float32",
            **span_metrics.score(truth, said["tuned"]),
            **parts[0].measured["tuned"],
        }
    }
    with clock.arithmetic():
        known = dictionary(train)
        said["dictionary"] = [looked_up(text, known) for text in texts]
    systems["dictionary"] = {
        "about": f"the {len(known)} entities of train, found again by their letters, the longest first",
        **span_metrics.score(truth, said["dictionary"]),
    }
    facts = settings(parts, len(tests), card)
    facts["truncated"]["entities"] = _beyond(tokenizer, texts, truth, card)
    return Findings(systems, "tuned", _rows(tests, truth, said), facts)


def read(tokenizer: Any, text: str, card: ModelCard, tags: Sequence[int]) -> list[Span]:
    """The entities that a text's tags say.

    Args:
        tokenizer: of the model.
        text: the text.
        card: names of the tags, limit of length.
        tags: index of the tag of each token.
    """
    words = tagging.words(text, _offsets(tokenizer, text, card.max_length_tokens))
    return tagging.spans(words, [card.labels[tags[word.first]] for word in words])


def _offsets(tokenizer: Any, text: str, limit: int) -> list[tuple[int, int]]:
    encoded = tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=True)
    return list(encoded["offset_mapping"])


def _beyond(tokenizer: Any, texts: Sequence[str], truth: Sequence[Sequence[Span]], card: ModelCard) -> int:
    """How many entities the model cannot see whole, since their text is cut before they end."""
    lost = 0
    for text, spans in zip(texts, truth, strict=True):
        seen = max((end for _, end in _offsets(tokenizer, text, card.max_length_tokens)), default=0)
        lost += sum(span.end > seen for span in spans)
    return lost


def dictionary(train: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The text of each entity of train -> the label it has most often."""
    counts: dict[str, Counter[str]] = {}
    for row in train:
        for span in tagging.spans_of(row):
            counts.setdefault(row["text"][span.start : span.end], Counter())[span.label] += 1
    return {text: min(found, key=lambda label: (-found[label], label)) for text, found in counts.items()}


def looked_up(text: str, known: Mapping[str, str]) -> list[Span]:
    """Known entities in a text, from its left, at each place the longest; none within a word."""
    lengths = sorted({len(entity) for entity in known}, reverse=True)
    found, at = [], 0
    while at < len(text):
        for length in lengths:
            label = known.get(text[at : at + length])
            edges = tagging.inside_word(text, at) or tagging.inside_word(text, at + length)
            if label is not None and at + length <= len(text) and not edges:
                found.append(Span(at, at + length, label))
                at += length
                break
        else:
            at += 1
    return found


def _rows(
    tests: Sequence[Mapping[str, Any]],
    truth: Sequence[Sequence[Span]],
    said: Mapping[str, Sequence[Sequence[Span]]],
) -> list[dict[str, Any]]:
    def shown(text: str, spans: Sequence[Span]) -> str:
        return "; ".join(f"{span.label}: {text[span.start : span.end]}" for span in spans) or "(none)"

    return [
        {
            "id": row["id"],
            "origin": row.get("origin"),
            "prompt": row["text"],
            "reference": shown(row["text"], truth[index]),
            **{name: shown(row["text"], spans[index]) for name, spans in said.items()},
        }
        for index, row in enumerate(tests)
    ]
