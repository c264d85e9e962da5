"""Classification of images, by any model of transformers' AutoModelForImageClassification."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import causal, families, images
from components.shared.tasks import Task
from components.train.config import TrainConfig
from components.train.objectives.augmentation import Augmented
from components.train.objectives.base import base_settings
from components.train.objectives.classification import class_weights, labels_of, with_known_labels
from components.train.objectives.image_augmenting import augmented
from components.train.objectives.media_config import ImageClassificationObjective
from components.train.ranks import Ranks

log = logging.getLogger("tuneyard.train")


@dataclass(frozen=True)
class Pictured:
    """Where an image is, the index of its label, and what tells its augmentation from others'."""

    path: str
    label: int
    id: str

    def __len__(self) -> int:
        return 1


class ImageClassification(Augmented):
    """One label for each image, by cross-entropy over the classes. What others count in tokens are images."""

    task: Task = "image-classification"

    def __init__(self, folder: Path, config: TrainConfig, rows: Sequence[Mapping[str, Any]]) -> None:
        assert isinstance(config.objective, ImageClassificationObjective)
        asked = config.objective.class_weights
        self._augment = config.objective.augment
        self._batch = config.per_device_batch_size
        self.labels = labels_of(rows)
        self._index = {label: index for index, label in enumerate(self.labels)}
        weights = class_weights(rows, asked) if asked else None
        self._weights = [weights[label] for label in self.labels] if weights else None
        self.tokenizer = images.open_processor(folder)
        self.model = _open(folder, self.labels, config.dropout)
        self.own_weights = tuple(families.head(self.model))
        self._probe = images.probe(self.tokenizer)

    def usable(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows whose label train has; another label cannot be scored."""
        return with_known_labels(self.labels, rows)

    def encode(self, example: Mapping[str, Any]) -> Pictured:
        """See Objective; the image itself is read when it is needed."""
        return Pictured(example["image"], self._index[example["label"]], example["id"])

    def shorten(self, encoded: Pictured, max_length: int) -> Pictured | None:
        """An image is never too long."""
        return encoded

    def terms(self, encoded: Pictured) -> int:
        """One label."""
        return 1

    def summed_loss(self, batch: Sequence[Pictured], label_smoothing: float) -> Any:
        """See Objective; class weights multiply each image's loss, on eval too."""
        import torch

        logits = self.logits(batch)
        targets = torch.tensor([e.label for e in batch], device=causal.device())
        weight = None if self._weights is None else logits.new_tensor(self._weights)
        return torch.nn.functional.cross_entropy(
            logits, targets, weight, reduction="sum", label_smoothing=label_smoothing
        )

    def logits(self, batch: Sequence[Pictured]) -> Any:
        """Float32 [images, classes]; of changed images while the model is in training mode."""
        import torch
        from torch.nn.modules.batchnorm import _BatchNorm

        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()  # `train()` has switched them all
        pictures = [images.decode(Path(e.path))[0] for e in batch]
        if self.model.training:
            draws = [random.Random(f"{self._draw}/{e.id}") for e in batch]
            pictures = [augmented(p, self._augment, d) for p, d in zip(pictures, draws, strict=True)]
        values = torch.tensor(images.pixel_values(self.tokenizer, pictures), device=causal.device())
        return self.model(pixel_values=values).logits.float()

    def judged_loss(self, encoded: Sequence[Any], batches: Iterable[Sequence[int]], ranks: Ranks) -> float:
        """See Objective; in batches of as many images as in training."""
        every = [i for batch in batches for i in batch]
        cut = [every[a : a + self._batch] for a in range(0, len(every), self._batch)]
        return super().judged_loss(encoded, cut, ranks)

    def card_facts(self) -> dict[str, Any]:
        """What evaluation holds the saved processor against."""
        return {"preprocess_probe": self._probe}


def _open(folder: Path, labels: Sequence[str], dropout: float | None) -> Any:
    """The base model of a folder under a head for these labels; a head of other labels is drawn anew."""
    from transformers import AutoModelForImageClassification

    settings = base_settings(folder, dropout)
    settings.id2label = dict(enumerate(labels))  # how many there are goes by this
    settings.label2id = {label: index for index, label in enumerate(labels)}
    model = AutoModelForImageClassification.from_pretrained(
        folder, config=settings, local_files_only=True, use_safetensors=True, ignore_mismatched_sizes=True
    )
    return model.to(causal.device())
