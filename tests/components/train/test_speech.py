"""Speech: the loss is transformers' own, augmentation does what it says, edits judge transcripts."""

from __future__ import annotations

import io
import json
import math
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from components.evaluate import speech_metrics
from components.evaluate.config import METRICS, EvaluateConfig
from components.evaluate.evaluate import evaluate, read_tests, task_of
from components.evaluate.slices.share import Share
from components.ingest.config import IngestConfig
from components.ingest.ingest import ingest
from components.register.compare import default_metric
from components.register.config import BETTER
from components.shared import sounds, transcribing
from components.shared.errors import StageStopped, TuneyardError
from components.shared.media import BadMedia
from components.shared.modelcard import ModelCard
from components.shared.store import Store
from components.split.config import SplitConfig
from components.split.split import split
from components.train import selfcheck
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.fit import fit
from components.train.footprint import predict
from components.train.objectives.media_config import SpeechAugmentation
from components.train.objectives.opening import open_objective
from components.train.objectives.sound_augmenting import augmented, masked, noisy, stretched
from components.train.train import train
from tests.components.train.staging import stage
from tests.tiny import tiny_whisper

RATE = 8000
AUGMENT = {"noise_snr_db": 15.0, "stretch": 0.2, "mask_seconds": 0.1, "mask_bands": 3}
TONES = {"low": 300.0, "high": 1800.0}


def tone(hertz, seconds=0.4, seed=0, rate=RATE):
    at = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.01, len(at))
    return (0.4 * np.sin(2 * math.pi * hertz * at) + noise).astype(np.float32)


