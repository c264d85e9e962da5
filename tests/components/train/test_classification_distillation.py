"""Distillation of classifiers: the formula, labels by name, a student of some layers, the whole line."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from components.evaluate.config import OF_TEACHER, EvaluateConfig
from components.evaluate.evaluate import evaluate, read_tests, task_of
from components.evaluate.slices.share import Share
from components.shared import digest, jsonl
from components.shared.errors import TuneyardError
from components.shared.manifest import Manifest, describe
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context
from components.shared.store import Store
from components.train import selfcheck
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.objectives.opening import open_objective
from components.train.train import train

ORIGIN = {"file": "corpus.jsonl", "line": 1, "part": "main"}
TEXTS = {
    "earn": "the company said profit rose to {} mln dlrs in the first quarter",
    "law": "the lessee shall pay rent no {} within the agreed time limit",
    "none": "contracts take effect when they are formed {}",
}


def rows(count, labels=tuple(TEXTS), start=0):
    found = []
    for i in range(start, start + count):
        label = labels[i % len(labels)]
        content = {"text": TEXTS[label].format(i) + " profit" * (i % 4), "label": label}
        found.append({**content, "id": digest.of_value(content), "origin": ORIGIN})
    return found


def settings_for(teacher, objective=None, **changes):
    base = {"max_length": 64, "precision": "float32", "dropout": 0.0, "early_stopping": None}
    base["objective"] = {"kind": "classification-distillation", "teacher": str(teacher), **(objective or {})}
    return TrainConfig(**(base | changes))


@pytest.fixture(scope="module")
def classifier(tiny_encoder, tmp_path_factory):
    """A teacher of another shape, whose labels are in another order and one more than the corpus has."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    torch.manual_seed(5)
    names = ["none", "grain", "law", "earn"]
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
        initializer_range=0.3,
        id2label=dict(enumerate(names)),
        label2id={name: at for at, name in enumerate(names)},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def opened(folder, teacher, config, data):
    torch.manual_seed(config.seed)
    objective = open_objective(config, data, folder, teacher_folder=teacher)
    encoded = [objective.encode(row) for row in data]
    objective.prepare(encoded, nullcontext)
    apply_adapter(objective, config)
    return objective, encoded


