"""Entities in texts: a tag for each word."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import causal, encoders, tagging
from components.shared.causal import IGNORED
from components.shared.errors import StageStopped, TuneyardError
from components.shared.tasks import Task
from components.train.objectives import texts
from components.train.objectives.base import Objective

log = logging.getLogger("tuneyard.train")


@dataclass(frozen=True)
class Tagged:
    """Token ids of a text, the tag of each token (IGNORED where it has none), and tokens of each entity."""

    ids: list[int]
    tags: list[int]
    entities: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.ids)


class TokenClassification(Objective):
    """BIO tags by cross-entropy, one term for each word: see shared/tagging.py."""

    task: Task = "token-classification"

    def __init__(self, folder: Path, labels: Sequence[str], dropout: float | None = None) -> None:
        self.labels = tagging.tag_names(labels)
        self._index = {tag: index for index, tag in enumerate(self.labels)}
        self.tokenizer = texts.open_tokenizer(folder)
        if not self.tokenizer.is_fast:
            raise TuneyardError(
                f"the tokenizer of {folder.name} ({type(self.tokenizer).__name__}) cannot say which "
                "characters a token covers, so entities cannot be found in its tokens",
                "use a base model with a tokenizer.json",
            )
        family = "AutoModelForTokenClassification"
        self.model = texts.open_headed(folder, self.tokenizer, self.labels, dropout, family)

    def usable(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows whose labels train has."""
        known = {tag[2:] for tag in self.labels}
        unknown = sorted({entity["label"] for row in rows for entity in row["entities"]} - known)
        if unknown:
            log.warning(
                "train: entity labels %s occur in eval and not in train; those examples are not judged",
                unknown,
            )
        return [row for row in rows if all(entity["label"] in known for entity in row["entities"])]

    def encode(self, example: Mapping[str, Any]) -> Tagged:
        """See Objective; an entity that ends within a word has no tags, and its words carry no loss."""
        text = example["text"]
        encoded = self.tokenizer(text, truncation=False, verbose=False, return_offsets_mapping=True)
        words = tagging.words(text, encoded["offset_mapping"])
        named, said = tagging.tags(words, tagging.spans_of(example))
        tags = [IGNORED] * len(encoded["input_ids"])
        for word, tag in zip(words, named, strict=True):
            if tag is not None:
                tags[word.first] = self._index[tag]
        entities = [(words[first].first, words[last].last) for first, last in said]
        return Tagged(list(encoded["input_ids"]), tags, entities)

    def shorten(self, encoded: Tagged, max_length: int) -> Tagged | None:
        """Cut the end of the text; an entity that the cut goes through carries no loss."""
        last = texts.closing(self.tokenizer, encoded.ids)
        room = max_length - len(last)
        tags = encoded.tags[:room]
        for first, end in encoded.entities:
            if first < room <= end:
                tags[first:] = [IGNORED] * (room - first)
        entities = [(first, end) for first, end in encoded.entities if end < room]
        return Tagged([*encoded.ids[:room], *last], [*tags, *[IGNORED] * len(last)], entities)

    def terms(self, encoded: Tagged) -> int:
        """Words with a tag."""
        return sum(tag != IGNORED for tag in encoded.tags)

    def summed_loss(self, batch: Sequence[Tagged], label_smoothing: float) -> Any:
        """See Objective."""
        import torch

        inputs = encoders.padded(self.model, self.tokenizer, [e.ids for e in batch])
        logits = self.model(**inputs).logits.float()  # [texts, columns, tags]
        columns = logits.shape[1]
        targets = torch.tensor([[*e.tags, *[IGNORED] * (columns - len(e))] for e in batch])
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1),
            targets.flatten().to(causal.device()),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=label_smoothing,
        )

    def account(self, rows: Sequence[Mapping[str, Any]], kept: Sequence[Tagged]) -> dict[str, int]:
        """How many entities the rows hold, and how many of them no tag stands for: cut, or within a word."""
        every = sum(len(row["entities"]) for row in rows)
        lost = every - sum(len(e.entities) for e in kept)
        if lost:
            log.warning(
                "train: %d of %d entities are lost: their text is cut or dropped at train.max_length, or "
                "they end within a word of the tokenizer",
                lost,
                every,
            )
        return {"entities": every, "entities_lost": lost}


def entity_labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The labels of the entities of the train examples, sorted.

    Raises:
        StageStopped: there is no entity.
    """
    labels = sorted({entity["label"] for row in rows for entity in row["entities"]})
    if not labels:
        raise StageStopped(
            f"none of the {len(rows)} examples of train holds an entity",
            "check ingest.columns: entities is a list of {start, end, label}",
        )
    return labels
