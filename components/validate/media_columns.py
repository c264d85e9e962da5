"""Columns of examples that are files, and measures of labels that every kind of example may have."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from components.shared import examples as dataset

Rows = Sequence[Mapping[str, Any]]


def pictured(examples: Rows) -> dict[str, list[Any]]:
    """Of labelled-image: what ingest measured of each, and how labels lie over them."""
    names = (*dataset.fields("labelled-image"), *dataset.MEASURED["labelled-image"])
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in examples] for name in names}
    # The name in the artifact says nothing; the one at the source can be looked at.
    columns["image"] = [row.get("origin", {}).get("file") for row in examples]
    columns |= classes(columns["label"])
    columns["labels_for_image"] = distinct(columns["pixels"], columns["label"])
    columns["aspect"] = [max(w / h, h / w) for w, h in zip(columns["width"], columns["height"], strict=True)]
    return columns


def spoken(examples: Rows) -> dict[str, list[Any]]:
    """Of transcribed-audio: what ingest measured of each, and how much is said in how long."""
    names = (*dataset.fields("transcribed-audio"), *dataset.MEASURED["transcribed-audio"])
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in examples] for name in names}
    columns["audio"] = [row.get("origin", {}).get("file") for row in examples]
    columns["texts_for_audio"] = distinct(columns["samples"], [str(text) for text in columns["text"]])
    columns["characters_per_second"] = [
        len(str(text)) / max(seconds, 1e-3)
        for text, seconds in zip(columns["text"], columns["seconds"], strict=True)
    ]
    return columns


def classes(labels: Sequence[str]) -> dict[str, list[Any]]:
    """Measures of how examples are spread over labels."""
    counts = Counter(labels)
    largest = max(counts.values(), default=0)
    return {
        "label_examples": [counts[label] for label in labels],
        "label_imbalance": [largest / counts[label] for label in labels],
        "label_spellings": distinct([folded(label) for label in labels], labels),
    }


def folded(label: str) -> str:
    """A label without what a person would not see as another: case, width, blanks."""
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())


def distinct(keys: Sequence[str], values: Sequence[str]) -> list[int]:
    """For each row, how many distinct values its key has."""
    found: dict[str, set[str]] = defaultdict(set)
    for key, value in zip(keys, values, strict=True):
        found[key].add(value)
    return [len(found[key]) for key in keys]
