"""What evaluate is said to hold is what its own code holds on real numbers."""

from __future__ import annotations

import pytest
import torch

from components.evaluate import footprint, predictions, sitting
from components.evaluate.config import EvaluateConfig
from components.shared import causal, generation
from tests.live import Counted


@pytest.fixture
def bare(monkeypatch):
    """Tensors alone: no libraries, no slack."""
    for name in ("CAUSAL_HOST_BYTES", "ENCODER_HOST_BYTES", "SLACK", "KERNEL_BYTES"):
        monkeypatch.setattr(footprint, name, 0)


def asked(count, words):
    return [
        {"id": f"{i:03}", "prompt": " ".join(["rent"] * words), "completion": f"paid {i} " * 20}
        for i in range(count)
    ]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_dry_exam_holds_what_a_real_one_does(tiny_causal, bare, precision):
    rows, config = asked(8, 40), EvaluateConfig(per_device_batch_size=4, max_new_tokens=6)
    said = footprint.of_causal(config, tiny_causal, rows, 0, precision)
    model, tokenizer = causal.open_folder(tiny_causal, precision)
    exam, _ = sitting.prepare(config, rows, tokenizer, 512)
    with Counted() as live:
        for weight in (*model.parameters(), *model.buffers()):
            live.see(weight)
        causal.answer_nats(model, exam.encoded, sitting.BATCH_TOKENS)
        # No token ends an answer: each is as long as it may be.
        generation.generate(model, exam.prompts, (), exam.max_new_tokens, 4)
    # A few small tensors are made where one mode or the other does not look.
    assert said == pytest.approx(live.peak, rel=0.05)


def test_a_file_of_another_precision_is_in_memory_beside_the_model(tiny_causal, bare):
    config, rows = EvaluateConfig(max_generated=1, max_new_tokens=2), asked(1, 1)
    model = sum(weight.nbytes for weight in causal.open_model(tiny_causal, "float32").parameters())
    mapped = footprint.of_causal(config, tiny_causal, rows, model, "float32")
    beside = footprint.of_causal(config, tiny_causal, rows, 40 * model, "float32")
    assert beside == pytest.approx(41 * model, rel=0.02)
    assert mapped < 40 * model


def test_more_prompts_at_a_time_and_longer_answers_need_more(tiny_causal, bare, monkeypatch):
    monkeypatch.setattr(sitting, "BATCH_TOKENS", 1)  # the losses are not what is looked at here

    def needs(words, prompts, tokens):
        config = EvaluateConfig(per_device_batch_size=prompts, max_new_tokens=tokens)
        return footprint.of_causal(config, tiny_causal, asked(16, words), 0, "float32")

    assert needs(20, 16, 2) > needs(20, 2, 2)
    # Of short prompts the keys and values of the answers are most of it.
    assert needs(1, 16, 200) > needs(1, 16, 2)


def test_a_dry_classifier_holds_what_a_real_one_does(tiny_encoder, bare, monkeypatch):
    monkeypatch.setattr(causal, "preferred_precision", lambda setting: "float32")
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    texts = ["profit rose " * 10] * 8
    config = EvaluateConfig(per_device_batch_size=8)
    said = footprint.of_classifier(config, tiny_encoder, texts, 2, 64)
    encodings = predictions.encode(AutoTokenizer.from_pretrained(tiny_encoder), texts, 64)
    batch = {name: torch.from_numpy(array) for name, array in encodings.batch(range(8)).items()}
    held = working = 0
    for kind in (AutoModelForSequenceClassification, AutoModel):
        model = kind.from_pretrained(tiny_encoder, dtype=torch.float32).eval()
        with Counted() as live, torch.inference_mode():
            for weight in (*model.parameters(), *model.buffers()):
                live.see(weight)
            before = live.bytes
            model(**batch)
        held, working = max(held, before), working + live.peak - before
    assert said == pytest.approx(held + working, rel=0.05)