def wav(samples, rate=RATE, width=2, channels=1):
    """Samples from -1 to 1 as a file of that many bytes a sample."""
    body = io.BytesIO()
    top = 2 ** (8 * width - 1)
    whole = np.clip(np.round(np.asarray(samples, dtype=np.float64) * top), -top, top - 1).astype(np.int64)
    octets = b"".join(
        int(v + (128 if width == 1 else 0)).to_bytes(width, "little", signed=width > 1) for v in whole
    )
    with wave.open(body, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(octets)
    return body.getvalue()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    tiny_whisper(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Sixty tones of either pitch, each with a text file of its name that says which."""
    folder = tmp_path_factory.mktemp("tones")
    for number in range(120):
        word = ("low", "high")[number % 2]
        samples = tone(TONES[word] * (1 + number / 1000), 0.2 + number / 400, seed=number)
        (folder / f"{number:03}.wav").write_bytes(wav(samples))
        (folder / f"{number:03}.txt").write_text(word, encoding="utf-8")
    return folder


def rows_of(corpus, count=8):
    return [
        {"audio": str(path), "text": path.with_suffix(".txt").read_text(), "id": path.stem, "seconds": 0.5}
        for path in sorted(corpus.glob("*.wav"))[:count]
    ]


def opened(base, rows, augment=None, **settings):
    objective = {"kind": "speech-recognition", "augment": augment or {}}
    settings = {"objective": objective, "precision": "float32", "dropout": 0.0, "max_length": 40, **settings}
    config = TrainConfig(base_model=str(base), **settings)
    torch.manual_seed(config.seed)
    return open_objective(config, rows, base), config


def test_the_loss_is_that_of_transformers(base, corpus):
    """Its labels hold -100 at the prefix, which it is given and need not write."""
    rows = rows_of(corpus)
    objective, _ = opened(base, rows)
    objective.model.eval()
    batch = [objective.encode(row) for row in rows]
    tokenizer = objective.tokenizer.tokenizer
    assert [tokenizer.decode(e.text.answer) for e in batch[:2]] == ["low<|endoftext|>", "high<|endoftext|>"]
    assert tokenizer.convert_ids_to_tokens(batch[0].text.prompt) == [
        "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>",
    ]  # fmt: skip
    longest = max(map(len, batch)) - 1
    ids, labels = torch.full((8, longest), tokenizer.pad_token_id), torch.full((8, longest), -100)
    for row, e in enumerate(batch):
        whole = torch.tensor([*e.text.prompt, *e.text.answer])
        ids[row, : len(whole) - 1] = whole[:-1]
        labels[row, len(e.text.prompt) - 1 : len(whole) - 1] = torch.tensor(e.text.answer)
    heard = torch.tensor(objective.heard(batch))
    terms = sum(map(objective.terms, batch))
    book = objective.model(input_features=heard, decoder_input_ids=ids, labels=labels).loss * terms
    torch.testing.assert_close(objective.summed_loss(batch, 0.0), book, rtol=1e-5, atol=1e-5)


def test_micro_batches_add_up_with_augmentation_on(base, corpus):
    rows = rows_of(corpus)
    objective, _ = opened(base, rows, AUGMENT)
    objective.model.train()
    batch = [objective.encode(row) for row in rows]
    objective.turns([batch], None)
    heard = objective.heard(batch)
    assert np.array_equal(heard, np.concatenate([objective.heard(batch[:3]), objective.heard(batch[3:])]))
    whole = objective.summed_loss(batch, 0.0).item()
    parts = sum(objective.summed_loss(part, 0.0).item() for part in (batch[:3], batch[3:]))
    assert whole == pytest.approx(parts, rel=1e-5)
    # Another update draws anew; what judges is never changed.
    objective.turns([batch], None)
    assert not np.allclose(heard, objective.heard(batch), atol=1e-3)
    objective.model.eval()
    assert not np.allclose(heard, objective.heard(batch), atol=1e-3)
    assert np.array_equal(objective.heard(batch), objective.heard(batch))
    assert selfcheck.check(objective, batch, rows, "float32")["micro_batches_gradient"] < 1e-3


def test_what_training_computes_in_does_not_reach_the_features(base, corpus):
    """Under autocast a product inside the extractor would be in bfloat16."""
    objective, _ = opened(base, rows_of(corpus))
    objective.model.eval()
    batch = [objective.encode(row) for row in rows_of(corpus)]
    plain = objective.heard(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(objective.heard(batch), plain)


def test_augmentation_does_what_it_says():
    clean, draw = tone(440, 1.0), np.random.default_rng(0)
    added = noisy(clean, 10.0, draw) - clean
    ratio = 10 * math.log10(float((clean**2).mean() / (added**2).mean()))
    assert ratio == pytest.approx(10.0, abs=0.3)  # of 8,000 draws: a deviation of 0.1 dB
    for speed in (0.8, 1.25):
        found = stretched(clean, speed, RATE)
        assert len(found) == round(len(clean) / speed)
        # The same pitch: the strongest frequency is where it was, to a bin of its transform.
        middle = found[len(found) // 4 : -len(found) // 4]
        peak = np.fft.rfft(middle * np.hanning(len(middle)))
        assert np.abs(peak).argmax() * RATE / len(middle) == pytest.approx(440, abs=2 * RATE / len(middle))
        assert float((middle**2).mean()) == pytest.approx(float((clean**2).mean()), rel=0.2)
    how = SpeechAugmentation(mask_bands=3, mask_seconds=0.1)
    features = np.random.default_rng(1).normal(size=(16, 100)).astype(np.float32)
    hidden = [masked(features, how, 100.0, np.random.default_rng(seed)) for seed in range(20)]
    rows = [int((h != features).all(axis=1).sum()) for h in hidden]
    columns = [int((h != features).all(axis=0).sum()) for h in hidden]
    assert 0 < max(rows) <= 3 and 0 < max(columns) <= 10
    # Slowed speech still fits the window, and the same draw gives the same sound.
    long, how = tone(440, 0.95), SpeechAugmentation(**AUGMENT)
    found = [augmented(long, RATE, RATE, how, np.random.default_rng(seed)) for seed in (*range(8), 0)]
    assert max(map(len, found)) <= RATE and np.array_equal(found[0], found[-1])
    assert len({len(f) for f in found}) > 4
    assert augmented(long, RATE, RATE, SpeechAugmentation(), None) is long


def fitted(base, corpus, folder, interrupt_after=None):
    rows = rows_of(corpus, 16)
    objective, config = opened(
        base, rows, AUGMENT, adapter="progressive", max_steps=8, per_device_batch_size=4, learning_rate=1e-2,
        checkpoint_steps=3, early_stopping=None, dropout=0.1,
    )  # fmt: skip
    apply_adapter(objective, config)
    encoded = [objective.encode(row) for row in rows]

    def report(history, ended):
        if interrupt_after and len(history) == interrupt_after:
            raise KeyboardInterrupt

    fit(objective, encoded, encoded[:4], config, "float32", folder, report)
    return objective.model.state_dict()


def test_a_resumed_training_ends_in_the_same_bits(base, corpus, tmp_path):
    whole = fitted(base, corpus, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fitted(base, corpus, tmp_path / "cut", interrupt_after=5)
    torch.manual_seed(99)
    resumed = fitted(base, corpus, tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_is_written_greedily_is_what_transformers_writes(base, corpus):
    """Step by step with kept keys, against whole passes without."""
    rows = rows_of(corpus, 3)
    objective, _ = opened(base, rows)
    model = objective.model.eval()
    with torch.no_grad():  # a model that ends its transcripts at different lengths
        model.proj_out.weight.mul_(8)
    heard = torch.tensor(objective.heard([objective.encode(row) for row in rows]))
    tokenizer = objective.tokenizer.tokenizer
    prefix, end = tokenizer.prefix_tokens, tokenizer.eos_token_id
    found = transcribing.write(model, heard, prefix, end, 12)
    for number in range(3):
        ids = list(prefix)
        with torch.no_grad():
            for _ in range(12):
                logits = model(heard[number : number + 1], decoder_input_ids=torch.tensor([ids])).logits
                ids.append(int(logits[0, -1].argmax()))
        answer = ids[len(prefix) :]
        assert found[number] == (answer[: answer.index(end)] if end in answer else answer)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_recordings_go_through_the_stages(base, corpus, tmp_path, monkeypatch, adapter):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    read, made = stage(ingest, IngestConfig(source=str(corpus), format="transcribed-audio"), {}, tmp_path)
    assert read.summary["kept"] == 120
    _, sides = stage(split, SplitConfig(), {**made, "report": made["quarantine"]}, tmp_path)
    config = TrainConfig(
        objective={"kind": "speech-recognition", "augment": {"noise_snr_db": 30}},
        base_model=str(base),
        adapter="full" if adapter == "full" else {"kind": "lora", "dropout": 0.0, "rank": 16},
        max_steps=80,
        per_device_batch_size=8,
        learning_rate=1e-2,
        early_stopping=None,
        dropout=0.0,
        precision="float32",
        max_length=40,
    )
    result, made = stage(train, config, sides, tmp_path)
    # A random base has little that a small adapter could build on.
    most = 0.5 if adapter == "full" else 0.97
    assert result.metrics["eval_loss"] < most * result.metrics["base_eval_loss"]
    inputs = {**sides, **made}
    card = ModelCard.read(inputs["model"].path)
    assert card.task == "speech-recognition" and card.layout == "transformers"
    gates = {"wer": {"max": 0.8}} if adapter == "full" else {"loss": {"max": 5.5}}
    asked = EvaluateConfig(gates=gates, per_device_batch_size=5)
    judged, outputs = stage(evaluate, asked, inputs, tmp_path)
    assert judged.stop == "", judged.stop
    document = json.loads((outputs["evaluation"].path / "evaluation.json").read_text())
    systems = document["systems"]
    assert set(METRICS[card.task]) <= set(systems["tuned"]) and systems["base"]["wer"] >= 1
    assert default_metric(card.task, systems["tuned"]) == "wer" and BETTER["wer"] == "lower"
    assert "Words wrong" in (outputs["evaluation"].path / "page.html").read_text()
    context = SimpleNamespace(store=Store("s3://none", tmp_path / "cache"))
    task, tests = task_of(inputs, asked), read_tests(inputs)
    parts = [task.take(asked, tests, inputs, context, Share(number, 3)) for number in (1, 2, 3)]
    again = task.judge(asked, tests, inputs, context, parts).systems["tuned"]
    assert (again["wer"], again["cer"], again["loss"]) == tuple(
        systems["tuned"][m] for m in ("wer", "cer", "loss")
    )


def test_error_rates_are_edits_over_what_was_said():
    found = speech_metrics.score(["three one four", "two"], ["three won four five", "Two!"])
    assert found["wer"] == 2 / 4 and found["wrong_words"] == [2, 0]
    # o-n-e to w-o-n is two edits, five is four more; threeonefour and two are fifteen characters.
    assert found["cer"] == 6 / 15
    chinese = speech_metrics.score(["今天 天气很好。"], ["今天天气不好"])
    assert chinese["wer"] == chinese["cer"] == 1 / 6
    assert speech_metrics.score(["一"], ["一二三"])["wer"] == 2.0
    assert speech_metrics.edits("kitten", "sitting") == 3 == speech_metrics.edits("sitting", "kitten")
    assert speech_metrics.edits("", "abc") == 3 and speech_metrics.edits("abc", "abc") == 0


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_of_whole_numbers_is_read(width):
    samples = tone(440, 0.1, rate=RATE)
    found, rate, channels = sounds.decode(wav(samples, width=width))
    assert (rate, channels) == (RATE, 1) and found.dtype == np.float32
    np.testing.assert_allclose(found, samples, atol=1.01 / 2 ** (8 * width - 1))


def test_channels_become_their_mean_and_rates_the_asked_one():
    both = np.stack([tone(440, 0.5), np.zeros(4000, dtype=np.float32)], axis=1).ravel()
    found, _, channels = sounds.decode(wav(both, channels=2))
    assert channels == 2 and len(found) == 4000
    np.testing.assert_allclose(found, tone(440, 0.5) / 2, atol=1e-4)
    doubled = sounds.at_rate(tone(440, 0.5), RATE, 16_000)
    assert len(doubled) == 8000
    inner = slice(800, -800)  # away from the ends, where the filter sees silence
    np.testing.assert_allclose(sounds.at_rate(doubled, 16_000, RATE)[inner], tone(440, 0.5)[inner], atol=0.03)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "empty_file"),
        (wav(tone(440))[:-1000], "torn_file"),
        (b"ID3\x03\x00 no wave", "unknown_format"),
        (wav([]), "empty_file"),
        (wav(tone(440))[:20], "unknown_format"),
    ],
)
def test_a_bad_recording_has_a_reason(body, reason):
    with pytest.raises(BadMedia) as caught:
        sounds.decode(body)
    assert caught.value.reason == reason


def test_a_recording_without_a_transcript_is_named(corpus, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.wav").write_bytes(wav(tone(440)))
    (tmp_path / "a" / "1.txt").write_text("yes")
    (tmp_path / "a" / "2.wav").write_bytes(wav(tone(550)))
    _, made = stage(
        ingest, IngestConfig(source=str(tmp_path / "a"), format="transcribed-audio"), {}, tmp_path
    )
    (line,) = (made["quarantine"].path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "missing_field" and "2.txt" in line


def test_what_the_model_would_not_hear_stops_the_line(base, corpus):
    origin = {"file": "calls.jsonl", "line": 7, "part": "main"}
    rows = [*rows_of(corpus), {"audio": "x", "text": "long", "id": "x", "seconds": 1.5, "origin": origin}]
    with pytest.raises(
        StageStopped, match=r"1 recordings of train are longer than the 1 s .*calls.jsonl:7 \(1.5 s\)"
    ):
        opened(base, rows)


def test_speech_prepared_otherwise_than_in_training_is_refused(base, tmp_path):
    processor = sounds.open_processor(base)
    expected = sounds.probe(processor)
    sounds.refuse_other(processor, expected, base)
    with pytest.raises(TuneyardError, match="ids of the probe differ"):
        processor.tokenizer.set_prefix_tokens(language="zh")
        sounds.refuse_other(processor, expected, base)
    other = sounds.open_processor(base)
    other.feature_extractor.mel_filters = other.feature_extractor.mel_filters * 0.5
    with pytest.raises(TuneyardError, match="features"):
        sounds.refuse_other(other, expected, base)
    with pytest.raises(TuneyardError, match="no usable processor"):
        sounds.open_processor(tmp_path)


def test_a_language_is_one_that_the_base_knows(base, corpus):
    rows = rows_of(corpus)
    objective, _ = opened(base, rows, objective={"kind": "speech-recognition", "language": "chinese"})
    assert "<|zh|>" in objective.tokenizer.tokenizer.convert_ids_to_tokens(
        objective.encode(rows[0]).text.prompt
    )
    for language in ("klingon", "german"):  # one that Whisper has not, one that this base has not
        with pytest.raises(TuneyardError, match=language):
            opened(base, rows, objective={"kind": "speech-recognition", "language": language})


def test_the_dry_run_counts_the_memory_of_recordings(base, corpus):
    rows = rows_of(corpus, 24)
    few, many = (
        predict(opened(base, rows, per_device_batch_size=size)[1], base, rows, 1000) for size in (2, 16)
    )
    assert few.total_weights == sum(w.numel() for w in opened(base, rows)[0].model.parameters())
    assert few.held_bytes == many.held_bytes
    assert few.peak_bytes - few.held_bytes < many.peak_bytes - many.held_bytes
