"""Masked language modelling: BERT's rule, transformers' loss, and the way on to a task."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForMaskedLM

from components.evaluate.config import EvaluateConfig
from components.evaluate.evaluate import evaluate
from components.shared import jsonl, masked
from components.shared.manifest import Manifest, describe
from components.shared.stage import Artifact, Context
from components.train import selfcheck
from components.train import train as stage
from components.train.config import TrainConfig
from components.train.objectives.classification import Classification
from components.train.objectives.config import MaskedLanguageModelingObjective
from components.train.objectives.masked_language_modeling import MaskedLanguageModeling
from tests.components.train.test_documents import corpus


@pytest.fixture
def objective(tiny_encoder):
    torch.manual_seed(0)
    settings = MaskedLanguageModelingObjective(kind="masked-language-modeling")
    return MaskedLanguageModeling(tiny_encoder, settings)


def test_of_the_chosen_tokens_eight_in_ten_are_hidden_and_one_in_ten_is_another(objective):
    """15% of 20,000 are 3,000, so a share of them is off by less than 0.03 in all but one draw of 10,000."""
    piece = masked.Piece([1, *[7] * 20_000, 2], 1, 1, 0.15)
    given, places = masked.hidden(piece, 4, 300, torch.Generator().manual_seed(0))
    assert len(places) == piece.terms == 3000 and min(places) > 0 and max(places) < len(given) - 1
    fates = Counter("mask" if given[at] == 4 else "same" if given[at] == 7 else "other" for at in places)
    assert [fates[fate] / 3000 for fate in ("mask", "other", "same")] == pytest.approx(
        [0.8, 0.1, 0.1], abs=0.03
    )
    untouched = set(range(len(given))) - set(places)
    assert all(given[at] == piece.ids[at] for at in untouched)


def test_pieces_hold_every_token_between_the_tokenizers_own(objective):
    whole = objective.encode(corpus(1, 6)[0])
    cut = objective.pieces(whole, 32)
    assert [token for piece in cut for token in piece.ids[1:-1]] == whole.ids[1:-1]
    assert all(len(piece) <= 32 for piece in cut) and len(cut) > 2
    assert {(piece.ids[0], piece.ids[-1]) for piece in cut} == {(whole.ids[0], whole.ids[-1])}


def test_the_loss_is_that_of_transformers_on_the_same_masks(objective):
    cut = [piece for row in corpus(3) for piece in objective.pieces(objective.encode(row), 48)]
    nats = 0.0
    for piece in cut:
        given, places = masked.hidden(piece, objective.tokenizer.mask_token_id, len(objective.tokenizer))
        labels = torch.full((1, len(piece)), -100)
        labels[0, places] = torch.tensor([piece.ids[at] for at in places])
        with torch.inference_mode():
            found = objective.model(input_ids=torch.tensor([given]), labels=labels)
        nats += float(found.loss) * len(places)
    with torch.inference_mode():
        ours = float(objective.summed_loss(cut, 0.0))
    # float32 in another order of summing, and padded
    assert ours == pytest.approx(nats, rel=1e-5)


def test_masks_change_in_training_and_stay_in_evaluation(objective):
    cut = [objective.encode(row) for row in corpus(2, 1)]
    with torch.no_grad():
        assert float(objective.summed_loss(cut, 0.0)) == float(objective.summed_loss(cut, 0.0))
        objective.model.train()
        for module in objective.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.manual_seed(1)
        first, second = (float(objective.summed_loss(cut, 0.0)) for _ in range(2))
        torch.manual_seed(1)
        assert first != second and first == float(objective.summed_loss(cut, 0.0))


def test_the_self_check_passes(objective):
    cut = [piece for row in corpus(3) for piece in objective.pieces(objective.encode(row), 48)]
    found = selfcheck.check(objective, cut, corpus(3), "float32")
    assert found.keys() == {"micro_batches_loss", "micro_batches_gradient"} and max(found.values()) < 1e-4


def test_domain_text_then_a_task(tiny_encoder, tmp_path, monkeypatch):
    """The mixed route: an encoder reads the domain, is judged, and a classifier starts from it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    inputs = {}
    sides = {"train": corpus(24), "eval": corpus(28)[24:], "test": corpus(34)[28:]}
    for side, rows in sides.items():
        jsonl.write(tmp_path / side / "examples.jsonl", rows)
        inputs[side] = Artifact(Manifest("dataset", describe(tmp_path / side)), tmp_path / side)

    def context(name):
        made = Context(
            "run", "tiny", name, "k" * 64, SimpleNamespace(), tmp_path / name, tmp_path / f"{name}-w"
        )
        made.out.mkdir()
        return made

    config = TrainConfig(
        objective="masked-language-modeling",
        base_model=str(tiny_encoder),
        max_length=64,
        max_steps=40,
        learning_rate=5e-3,
        precision="float32",
    )
    trained = context("training")
    result = stage.train(config, inputs, trained)
    assert result.summary["pieces"]["train"] >= 24
    folder = trained.out / "model"
    inputs["model"] = Artifact(Manifest("model", describe(folder)), folder)
    judged = evaluate(EvaluateConfig(gates={"loss_reduction": {"min": 0.1}}), inputs, context("evaluation"))
    assert judged.stop == ""
    metrics = judged.summary["metrics"]
    assert metrics["tuned"]["masked_accuracy"] > metrics["base"]["masked_accuracy"]
    tuned = AutoModelForMaskedLM.from_pretrained(folder)
    classifier = Classification(folder, ["a", "b"])
    layers = classifier.model.bert.encoder.state_dict()
    assert all(torch.equal(weight, layers[name]) for name, weight in tuned.bert.encoder.state_dict().items())
