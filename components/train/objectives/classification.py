"""Classification of texts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import causal
from components.shared.errors import StageStopped
from components.shared.tasks import Task
from components.train.objectives.base import Objective, base_settings

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

    def __init__(self, folder: Path, labels: Sequence[str], dropout: float | None = None) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.labels = list(labels)
        self._index = {label: index for index, label in enumerate(labels)}
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        settings = base_settings(folder, dropout)
        settings.id2label = dict(enumerate(labels))  # how many there are goes by this
        settings.label2id = self._index
        self.model = AutoModelForSequenceClassification.from_pretrained(
            folder, config=settings, local_files_only=True, use_safetensors=True
        ).to(causal.device())
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    def usable(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows whose label train has; another label cannot be scored."""
        unknown = sorted({row["label"] for row in rows} - set(self.labels))
        if unknown:
            log.warning(
                "train: labels %s occur in eval and not in train; those examples are not judged", unknown
            )
        return [row for row in rows if row["label"] in self._index]

    def encode(self, example: Mapping[str, Any]) -> Labelled:
        """See Objective."""
        ids = self.tokenizer(example["text"], truncation=False, verbose=False)["input_ids"]
        return Labelled(ids, self._index[example["label"]])

    def shorten(self, encoded: Labelled, max_length: int) -> Labelled | None:
        """Cut the end of the text as the tokenizer does when serving: the last special token stays."""
        last = encoded.ids[-1:] if encoded.ids[-1] in self.tokenizer.all_special_ids else []
        return Labelled([*encoded.ids[: max_length - len(last)], *last], encoded.label)

    def terms(self, encoded: Labelled) -> int:
        """One label."""
        return 1

    def summed_loss(self, batch: Sequence[Labelled], label_smoothing: float) -> Any:
        """See Objective."""
        import torch

        inputs = self.tokenizer.pad({"input_ids": [e.ids for e in batch]}, return_tensors="pt").to(
            causal.device()
        )
        targets = torch.tensor([e.label for e in batch], device=causal.device())
        logits = self.model(**inputs).logits.float()
        return torch.nn.functional.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=label_smoothing
        )


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