def test_the_loss_is_the_formula_and_labels_are_matched_by_name(tiny_encoder, classifier, caplog):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config = settings_for(classifier, {"temperature": 3.0, "hard_weight": 0.3}, base_model=str(tiny_encoder))
    data = rows(7)
    objective, encoded = opened(tiny_encoder, classifier, config, data)
    assert objective.labels == ["earn", "law", "none"] and "['grain']" in caplog.text
    teacher = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    objective.model.eval()
    ours = objective.summed_loss(encoded, 0.0)
    expected = 0.0
    for row in data:
        inputs = tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            theirs = teacher(**inputs).logits[:, [3, 2, 0]]
        mine = objective.model(**inputs).logits
        soft = kl_div(
            log_softmax(mine / 3, -1), log_softmax(theirs / 3, -1), reduction="sum", log_target=True
        )
        hard = cross_entropy(mine, torch.tensor([objective.labels.index(row["label"])]))
        expected = expected + 0.3 * hard + 0.7 * 9 * soft
    # One text at a time against a padded batch, in float32.
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    weights = list(objective.model.classifier.parameters())
    for one, other in zip(*(torch.autograd.grad(x, weights) for x in (ours, expected)), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
    assert objective._sums["divergence"] > 0.1 and objective._teacher.model is None
    assert "micro_batches_gradient" in selfcheck.check(objective, encoded, data, "float32")


def test_a_text_of_what_must_be_retained_has_its_label_alone(tiny_encoder, classifier):
    config = settings_for(classifier, {"hard_weight": 0.3}, base_model=str(tiny_encoder))
    objective, taught = opened(tiny_encoder, classifier, config, rows(6))
    alone = [objective.encode(row) for row in rows(3)]
    objective.model.eval()
    logits = torch.cat([objective.model(input_ids=torch.tensor([e.ids])).logits for e in alone])
    expected = cross_entropy(logits, torch.tensor([e.label for e in alone]), reduction="sum")
    assert float(objective.summed_loss(alone, 0.0).detach()) == pytest.approx(
        float(expected.detach()), rel=1e-4
    )
    apart = sum(float(objective.summed_loss(part, 0.0).detach()) for part in (taught, alone))
    mixed = float(objective.summed_loss([alone[0], *taught, *alone[1:]], 0.0).detach())
    assert mixed == pytest.approx(apart, rel=1e-4)


def test_a_long_text_is_cut_for_each_reader_at_its_own_limit(tiny_encoder, classifier):
    config = settings_for(classifier, base_model=str(tiny_encoder), max_length=20)
    objective, _ = opened(tiny_encoder, classifier, config, rows(6))
    long = objective.encode({"text": "profit rose " * 100, "label": "earn"})
    assert len(long) > 200 and len(long.theirs) == 64 and long.theirs[-1] == objective.tokenizer.sep_token_id
    short = objective.shorten(long, 20)
    assert len(short) == 20 and short.theirs == long.theirs


def test_a_teacher_without_the_labels_is_refused(tiny_encoder, classifier):
    data = [
        {"text": "a", "label": label, "id": label, "origin": ORIGIN} for label in ("earn", "wheat", "oats")
    ]
    with pytest.raises(
        TuneyardError, match=r"does not know the labels \['oats', 'wheat'\]; it knows \['earn'"
    ):
        opened(tiny_encoder, classifier, settings_for(classifier, base_model=str(tiny_encoder)), data)


def test_a_base_without_a_head_is_no_teacher(tiny_encoder):
    with pytest.raises(
        TuneyardError, match=r"no classifier, classifier\.bias, classifier\.weight would be random"
    ):
        opened(tiny_encoder, tiny_encoder, settings_for(tiny_encoder, base_model=str(tiny_encoder)), rows(6))


def test_a_setting_that_is_of_language_models_is_refused():
    with pytest.raises(ValidationError, match="Extra inputs"):
        settings_for("t", {"level": "sequence"}, base_model="b")


def side(folder, data):
    folder.mkdir(parents=True)
    jsonl.write(folder / "examples.jsonl", data)
    return Artifact(Manifest("dataset", describe(folder)), folder)


def context_of(stage, root):
    store = Store("s3://none", root / "cache")
    context = Context(
        "run", "tiny", stage, stage[0] * 64, store, root / f"{stage}-out", root / f"{stage}-work"
    )
    context.out.mkdir(parents=True)
    return context


def line(root, inputs, config):
    """train and evaluate. Returns the card, the evaluation, what train said, and its inputs."""
    context = context_of("train", root)
    said = train(config, inputs, context)
    model = context.out / "model"
    inputs = {**inputs, "model": Artifact(Manifest("model", describe(model)), model)}
    context = context_of("evaluate", root)
    evaluate(EvaluateConfig(per_device_batch_size=5), inputs, context)
    document = json.loads((context.out / "evaluation" / "evaluation.json").read_text())
    return ModelCard.read(model), document, said, inputs


def test_a_teacher_and_then_its_student_of_half_the_layers(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    data = rows(96, ("earn", "law"))
    inputs = {"train": side(tmp_path / "t", data[:60]), "eval": side(tmp_path / "e", data[60:72])}
    inputs["test"] = side(tmp_path / "x", data[72:])
    config = TrainConfig(
        objective="classification",
        base_model=str(tiny_encoder),
        max_length=64,
        max_steps=40,
        learning_rate=5e-3,
        dropout=0.0,
        early_stopping=None,
        precision="float32",
    )
    _, document, _, judged = line(tmp_path / "teacher", inputs, config)
    assert document["systems"]["tuned"]["accuracy"] == 1.0 and "teacher" not in document["systems"]
    teacher = judged["model"].path
    config = settings_for(teacher, {"student": {"layers": [1]}}, max_steps=15, learning_rate=1e-3)
    assert config.base_model == str(teacher)
    card, document, said, judged = line(tmp_path / "student", inputs, config)
    _, *history = jsonl.read(tmp_path / "student" / "train-out" / "ledger" / "history.jsonl")
    # What was tokenised may come from a file: the teacher's part must still be there in each update.
    assert len(history) == 15 and all(row["divergence"] > 0 for row in history)
    assert card.task == "classification" and card.teacher.uri == str(teacher)
    assert card.layout == "transformers" and card.labels == ["earn", "law"]
    assert json.loads((judged["model"].path / "config.json").read_text())["num_hidden_layers"] == 1
    systems = document["systems"]
    assert systems["teacher"]["accuracy"] == 1.0 and set(OF_TEACHER) <= systems["tuned"].keys()
    kept = systems["tuned"]["teacher_quality_kept"]
    assert kept == systems["tuned"]["accuracy"] and kept > 0.9
    ratio = systems["tuned"]["texts_per_second"] / systems["teacher"]["texts_per_second"]
    assert systems["tuned"]["teacher_speed_ratio"] == pytest.approx(ratio)
    assert systems["tuned"]["texts_per_second"] > 0 and said.summary["steps"] == 15
    row = next(jsonl.read(tmp_path / "student" / "evaluate-out" / "evaluation" / "answers.jsonl"))
    assert row["teacher"] in card.labels
    # Slices find what one process does.
    asked, context = EvaluateConfig(per_device_batch_size=5), context_of("slices", tmp_path)
    task, tests = task_of(judged, asked), read_tests(judged)
    parts = [task.take(asked, tests, judged, context, Share(number, 2)) for number in (1, 2)]
    again = task.judge(asked, tests, judged, context, parts).systems
    for name in ("tuned", "teacher"):
        assert (
            again[name]["accuracy"] == systems[name]["accuracy"]
            and again[name]["auc"] == systems[name]["auc"]
        )
    # A teacher that is no longer what it was is noticed.
    (teacher / "config.json").write_text((teacher / "config.json").read_text() + " ")
    with pytest.raises(TuneyardError, match="changed since the training"):
        task.take(asked, tests, judged, context, Share())
