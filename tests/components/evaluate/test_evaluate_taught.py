"""A causal student through train and evaluate, judged beside its base and its teacher."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from components.evaluate import taught
from components.evaluate.config import OF_TEACHER, EvaluateConfig
from components.evaluate.evaluate import evaluate, read_tests, task_of
from components.evaluate.slices.share import Share
from components.shared import jsonl
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact
from components.train.config import TrainConfig
from components.train.train import train

LEVELS = {"logits": {"hard_weight": 0.0}, "sequence": {"max_new_tokens": 60}}


def _what_train_leaves(level, ledger, said, rows):
    """The ledger has the teacher's answers where it wrote some, else the history its divergence."""
    if level == "sequence":
        noted = list(jsonl.read(ledger / "teacher_answers_train.jsonl"))
        assert [row["id"] for row in noted] == [row["id"] for row in rows]
        # The teacher had learned these very answers.
        assert [row["answer"] for row in noted if row["used"]] == [row["completion"] for row in rows]
        return
    assert said.summary["self_check"].keys() >= {"plain_loss", "plain_gradient"}
    assert not list(ledger.glob("teacher*"))
    assert "divergence" in next(row for row in jsonl.read(ledger / "history.jsonl") if row["step"] == 1)


@pytest.mark.parametrize("level", LEVELS)
def test_a_student_through_the_line(
    level, causal_line, causal_inputs, context, tmp_path, monkeypatch, write_dataset
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    teacher = causal_line.root / "tuned"
    config = TrainConfig(
        objective={"kind": "distillation", "teacher": str(teacher), "level": level, **LEVELS[level]},
        base_model=str(causal_line.root / "base"),
        adapter="full",
        max_length=128,
        max_steps=30,
        learning_rate=1e-2,
        early_stopping=None,
        per_device_batch_size=6,
        precision="float32",
    )
    (tmp_path / "eval").mkdir()
    sides = {"train": causal_inputs["train"], "eval": write_dataset(tmp_path / "eval", causal_line.train[:3])}
    training = replace(context, stage="train", out=tmp_path / "train-out", work=tmp_path / "train-work")
    training.out.mkdir()
    said = train(config, sides, training)
    card = ModelCard.read(training.out / "model")
    assert card.task == "causal-lm" and card.teacher.uri == str(teacher)
    assert said.metrics["eval_loss"] < 0.5 * said.metrics["base_eval_loss"]
    _what_train_leaves(level, training.out / "ledger", said, causal_line.train)
    inputs = {**causal_inputs, "model": Artifact(causal_inputs["model"].manifest, training.out / "model")}
    judging = EvaluateConfig(per_device_batch_size=4, max_new_tokens=60)
    context.out.mkdir()
    evaluate(judging, inputs, context)
    systems = json.loads((context.out / "evaluation" / "evaluation.json").read_text())["systems"]
    assert systems["tuned"]["loss"] < 0.5 * systems["base"]["loss"]
    assert set(OF_TEACHER) <= systems["tuned"].keys()
    kept = systems["tuned"]["rouge_l"] / systems["teacher"]["rouge_l"]
    assert (
        systems["tuned"]["teacher_quality_kept"] == kept
        and kept > 0.5
        and systems["teacher"]["rouge_l"] > 0.5
    )
    assert "Quality, of the teacher" in (context.out / "evaluation" / "page.html").read_text()
    task, tests = task_of(inputs, judging), read_tests(inputs)
    parts = [task.take(judging, tests, inputs, context, Share(number, 2)) for number in (1, 2)]
    again = task.judge(judging, tests, inputs, context, parts).systems
    for name in ("tuned", "teacher"):
        assert (again[name]["loss"], again[name]["rouge_l"]) == (
            systems[name]["loss"],
            systems[name]["rouge_l"],
        )


def test_nothing_is_kept_of_a_teacher_that_gets_nothing_right():
    systems = {"tuned": {"rouge_l": 0.2, "tokens_per_second": 30.0}}
    taught.beside(systems, {"rouge_l": 0.0, "tokens_per_second": 10.0}, "rouge_l", "tokens_per_second")
    assert systems["tuned"]["teacher_quality_kept"] is None
    assert systems["tuned"]["teacher_speed_ratio"] == 3 and systems["teacher"]["rouge_l"] == 0
