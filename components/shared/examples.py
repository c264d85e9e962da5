"""The dataset types: which fields an example of each has.

An example on disk is a JSON object: the fields below, `id` (hex sha256 of the fields, so equal content has
equal ids; a file counts by what it decodes to), `origin` ({file, line, part}: where it was read; part is
`main`, `test` or `domain`), `extra` (columns kept beside, e.g. for grouping) and `original` (fields as they
were before normalisation, where that changed them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

# Beside `examples.jsonl`, in artifacts of a pipeline that trains on domain text first: the documents.
DOMAIN = "domain.jsonl"

DatasetType = Literal[
    "prompt-completion",
    "conversational",
    "language-modeling",
    "prompt-only",
    "preference",
    "labelled-text",
    "scored-text",
    "tagged-text",
    "text-pair",
    "task-text",
    "labelled-image",
    "transcribed-audio",
]

REQUIRED: dict[str, tuple[str, ...]] = {
    "prompt-completion": ("prompt", "completion"),
    "conversational": ("messages",),
    "language-modeling": ("text",),
    "prompt-only": ("prompt",),
    "preference": ("prompt", "chosen", "rejected"),
    "labelled-text": ("text", "label"),
    "scored-text": ("text", "score"),
    "tagged-text": ("text", "entities"),
    "text-pair": ("anchor", "positive"),
    "task-text": ("task", "text", "label"),
    "labelled-image": ("image", "label"),
    "transcribed-audio": ("audio", "text"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "prompt-completion": ("system", "reasoning"),
    "conversational": ("tools",),
    "prompt-only": ("system",),
    "preference": ("system", "chosen_score", "rejected_score"),
    "text-pair": ("negative",),
}
# What a field holds; text where it is not named here.
NOT_TEXT: dict[str, Literal["messages", "tools", "number", "spans", "media"]] = {
    "messages": "messages",
    "tools": "tools",
    "score": "number",
    "chosen_score": "number",
    "rejected_score": "number",
    "entities": "spans",
    "image": "media",
    "audio": "media",
}
# What ingest measures of a media file and writes beside its field. The first says what is in the file when it
# is decoded, as sha256: two examples that share it show a model the same, whatever their bytes are.
MEASURED: dict[str, tuple[str, ...]] = {
    "labelled-image": ("pixels", "width", "height", "channels", "spread"),
    "transcribed-audio": ("samples", "seconds", "sample_rate", "channels", "level_db"),
}


def fields(dataset_type: str) -> tuple[str, ...]:
    """Every field an example of the type may have, required ones first."""
    return REQUIRED[dataset_type] + OPTIONAL.get(dataset_type, ())


def content(example: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an example, without id, origin, extra and original."""
    return {k: v for k, v in example.items() if k not in ("id", "origin", "extra", "original")}


def media_field(dataset_type: str) -> str | None:
    """The field of a dataset type that names a file; None where all is in the row."""
    return next((name for name in REQUIRED[dataset_type] if NOT_TEXT.get(name) == "media"), None)


def likeness(example: Mapping[str, Any]) -> str:
    """What examples share that must stand on one side: of media what is in the file, else the id."""
    decoded = [example[names[0]] for names in MEASURED.values() if names[0] in example]
    return decoded[0] if decoded else example["id"]


def kind(example: Mapping[str, Any]) -> str:
    """The dataset type of an example, by its fields: of those that it has all of, the one with the most."""
    fitting = [name for name, needed in REQUIRED.items() if set(needed) <= example.keys()]
    return max(fitting, key=lambda name: len(REQUIRED[name]), default="")


def messages(example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An example as chat messages; the last one is the assistant's: of a preference, the chosen answer."""
    if "messages" in example:
        return list(example["messages"])
    answer = example["chosen"] if "chosen" in example else example["completion"]
    return [*asked(example), {"role": "assistant", "content": answer}]


def asked(example: Mapping[str, Any]) -> list[dict[str, str]]:
    """The chat messages of an example before its answer."""
    if "messages" in example:
        return list(example["messages"])[:-1]
    system = [{"role": "system", "content": example["system"]}] if example.get("system") else []
    return [*system, {"role": "user", "content": example["prompt"]}]
