"""Continued pre-training: pieces that lose nothing, and one loss however a document is cut."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from components.evaluate import documents as judging
from components.evaluate.config import EvaluateConfig
from components.evaluate.evaluate import evaluate
from components.shared import causal, documents, jsonl
from components.shared.encoded import Encoded
from components.shared.errors import TuneyardError
from components.shared.manifest import Manifest, describe
from components.shared.stage import Artifact, Context
from components.train import train as stage
from components.train.config import TrainConfig
from components.train.data import fit_lengths
from components.train.objectives.base import choose_attention
from components.train.objectives.language_modeling import LanguageModeling
from tests.conftest import TEXTS

ORIGIN = {"file": "corpus.jsonl", "line": 7, "part": "main"}


def settings_for(**changes):
    base = {
        "objective": "language-modeling",
        "base_model": "tiny",
        "max_length": 64,
        "precision": "float32",
    }
    return TrainConfig(**(base | changes))


def corpus(count, sentences=3):
    draw = random.Random(0)
    return [
        {"id": f"{i:03}", "origin": ORIGIN, "text": " ".join(draw.choices(TEXTS, k=sentences)) + f" {i}"}
        for i in range(count)
    ]


@given(st.lists(st.integers(3, 9), min_size=1, max_size=60), st.integers(2, 20), st.booleans())
def test_each_token_of_a_document_carries_loss_in_one_piece(body, max_length, has_bos):
    whole = Encoded([1] if has_bos else body[:1], body if has_bos else [*body[1:], 2])
    found = documents.pieces(whole, max_length, 1 if has_bos else None)
    assert [token for piece in found for token in piece.targets] == whole.targets
    assert all(len(piece) <= max_length and len(piece.prompt) == 1 and piece.answer for piece in found)
    if has_bos:
        assert all(piece.prompt == [1] for piece in found)
    else:
        # What a piece begins with is what the one before ended with: context, not loss again.
        assert [piece.prompt for piece in found[1:]] == [piece.answer[-1:] for piece in found[:-1]]


def test_a_document_ends_with_the_token_that_ends_it(tiny_tokenizer):
    encoded = documents.encode(tiny_tokenizer, "The lessee")
    assert encoded.prompt == [tiny_tokenizer.bos_token_id]
    assert encoded.answer[-1] == tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.decode(encoded.answer[:-1]) == "The lessee"


def test_the_loss_of_a_long_document_is_the_mean_over_its_tokens_in_all_pieces(tiny_causal):
    """Against transformers' own loss, piece by piece with labels; 64 does not divide the document."""
    torch.manual_seed(0)
    objective = LanguageModeling(tiny_causal, "float32")
    choose_attention(objective, 64)
    encoded = objective.encode(corpus(1, 6)[0])
    cut = objective.pieces(encoded, 64)
    assert len(cut) > 2 and len(cut[-1]) < 64
    reference = AutoModelForCausalLM.from_pretrained(tiny_causal).eval()
    nats = 0.0
    for piece in cut:
        ids = torch.tensor([[*piece.prompt, *piece.answer]])
        with torch.inference_mode():
            nats += float(reference(input_ids=ids, labels=ids).loss) * len(piece.answer)
    with torch.inference_mode():
        ours = objective.summed_loss(cut, 0.0)
    assert sum(map(objective.terms, cut)) == len(encoded) - 1
    # float32 in another order of summing
    assert float(ours) == pytest.approx(nats, rel=1e-5)


def test_a_short_document_has_a_loss_and_a_split_one_is_counted_whole(tiny_causal):
    objective = LanguageModeling(tiny_causal, "float32")
    rows = [*corpus(3), {"id": "short", "origin": ORIGIN, "text": "租"}]
    kept, ledger = fit_lengths(
        rows, objective.encode, objective.shorten, settings_for(max_over_length=0), objective.pieces
    )
    assert ledger.counts == {"split": 3, "kept": 1}
    assert ledger.tokens["kept"] == sum(len(objective.encode(row)) for row in rows)
    assert ledger.tokens["removed"] == 0
    assert [row["pieces"] for row in ledger.rows] and ledger.pieces == len(kept) - 1
    assert sum(row["pieces"] for row in ledger.rows) == ledger.pieces
    assert objective.terms(kept[-1]) == len(kept[-1]) - 1 > 0


def test_only_documents_are_split_and_they_have_no_prompt_to_cut():
    assert settings_for().over_length == "split"
    assert settings_for(objective="sft").over_length == "drop"
    with pytest.raises(ValueError, match="truncate_prompt is not for language-modeling"):
        settings_for(over_length="truncate_prompt")
    with pytest.raises(ValueError, match="split is not for sft"):
        settings_for(objective="sft", over_length="split")


@pytest.fixture
def line(tiny_causal, tmp_path, monkeypatch):
    """Trains on documents, and returns what evaluate takes."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(causal, "preferred_precision", lambda setting: "float32")
    sides = {"train": corpus(24), "eval": corpus(30)[24:27], "test": corpus(30)[27:]}
    inputs = {}
    for side, rows in sides.items():
        folder = tmp_path / side
        jsonl.write(folder / "examples.jsonl", rows)
        inputs[side] = Artifact(Manifest("dataset", describe(folder)), folder)
    store = SimpleNamespace()

    def context(name):
        made = Context("run", "tiny", name, "k" * 64, store, tmp_path / name, tmp_path / f"{name}-work")
        made.out.mkdir()
        return made

    config = settings_for(base_model=str(tiny_causal), adapter="full", max_steps=30, learning_rate=5e-3)
    trained = context("training")
    result = stage.train(config, inputs, trained)
    folder = trained.out / "model"
    inputs["model"] = Artifact(Manifest("model", describe(folder)), folder)
    return SimpleNamespace(inputs=inputs, result=result, context=context("evaluation"), sides=sides)


def test_documents_go_through_training_and_judgement(line, tiny_causal):
    assert line.result.summary["examples"]["train"] == {"split": 24}
    assert line.result.summary["pieces"]["train"] > 48
    gates = {"loss_reduction": {"min": 0.1}, "loss_per_character": {"max": 9.0}}
    result = evaluate(EvaluateConfig(gates=gates), line.inputs, line.context)
    assert result.stop == ""
    found = result.summary["metrics"]
    base, tuned = found["base"], found["tuned"]
    objective = LanguageModeling(tiny_causal, "float32")
    tests = sorted(line.sides["test"], key=lambda row: row["id"])
    cut = [piece for row in tests for piece in objective.pieces(objective.encode(row), 64)]
    with torch.inference_mode():
        nats = float(objective.summed_loss(cut, 0.0))
    tokens, characters = sum(map(objective.terms, cut)), sum(len(row["text"]) for row in tests)
    assert base["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert base["loss_per_character"] == pytest.approx(nats / characters, rel=1e-5)
    assert tuned["loss"] < 0.9 * base["loss"]
    assert "rouge_l" not in tuned
    rows = list(jsonl.read(line.context.out / "evaluation" / "answers.jsonl"))
    assert [row["id"] for row in rows] == [row["id"] for row in tests]
    assert sum(row["base_nats"] for row in rows) == pytest.approx(nats, rel=1e-5)
    assert "documents in" in result.page.read_text()


def test_a_gate_on_answers_is_refused_where_documents_judge(line, monkeypatch):
    monkeypatch.setattr(judging, "take", lambda *_: pytest.fail("a model was judged"))
    with pytest.raises(TuneyardError, match="rouge_l cannot be measured"):
        evaluate(EvaluateConfig(gates={"rouge_l": {"min": 0.1}}), line.inputs, line.context)
