"""Encoder-decoder models: transformers' own loss, and the whole way from training to judgement."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from components.evaluate.config import EvaluateConfig
from components.evaluate.evaluate import evaluate
from components.shared import jsonl, seq2seq
from components.shared.manifest import Manifest, describe
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context
from components.train import selfcheck
from components.train import train as stage
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.objectives.base import choose_attention
from components.train.objectives.seq2seq import Seq2Seq

ORIGIN = {"file": "corpus.jsonl", "line": 1, "part": "main"}
WORDS = {"rent": "租金", "lessee": "承租人", "contract": "合同", "profit": "利润"}


def rows(count, start=0):
    names = list(WORDS)
    return [
        {
            "id": f"{start + i:03}",
            "origin": ORIGIN,
            "prompt": f"translate {names[i % 4]} " + "please " * (i % 3),
            "completion": WORDS[names[i % 4]],
        }
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory, tiny_tokenizer):
    """Folder of a random T5 of two layers a side, whose tokenizer ends what it reads."""
    import copy

    from tokenizers.processors import TemplateProcessing
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-t5")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 2)]
    )
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings_for(folder, **changes):
    return TrainConfig(
        **({"objective": "seq2seq", "base_model": str(folder), "precision": "float32"} | changes)
    )


def test_the_loss_is_that_of_transformers_one_example_at_a_time(tiny_t5):
    objective = Seq2Seq(tiny_t5)
    choose_attention(objective, 128)
    encoded = [objective.encode(row) for row in rows(5)]
    assert all(e.prompt[-1] == e.answer[-1] == 2 for e in encoded)
    reference = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).eval()
    nats = []
    for e in encoded:
        with torch.inference_mode():
            found = reference(input_ids=torch.tensor([e.prompt]), labels=torch.tensor([e.answer]))
        nats.append(float(found.loss) * len(e.answer))
    with torch.inference_mode():
        ours = float(objective.summed_loss(encoded, 0.0))
    # float32 in another order of summing, and padded
    assert ours == pytest.approx(sum(nats), rel=1e-5)
    assert seq2seq.answer_nats(objective.model, encoded, 64) == pytest.approx(nats, rel=1e-5)


def test_label_smoothing_is_that_of_pytorch(tiny_t5):
    objective = Seq2Seq(tiny_t5)
    encoded = [objective.encode(row) for row in rows(3)]
    inputs, labels = seq2seq.tensors(encoded, 0)
    with torch.inference_mode():
        logits = objective.model(**inputs, labels=labels).logits
        ours = objective.summed_loss(encoded, 0.1)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum", label_smoothing=0.1
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_self_check_passes_and_stops_what_reads_its_padding(tiny_t5, adapter, monkeypatch):
    objective = Seq2Seq(tiny_t5)
    choose_attention(objective, 128)
    apply_adapter(objective, settings_for(tiny_t5, adapter=adapter))
    encoded = [objective.encode(row) for row in rows(9)]
    found = selfcheck.check(objective, encoded, rows(9), "float32")
    assert {"micro_batches_loss", "plain_loss"} <= found.keys() and max(found.values()) < 1e-4
    real = seq2seq.tensors

    def unmasked(batch, pad_id):
        inputs, labels = real(batch, pad_id)
        return inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}, labels

    monkeypatch.setattr(seq2seq, "tensors", unmasked)
    with pytest.raises(Exception, match="the loss is not the one that was asked for"):
        selfcheck.check(objective, encoded, rows(9), "float32")


def test_written_answers_are_those_of_the_model_one_token_at_a_time(tiny_t5):
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).eval()
    # What a folder may ask for must not decide what is measured.
    model.generation_config.num_beams = 3
    model.generation_config.no_repeat_ngram_size = 1
    objective = Seq2Seq(tiny_t5)
    prompts = [objective.encode(row).prompt for row in rows(3)]
    answers, ended, _ = seq2seq.write(model, prompts, 6)
    for prompt, answer, over in zip(prompts, answers, ended, strict=True):
        said = [0]
        while len(said) < 7 and said[-1] != 2:
            with torch.inference_mode():
                logits = model(
                    input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([said])
                ).logits
            said.append(int(logits[0, -1].argmax()))
        assert [*answer, *([2] if over else [])] == said[1:]


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_it_learns_is_saved_whole_and_is_judged_against_its_base(tiny_t5, tmp_path, monkeypatch, adapter):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    inputs = {}
    for side, examples in {"train": rows(24), "eval": rows(4, 40), "test": rows(4, 50)}.items():
        jsonl.write(tmp_path / side / "examples.jsonl", examples)
        inputs[side] = Artifact(Manifest("dataset", describe(tmp_path / side)), tmp_path / side)

    def context(name):
        made = Context(
            "run", "tiny", name, "k" * 64, SimpleNamespace(), tmp_path / name, tmp_path / f"{name}-w"
        )
        made.out.mkdir()
        return made

    steps, rate = (30, 3e-2) if adapter == "lora" else (60, 1e-2)
    config = settings_for(tiny_t5, adapter=adapter, max_steps=steps, learning_rate=rate, dropout=0.0)
    trained = context("training")
    stage.train(config, inputs, trained)
    folder = trained.out / "model"
    card = ModelCard.read(folder)
    assert (card.task, card.layout, card.template_probe) == ("seq2seq", "transformers", None)
    inputs["model"] = Artifact(Manifest("model", describe(folder)), folder)
    result = evaluate(EvaluateConfig(gates={"loss_reduction": {"min": 0.3}}), inputs, context("evaluation"))
    assert result.stop == ""
    base, tuned = (result.summary["metrics"][name] for name in ("base", "tuned"))
    if adapter == "full":  # LoRA on random weights learns too slowly to write
        assert tuned["rouge_l"] > base["rouge_l"] and tuned["exact_match"] > base["exact_match"]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    objective = Seq2Seq(tiny_t5)
    tests = [objective.encode(row) for row in rows(4, 50)]
    tokens = sum(map(objective.terms, tests))
    # bfloat16 where a processor has it would round; the weights are stored in float32, so they stay so.
    assert tuned["loss"] == pytest.approx(sum(seq2seq.answer_nats(model, tests)) / tokens, rel=1e-4)
    answers = list(jsonl.read(tmp_path / "evaluation" / "evaluation" / "answers.jsonl"))
    assert [row["reference"] for row in answers] == [row["completion"] for row in rows(4, 50)]
