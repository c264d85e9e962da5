"""Answers that were drawn and compared, through train and evaluate: by a reward model, by the data's own."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from components.evaluate.config import EvaluateConfig
from components.evaluate.evaluate import evaluate
from components.shared import rewards
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact
from components.train.config import TrainConfig
from components.train.train import train


@pytest.fixture(scope="module")
def judge(causal_line):
    """A reward model whose head nobody trained: what it likes is known to itself alone."""
    import torch

    torch.manual_seed(1)
    folder = causal_line.root / "judge"
    model, tokenizer = rewards.open_model(causal_line.root / "base")
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    causal_line.card.model_copy(update={"task": "reward"}).write(folder)
    return folder


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_through_the_line(
    kind, causal_line, causal_inputs, judge, context, tmp_path, monkeypatch, write_dataset
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    rules = {"rewards": [{"kind": "format", "pattern": ".*《.*》.*"}, {"kind": "answer"}]}
    objective = {"kind": kind, "group_size": 4, "max_new_tokens": 6}
    objective |= {"reward_model": str(judge)} if kind == "grpo" else rules
    config = TrainConfig(
        objective=objective,
        base_model=str(causal_line.root / "tuned"),
        max_length=128,
        max_steps=3,
        learning_rate=1e-2,
        per_device_batch_size=3,
        precision="float32",
    )
    fields = ("id", "origin", "prompt") + (("completion",) if kind == "rloo" else ())
    sides = {"train": causal_line.train, "test": causal_line.test, "eval": causal_line.train[:2]}
    inputs = {}
    for side, rows in sides.items():
        (tmp_path / side).mkdir()
        inputs[side] = write_dataset(tmp_path / side, [{name: row[name] for name in fields} for row in rows])
    training = replace(context, stage="train", out=tmp_path / "train-out", work=tmp_path / "train-work")
    training.out.mkdir()
    said = train(config, inputs, training)
    assert said.summary["steps"] == 3 and said.summary["self_check"].keys() >= {"micro_batches_gradient"}
    card = ModelCard.read(training.out / "model")
    assert (card.task, card.layout) == ("causal-lm", "peft")
    inputs["model"] = Artifact(causal_inputs["model"].manifest, training.out / "model")
    context.out.mkdir()
    evaluate(EvaluateConfig(per_device_batch_size=6, max_new_tokens=6), inputs, context)
    tuned = json.loads((context.out / "evaluation" / "evaluation.json").read_text())["systems"]["tuned"]
    if kind == "grpo":
        assert card.reward_model.uri == str(judge)
        assert {"reward", "reward_gain", "win_rate", "kl_nats"} <= tuned.keys()
    else:  # the data's own answers judge
        assert card.reward_model is None and {"exact_match", "rouge_l", "loss_reduction"} <= tuned.keys()
