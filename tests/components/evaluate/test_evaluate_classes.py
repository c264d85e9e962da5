from __future__ import annotations

import json

import numpy as np
import pytest

from components.evaluate import baselines, class_metrics, predictions
from components.evaluate.config import EvaluateConfig
from components.evaluate.evaluate import evaluate
from components.shared import jsonl
from components.shared.errors import TuneyardError


def test_all_systems_side_by_side(class_line, class_inputs, context):
    config = EvaluateConfig(gates={"accuracy": {"min": 0.9}, "accuracy_drop_points": {"max": 0.5}})
    result = evaluate(config, class_inputs, context)
    document = json.loads((context.out / "evaluation" / "evaluation.json").read_text())
    systems = document["systems"]
    assert list(systems) == ["tuned", "compressed", "base", "tfidf_logreg"]
    assert document["verdict"]["system"] == "compressed"
    assert result.stop == ""
    # float32 ONNX of the same weights: the same predictions, or rows were mixed up between batches
    assert systems["compressed"]["confusion"] == systems["tuned"]["confusion"]
    assert systems["compressed"]["auc"] == pytest.approx(systems["tuned"]["auc"], abs=1e-6)
    assert result.metrics["compressed_accuracy_drop_points"] == 0
    sizes = {
        path.name: path.stat().st_size
        for folder in ("tuned", "onnx")
        for path in (class_line.root / folder).iterdir()
    }
    onnx = sizes["model.onnx"] + sizes.get("model.onnx.data", 0)
    assert result.metrics["compressed_size_ratio"] == onnx / sizes["model.safetensors"]
    assert result.metrics["compressed_throughput_ratio"] > 0
    assert result.metrics["tfidf_accuracy"] == systems["tfidf_logreg"]["accuracy"] > 0.9
    assert "linear probe" in systems["base"]["about"]
    # of the three words more than the limit of 8 tokens in two patterns, counted over the test
    long = sum(len(class_line.tokenizer(row["text"])["input_ids"]) > 8 for row in class_line.test)
    assert document["truncated"] == {"texts": long, "of": len(class_line.test), "limit_tokens": 8}
    assert long > 0
    json.dumps([result.metrics, result.summary], allow_nan=False)


def test_predictions_are_those_of_one_text_at_a_time(class_line, class_inputs, context):
    import torch
    from transformers import AutoModelForSequenceClassification

    evaluate(EvaluateConfig(per_device_batch_size=5), class_inputs, context)
    model = AutoModelForSequenceClassification.from_pretrained(class_line.root / "tuned").eval()
    rows = list(jsonl.read(context.out / "evaluation" / "answers.jsonl"))
    assert len(rows) == len(class_line.test)
    for row in rows:
        encoded = class_line.tokenizer(row["prompt"], truncation=True, max_length=8, return_tensors="pt")
        with torch.inference_mode():
            chances = model(**encoded).logits[0].softmax(-1)
        assert row["tuned"] == class_line.card.labels[int(chances.argmax())]
        assert row["tuned_probability"] == pytest.approx(float(chances.max()), abs=1e-5)


def test_without_compression_the_tuned_model_is_judged(class_inputs, context):
    del class_inputs["compressed"]
    result = evaluate(EvaluateConfig(gates={"throughput_ratio": {"min": 0.1}}), class_inputs, context)
    assert result.summary["verdict"]["system"] == "tuned"
    assert result.stop == "1 of 1 gates failed: throughput_ratio: could not be measured (min 0.1)"


def test_a_label_that_the_model_does_not_know_is_an_error(
    class_line, class_inputs, context, tmp_path, write_dataset
):
    strange = {**class_line.test[0], "label": "ship", "id": "f" * 64}
    class_inputs["test"] = write_dataset(tmp_path / "strange", [*class_line.test, strange])
    with pytest.raises(TuneyardError, match=r"'ship' in test \(corpus\.jsonl:20\)"):
        evaluate(EvaluateConfig(), class_inputs, context)


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_are_those_of_scikit_learn(classes):
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

    generator = np.random.default_rng(classes)
    truth = generator.integers(classes, size=200)
    scores = class_metrics.probabilities(generator.normal(size=(200, classes)) + 2 * np.eye(classes)[truth])
    found = class_metrics.score(truth.tolist(), scores, [f"c{i}" for i in range(classes)])
    predicted = scores.argmax(1)
    expected = (
        roc_auc_score(truth, scores[:, 1])
        if classes == 2
        else roc_auc_score(truth, scores, multi_class="ovr")
    )
    assert found["auc"] == pytest.approx(expected, abs=1e-12)
    assert found["accuracy"] == accuracy_score(truth, predicted)
    assert found["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"), abs=1e-12)
    low, high = found["intervals"]["macro_f1"]
    assert low < found["macro_f1"] < high
    assert sum(map(sum, found["confusion"])) == 200


def test_auc_of_a_class_that_test_lacks_is_left_out_and_of_one_class_alone_is_none():
    scores = class_metrics.probabilities([[2, 1, 0], [1, 2, 0], [2, 0, 1]])
    found = class_metrics.score([0, 1, 0], scores, ["a", "b", "c"])
    assert (found["auc"], found["auc_classes"]) == (1.0, 2)
    assert class_metrics.score([0, 0, 0], scores, ["a", "b", "c"])["auc"] is None


def test_the_probe_sees_every_class():
    rows = [{"id": f"{i:05d}", "label": "rare" if i == 4999 else "common"} for i in range(5000)]
    chosen = baselines.probe_examples(rows)
    assert 1000 <= len(chosen) <= 1001
    assert {row["label"] for row in chosen} == {"rare", "common"}
    assert chosen[0]["id"] == "00000"


def test_tfidf_tells_chinese_texts_apart():
    train = ["公司净利润大幅增长", "净利润创新高", "原油产量下降", "原油价格上涨"]
    scores = baselines.tfidf_logreg(train, [0, 0, 2, 2], ["净利润下降", "原油增长"], 3)
    assert scores.argmax(1).tolist() == [0, 2]
    assert scores[:, 1].tolist() == [0, 0]


def test_outputs_come_back_in_the_order_of_the_texts():
    encodings = predictions.Encodings({"input_ids": [[7, 7, 7], [1], [5, 5], [9, 9, 9, 9]]}, pad_id=0, cut=0)
    timed = predictions.run(lambda batch: batch["input_ids"][:, :1], encodings, encodings.batches(3))
    assert timed.outputs.tolist() == [[7], [1], [5], [9]]
