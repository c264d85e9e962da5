from __future__ import annotations

import json
import math
import shutil

import pytest

from components.evaluate import intervals, sitting
from components.evaluate.config import EvaluateConfig
from components.evaluate.evaluate import evaluate
from components.shared import causal, jsonl
from components.shared.errors import TuneyardError
from components.shared.manifest import Manifest, describe
from components.shared.stage import Artifact


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    # So that numbers can be held against a plain loop, on any processor.
    monkeypatch.setattr(causal, "preferred_precision", lambda setting: "float32")


def plain_loss(folder, tokenizer, rows) -> float:
    """Nats per answer token by one unbatched forward pass for each example."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nats, tokens = 0.0, 0
    for row in rows:
        encoded = causal.encode(tokenizer, row)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([encoded.prompt + encoded.answer])).logits[0]
        chances = logits.log_softmax(-1)[len(encoded.prompt) - 1 : -1]
        nats -= sum(float(chances[i, token]) for i, token in enumerate(encoded.answer))
        tokens += len(encoded.answer)
    return nats / tokens


def test_base_and_tuned_side_by_side(causal_line, causal_inputs, context):
    result = evaluate(EvaluateConfig(gates={"loss_reduction": {"min": 0.1}}), causal_inputs, context)
    document = json.loads((context.out / "evaluation" / "evaluation.json").read_text())
    base, tuned = document["systems"]["base"], document["systems"]["tuned"]
    for system, name in ((base, "base"), (tuned, "tuned")):
        expected = plain_loss(causal_line.root / name, causal_line.tokenizer, causal_line.test)
        # float32 in another order of summing: five digits
        assert system["loss"] == pytest.approx(expected, rel=1e-5)
        assert system["perplexity"] == pytest.approx(math.exp(system["loss"]))
        assert system["intervals"]["loss"][0] <= system["loss"] <= system["intervals"]["loss"][1]
        assert system["latency_p50_ms"] <= system["latency_p95_ms"]
        assert system["memory_gib"] > 0.01
    assert tuned["loss_reduction"] == pytest.approx(1 - tuned["loss"] / base["loss"])
    assert tuned["rouge_l_gain"] == tuned["rouge_l"] - base["rouge_l"] > 0
    # five of six references cite; an answer learnt by heart cites them
    assert tuned["citing_references"] == 5
    assert tuned["statute_citation_accuracy"] > base["statute_citation_accuracy"] == 0
    assert document["task"] == "causal-lm"
    assert document["test"] == {"count": 6, "digest": causal_inputs["test"].manifest.digest}
    assert document["verdict"]["passed"]
    assert document["verdict"]["system"] == "tuned"
    assert result.stop == ""
    assert result.metrics["base_loss"] == base["loss"]
    assert result.metrics["loss_reduction"] == tuned["loss_reduction"]
    assert result.summary["metrics"]["tuned"]["rouge_l"] == result.metrics["tuned_rouge_l"]
    json.dumps([result.metrics, result.summary], allow_nan=False)


def test_every_answer_is_kept_with_its_origin(causal_line, causal_inputs, context):
    evaluate(EvaluateConfig(max_generated=4, max_new_tokens=5), causal_inputs, context)
    rows = list(jsonl.read(context.out / "evaluation" / "answers.jsonl"))
    first = sorted(causal_line.test, key=lambda row: row["id"])[:4]
    assert [row["id"] for row in rows] == [row["id"] for row in first]
    for row, example in zip(rows, first, strict=True):
        assert row["prompt"] == example["prompt"]
        assert row["reference"] == example["completion"]
        assert row["origin"] == example["origin"]
        assert 0 <= row["tuned_rouge_l"] <= 1
        assert len(causal_line.tokenizer(row["tuned"], add_special_tokens=False)["input_ids"]) <= 5


def test_failing_gates_stop_the_line_and_leave_the_report(causal_inputs, context):
    gates = {"rouge_l": {"min": 1.1}, "loss": {"max": 0.0}, "bleu": {"min": 0.0}}
    result = evaluate(EvaluateConfig(gates=gates, max_new_tokens=2), causal_inputs, context)
    assert result.stop.startswith("2 of 3 gates failed: rouge_l: ")
    assert "(min 1.1)" in result.stop
    assert "(max 0)" in result.stop
    document = json.loads((context.out / "evaluation" / "evaluation.json").read_text())
    assert [gate["passed"] for gate in document["verdict"]["gates"]] == [False, False, True]
    assert "The line was stopped" in result.page.read_text()


def test_the_compressed_model_is_the_one_that_is_judged(causal_line, causal_inputs, context, tmp_path):
    # The base in place of a merged model: were `model` judged instead, the loss would have fallen.
    folder = tmp_path / "compressed"
    shutil.copytree(causal_line.root / "base", folder)
    causal_line.card.write(folder)
    compressed = Artifact(Manifest("model", describe(folder)), folder)
    result = evaluate(EvaluateConfig(max_new_tokens=2), {**causal_inputs, "compressed": compressed}, context)
    assert result.metrics["loss_reduction"] == 0
    assert result.metrics["uncompressed_loss_increase"] > 0.1
    document = json.loads((context.out / "evaluation" / "evaluation.json").read_text())
    assert document["model"]["compressed"] == compressed.manifest.digest


def test_a_test_row_in_train_is_an_error(causal_line, causal_inputs, context, tmp_path, write_dataset):
    leaky = write_dataset(tmp_path / "leaky", [*causal_line.train, causal_line.test[2]])
    with pytest.raises(TuneyardError, match=r"test row leaked: 1 of 6 .*corpus\.jsonl:13"):
        evaluate(EvaluateConfig(), {**causal_inputs, "train": leaky}, context)


def test_an_empty_test_is_an_error(causal_inputs, context, tmp_path, write_dataset):
    empty = write_dataset(tmp_path / "empty", [])
    with pytest.raises(TuneyardError, match="test holds no example"):
        evaluate(EvaluateConfig(), {**causal_inputs, "test": empty}, context)


def test_a_gate_on_another_task_fails_before_any_model_is_loaded(causal_inputs, context, monkeypatch):
    monkeypatch.setattr(causal, "load_base", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(TuneyardError, match="macro_f1 cannot be measured"):
        evaluate(EvaluateConfig(gates={"macro_f1": {"min": 0.5}}), causal_inputs, context)


def test_what_does_not_fit_into_the_window_is_cut_or_left_out_and_counted(causal_line):
    tests = sorted(causal_line.test, key=lambda row: row["id"])
    lengths = sorted(len(causal.encode(causal_line.tokenizer, row).answer) for row in tests)
    window = lengths[-1]  # the longest answer alone fills it
    exam, facts = sitting.prepare(EvaluateConfig(max_new_tokens=10), tests, causal_line.tokenizer, window)
    assert len(exam.tests) == 5
    assert len(facts["truncated"]["left_out"]) == 1
    assert (
        facts["truncated"]["prompts"]
        == sum(len(causal.encode(causal_line.tokenizer, row)) > window for row in exam.tests)
        > 0
    )
    assert all(len(encoded) <= window for encoded in exam.encoded)
    assert all(len(prompt) + 10 <= window for prompt in exam.prompts)
    with pytest.raises(TuneyardError, match="window of 3 tokens"):
        sitting.prepare(EvaluateConfig(), tests, causal_line.tokenizer, 3)


def test_metrics_reach_the_training_run(causal_line, causal_inputs, context, mlflow_store):
    from components.shared import tracking
    from components.shared.mlflow_database import client

    run = tracking.start_run("legal", "run-1", {}, {})
    folder = causal_inputs["model"].path
    card = causal_line.card
    card.model_copy(update={"mlflow_run": run}).write(folder)
    try:
        result = evaluate(EvaluateConfig(max_generated=1, max_new_tokens=2), causal_inputs, context)
    finally:
        card.write(folder)
    logged = client().get_run(run).data.metrics
    assert logged == pytest.approx(result.metrics)
    assert "tuned_loss" in logged


def test_intervals_narrow_with_more_examples_and_never_change():
    few, many = [0.0, 1.0] * 10, [0.0, 1.0] * 1000
    assert intervals.of_mean(few) == intervals.of_mean(few)
    widths = [high - low for low, high in (intervals.of_mean(few), intervals.of_mean(many))]
    # the normal theory: 2 * 1.96 * 0.5 / sqrt(n); a thousand draws give two digits
    assert widths == pytest.approx([1.96 / 20**0.5, 1.96 / 2000**0.5], rel=0.15)
    assert intervals.of_reduction([2.0, 4.0], [1.0, 2.0]) == [0.5, 0.5]
