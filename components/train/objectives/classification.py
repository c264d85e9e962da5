"""Classification of texts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import causal, encoders
from components.shared.errors import StageStopped
from components.shared.tasks import Task
from components.train.objectives import texts
from components.train.objectives.base import Objective

log = logging.getLogger("tuneyard.train")


@dataclass(frozen=True)
class Labelled:
    """Token ids of a text and the index of its label."""

    ids: list[int]
    label: int

    def __len__(self) -> int:
        return len(self.ids)


class Classification(Objective):
    """One label for each text, by cross-entropy over the classes."""

    task: Task = "classification"

    def __init__(
        self,
        folder: Path,
        labels: Sequence[str],
        dropout: float | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.labels = list(labels)
        self._index = {label: index for index, label in enumerate(labels)}
        self._weights = [weights[label] for label in labels] if weights else None
        self.tokenizer = texts.open_tokenizer(folder)
        self.model = texts.open_headed(folder, self.tokenizer, self.labels, dropout)

    def usable(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows whose label train has; another label cannot be scored."""
        return with_known_labels(self.labels, rows)

    def encode(self, example: Mapping[str, Any]) -> Labelled:
        """See Objective."""
        return Labelled(texts.token_ids(self.tokenizer, example["text"]), self._index[example["label"]])

    def shorten(self, encoded: Labelled, max_length: int) -> Labelled | None:
        """Cut the end of the text."""
        return Labelled(texts.cut(self.tokenizer, encoded.ids, max_length), encoded.label)

    def terms(self, encoded: Labelled) -> int:
        """One label."""
        return 1

    def summed_loss(self, batch: Sequence[Labelled], label_smoothing: float) -> Any:
        """See Objective; class weights multiply each text's loss, on eval too."""
        import torch

        inputs = encoders.padded(self.model, self.tokenizer, [e.ids for e in batch])
        logits = self.model(**inputs).logits.float()
        targets = torch.tensor([e.label for e in batch], device=causal.device())
        weight = None if self._weights is None else logits.new_tensor(self._weights)
        return torch.nn.functional.cross_entropy(
            logits, targets, weight, reduction="sum", label_smoothing=label_smoothing
        )


def with_known_labels(labels: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of eval whose label train has; which others there are is logged."""
    unknown = sorted({row["label"] for row in rows} - set(labels))
    if unknown:
        log.warning("train: labels %s occur in eval and not in train; those examples are not judged", unknown)
    return [row for row in rows if row["label"] in set(labels)]


def labels_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The labels of the train examples, sorted.

    Raises:
        StageStopped: there are fewer than two.
    """
    labels = sorted({row["label"] for row in rows})
    if len(labels) < 2:
        raise StageStopped(
            f"classification needs two labels or more; train has {labels}", "check ingest.columns"
        )
    return labels


def class_weights(rows: Sequence[Mapping[str, Any]], asked: str | Mapping[str, float]) -> dict[str, float]:
    """Weight of each class; 1 on average over train, so that the learning rate keeps its meaning.

    Args:
        rows: the train examples.
        asked: `balanced`, by which all classes weigh alike in sum: examples / (classes x examples of the
            class); or label -> weight, 1 where a label is not named.

    Raises:
        StageStopped: a label that train does not have.
    """
    counts = Counter(row["label"] for row in rows)
    if isinstance(asked, str):
        return {label: len(rows) / (len(counts) * count) for label, count in counts.items()}
    strange = sorted(set(asked) - set(counts))
    if strange:
        raise StageStopped(
            f"train.objective.class_weights names {strange}; the labels of train are {sorted(counts)}",
            "spell the labels as the corpus does",
        )
    given = {label: float(asked.get(label, 1.0)) for label in counts}
    mean = sum(given[label] * count for label, count in counts.items()) / len(rows)
    return {label: weight / mean for label, weight in given.items()}
