"""The worker of a classifier: what it puts into one batch, and whose failure is whose."""

from __future__ import annotations

import queue

import numpy as np
import pytest

from components.shared.drift import Window
from components.shared.modelcard import BaseModelRef, ModelCard
from serving.classifier import Classifier, TextJob
from serving.identity import Identity

CARD = ModelCard(
    task="classification",
    layout="transformers",
    base_model=BaseModelRef(uri="s3://models/tiny", fingerprint="0" * 64),
    labels=["down", "up"],
    max_length_tokens=32,
    trainable_weights=1,
    total_weights=1,
)


@pytest.fixture
def classifier(tiny_tokenizer):
    """Its logits are not finite for a text that begins with a Z; `seen` has the size of each batch."""
    bad = tiny_tokenizer("Z")["input_ids"][0]
    seen = []

    def forward(batch):
        ids = batch["input_ids"]
        seen.append(len(ids))
        logits = np.zeros((len(ids), 2))
        logits[:, 1] = 1.0
        logits[ids[:, 0] == bad] = np.nan
        return logits

    made = Classifier(Identity("news", "1", "0" * 64), CARD, tiny_tokenizer, forward, Window(None), "pytorch")
    yield made, seen
    made.abort(10)


def test_a_request_that_fails_fails_alone(classifier):
    """Three that came together: clients of the two good ones have not to pay for the third."""
    made, seen = classifier
    answers = [queue.SimpleQueue() for _ in range(3)]
    jobs = [
        TextJob([text], each.put) for text, each in zip(["profit", "Zebra", "profit"], answers, strict=True)
    ]
    made._answer(jobs)
    found = [each.get(timeout=10) for each in answers]
    assert seen[0] == 3, "they were one batch"
    assert [each.labels for each in (found[0], found[2])] == [["up"], ["up"]]
    assert isinstance(found[1].error, FloatingPointError) and not found[0].error and not found[2].error
