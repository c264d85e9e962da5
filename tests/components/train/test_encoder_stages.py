"""Each encoder objective through the stages: trained, judged against its baselines, ready to register."""

from __future__ import annotations

import json
import random

import pytest
from safetensors.torch import load_file

from components.evaluate.config import METRICS, EvaluateConfig
from components.evaluate.evaluate import evaluate, read_tests, task_of
from components.evaluate.slices.share import Share
from components.register.compare import default_metric
from components.register.config import BETTER
from components.shared import digest, jsonl
from components.shared.manifest import Manifest, describe
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context
from components.shared.store import Store
from components.train.config import TrainConfig
from components.train.train import train

COMPANIES = ["Acme", "Globex", "Initech", "Umbrella", "Hooli", "Stark", "Wayne", "Wonka"]
STRANGERS = ["Tyrell", "Cyberdyne", "Vandelay", "Oscorp"]
GOODS = ["oil", "wheat", "rent", "steel", "rice", "gold", "coal", "tin"]


def fields(kind, number):
    """One example of an objective; what is asked can be read off its text."""
    draw = random.Random(f"{kind}/{number}")
    # Entities of test that train does not have: only what stands around them tells what they are.
    names = STRANGERS if kind == "token-classification" and number >= 300 else COMPANIES
    company, goods, amount = draw.choice(names), draw.choice(GOODS), draw.randint(1, 9)
    rose = draw.random() < 0.5
    text = f"{company} sold {'more' if rose else 'less'} {goods} in year {number}"
    if kind == "regression":
        return {"text": text, "score": 100.0 + (20 if rose else -20) + draw.random()}
    if kind == "token-classification":
        spans = [{"start": 0, "end": len(company), "label": "COMPANY"}]
        at = text.index(f" {goods} ") + 1
        return {"text": text, "entities": [*spans, {"start": at, "end": at + len(goods), "label": "GOODS"}]}
    if kind == "contrastive":
        return {
            "anchor": f"what of {goods} {number}",
            "positive": f"{company} sold {goods} {number}",
            "negative": f"{company} sold {amount}",
        }
    task = ("mood", "price")[number % 2]
    return {
        "task": task,
        "text": text,
        "label": {"mood": "+" if rose else "-", "price": str(9 if rose else 3)}[task],
    }


def dataset(folder, kind, numbers):
    rows = []
    for number in numbers:
        content = fields(kind, number)
        origin = {"file": "corpus.jsonl", "line": number, "part": "main"}
        rows.append({**content, "id": digest.of_value(content), "origin": origin})
    folder.mkdir(parents=True)
    jsonl.write(folder / "examples.jsonl", rows)
    return Artifact(Manifest("dataset", describe(folder)), folder)


CASES = {
    "regression": ({"kind": "regression"}, "rmse", "train_mean"),
    "token-classification": ({"kind": "token-classification"}, "entity_f1", "dictionary"),
    "contrastive": ({"kind": "contrastive", "symmetric": True}, "mrr", "base"),
    "multi-task": (
        {
            "kind": "multi-task",
            "tasks": {"price": {"head": "regression"}},
            "weighting": "uncertainty",
            "gradients": "pcgrad",
            "conditioning": "name",
        },
        "mean_score",
        "commonest",
    ),
}


# LoRA's merge is by the task of the model; that of a regression is that of a classification.
@pytest.mark.parametrize(("kind", "adapter"), [(k, "full" if k == "regression" else "lora") for k in CASES])
def test_trained_judged_and_better_than_the_plainest_baseline(
    kind, adapter, tiny_encoder, tmp_path, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    objective, metric, baseline = CASES[kind]
    sides = {"train": range(120), "eval": range(200, 232), "test": range(300, 348)}
    inputs = {side: dataset(tmp_path / side, kind, numbers) for side, numbers in sides.items()}
    config = TrainConfig(
        objective=objective,
        base_model=str(tiny_encoder),
        adapter={"kind": "full"} if adapter == "full" else {"kind": "lora", "dropout": 0.0},
        max_steps=60,
        per_device_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3 if adapter == "full" else 1e-2,
        early_stopping=None,
        dropout=0.0,
        precision="float32",
    )
    store = Store("s3://none", tmp_path / "cache")
    context = Context("run", "tiny", "train", "k" * 64, store, tmp_path / "out", tmp_path / "work")
    context.out.mkdir()
    trained = train(config, inputs, context)
    json.dumps([trained.metrics, trained.summary, trained.metadata], allow_nan=False)
    model = tmp_path / "out" / "model"
    card = ModelCard.read(model)
    stored = load_file(model / "model.safetensors")
    assert stored and not any("lora" in name or "log_variances" in name for name in stored)
    assert metric == default_metric(card.task) and metric in BETTER
    inputs["model"] = Artifact(Manifest("model", describe(model)), model)
    context = Context("run", "tiny", "evaluate", "e" * 64, store, tmp_path / "judged", tmp_path / "work2")
    gates = {metric: {"max": 1e9} if BETTER[metric] == "lower" else {"min": 0.0}}
    result = evaluate(EvaluateConfig(gates=gates, per_device_batch_size=7), inputs, context)
    assert result.stop == ""
    document = json.loads((context.out / "evaluation" / "evaluation.json").read_text())
    systems = document["systems"]
    ours, plain = systems["tuned"][metric], systems[baseline][metric]
    assert ours < 0.7 * plain if BETTER[metric] == "lower" else ours > plain
    assert set(METRICS[card.task]) <= set(systems["tuned"])
    page = (context.out / "evaluation" / "page.html").read_text()
    assert "Side by side" in page and ("By task" in page) == (kind == "multi-task")
    answers = list(jsonl.read(context.out / "evaluation" / "answers.jsonl"))
    assert len(answers) == 48 and all("tuned" in row and baseline in row for row in answers)
    # Three slices find what one process does, to the last digit: no batch is cut.
    asked = EvaluateConfig(per_device_batch_size=7)
    task, tests = task_of(inputs, asked), read_tests(inputs)
    parts = [task.take(asked, tests, inputs, context, Share(number, 3)) for number in (1, 2, 3)]
    assert task.judge(asked, tests, inputs, context, parts).systems["tuned"][metric] == ours
