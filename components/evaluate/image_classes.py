"""Judging a classifier of images: the tuned model, a logistic regression on pixels, the commonest class."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.evaluate import baselines, class_metrics, resources
from components.evaluate.classes import refuse_unknown_labels
from components.evaluate.config import EvaluateConfig
from components.evaluate.findings import Findings
from components.evaluate.slices.share import Part, Share, joined, rows
from components.shared import causal, clock, images, media, opening
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.progress import Progress
from components.shared.stage import Artifact, Context
from components.shared.store import Store

_TIMED_SINGLY = 48
# The side, in pixels, of what the regression sees: larger pictures gain it little and cost it much.
_THUMBNAIL = 16


def take(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    share: Share,
) -> Part:
    """Put a share of the test images through the tuned model.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model`.
        context: of the stage.
        share: which batches.

    Raises:
        TuneyardError: the model's images are no longer prepared as they were in its training.
    """
    import torch

    part, size, every = Part({}), config.per_device_batch_size, range(len(tests))
    batches = share.take([every[a : a + size] for a in range(0, len(tests), size)])
    if not batches:
        part.arrays.update(rows("tuned/logits", [], []))
        return part
    progress = Progress(share.label("tuned: images"), sum(map(len, batches)), "images")
    with resources.peak_memory() as memory:
        forward = _opened(inputs["model"].path, context.store, [row["image"] for row in tests])
        forward(batches[0])  # the first pass pays for set-up; it does not count
        started, logits = time.perf_counter(), []
        for batch in batches:
            logits.append(forward(batch))
            progress.advance(len(batch))
        seconds = time.perf_counter() - started
        singly = list(every)[:: max(1, len(tests) // _TIMED_SINGLY)] if share.measures else []
        alone = [_seconds(forward, index) for index in singly]
    del forward
    gc.collect()
    of = [index for batch in batches for index in batch]
    part.arrays.update(rows("tuned/logits", of, _stacked(logits)))
    if share.measures:
        measured = {"images_per_second": len(of) / seconds, "memory_gib": memory["gib"]}
        part.measured["tuned"] = resources.latencies(alone) | measured
        part.measured["machine"] = {"threads": int(torch.get_num_threads())}
    return part


def _opened(folder: Path, store: Store, paths: Sequence[str]) -> Callable[[Sequence[int]], Any]:
    """The model of a folder: indices of pictures in, logits [pictures, classes] out.

    Raises:
        TuneyardError: its pictures are no longer prepared as they were in its training.
    """
    import torch
    from transformers import AutoModelForImageClassification

    processor = images.open_processor(folder)
    images.refuse_other(processor, ModelCard.read(folder).preprocess_probe, folder)
    model = opening.tuned(folder, store, AutoModelForImageClassification).to(causal.device())

    def forward(of: Sequence[int]) -> Any:
        pictures = [images.decode(Path(paths[i]))[0] for i in of]
        with clock.arithmetic(), torch.inference_mode():
            values = torch.tensor(images.pixel_values(processor, pictures), device=causal.device())
            return model(pixel_values=values).logits.float().cpu().numpy()

    return forward


def _seconds(forward: Any, index: int) -> float:
    started = time.perf_counter()
    forward([index])
    return time.perf_counter() - started


def _stacked(parts: Sequence[Any]) -> Any:
    import numpy as np

    return np.concatenate(parts)


def judge(
    config: EvaluateConfig,
    tests: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Artifact],
    context: Context,
    parts: Sequence[Part],
) -> Findings:
    """Every way to classify the test images, side by side.

    Args:
        config: see EvaluateConfig.
        tests: test examples sorted by id.
        inputs: `model` and `train`.
        context: of the stage.
        parts: what `take` found in every share.

    Raises:
        TuneyardError: a label is none of the model's, or the parts do not add up.
    """
    card = ModelCard.read(inputs["model"].path)
    train = list(media.read(inputs["train"].path))
    refuse_unknown_labels({"test": tests, "train": train}, card.labels)
    truth = [card.labels.index(row["label"]) for row in tests]
    scores = {"tuned": class_metrics.probabilities(joined(parts, "tuned/logits"))}
    scores["pixels_logreg"], fitted = _on_pixels(train, tests, card.labels)
    counts = Counter(row["label"] for row in train)
    scores["commonest"] = _stacked([[[counts[label] / len(train) for label in card.labels]]] * len(tests))
    abouts = {
        "tuned": "the tuned model, PyTorch float32",
        "pixels_logreg": f"logistic regression on {_THUMBNAIL}² pixels of each of {fitted} train examples",
        "commonest": f"the commonest class of train, {counts.most_common(1)[0][0]}, whatever the image",
    }
    systems = {
        name: {"about": abouts[name], **class_metrics.score(truth, found, card.labels)}
        for name, found in scores.items()
    }
    positive = positive_label(config.positive_label, card.labels, counts)
    for name, found in scores.items() if positive else ():
        systems[name] |= class_metrics.of_two(truth, found, card.labels.index(str(positive)))
    systems["tuned"] |= parts[0].measured["tuned"]
    facts = {
        "latency": "of one image alone, reading and preparing it included",
        "threads": parts[0].measured["machine"]["threads"],
    } | ({"positive_label": positive} if positive else {})
    return Findings(systems, "tuned", _rows(tests, card.labels, scores), facts)


def positive_label(asked: str | None, labels: Sequence[str], counts: Mapping[str, int]) -> str | None:
    """The class that sensitivity is of: the rarer of two in train, the later by name of equal ones.

    Args:
        asked: by the pipeline file.
        labels: of the model.
        counts: label -> train examples.

    Raises:
        TuneyardError: the asked one is none of the labels, or there are more than two.
    """
    if asked is not None and (asked not in labels or len(labels) != 2):
        raise TuneyardError(
            f"evaluate.positive_label is {asked!r}, and the model's classes are {list(labels)}",
            "name one of two classes, or drop it",
        )
    if len(labels) != 2:
        return None
    return asked or min(reversed(sorted(labels)), key=lambda label: counts[label])


def _on_pixels(
    train: Sequence[Mapping[str, Any]], tests: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> tuple[Any, int]:
    """Probabilities of a logistic regression, and how many train examples it saw."""
    few = baselines.probe_examples(train)
    truth = [labels.index(row["label"]) for row in few]
    seen, asked = (_stacked([_thumbnail(row["image"]) for row in part]) for part in (few, tests))
    with clock.arithmetic():
        return baselines.linear_probe(seen, truth, asked, len(labels)), len(few)


def _thumbnail(path: str) -> Any:
    """Brightness [1, pixels] of a picture made small, 0-1."""
    import numpy as np
    from PIL import Image

    grey = images.decode(Path(path))[0].convert("L")
    small = grey.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float32).reshape(1, -1) / 255


def _rows(
    tests: Sequence[Mapping[str, Any]], labels: Sequence[str], scores: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What each system said of each image, for answers.jsonl and the page."""
    said = {name: table.argmax(axis=1) for name, table in scores.items()}
    return [
        {
            "id": row["id"],
            "origin": row.get("origin"),
            "prompt": f"{row['origin']['file']}:{row['origin']['line']}",
            "reference": row["label"],
            **{name: labels[int(found[index])] for name, found in said.items()},
            **{f"{name}_probability": float(scores[name][index].max()) for name in scores},
        }
        for index, row in enumerate(tests)
    ]
