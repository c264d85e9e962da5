"""The stage on tiny models: what it leaves, when it stops early, settings that must change nothing."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from components.shared import jsonl
from components.shared.errors import StageStopped
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context
from components.train import beginning, keeping
from components.train import train as stage
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.fit import fit
from components.train.objectives.classification import Classification
from components.train.objectives.sft import Sft

ORIGIN = {"file": "corpus.jsonl", "line": 1, "part": "main"}


def texts(count, labels=("up", "down")):
    words = {"up": "profit rose sharply", "down": "losses widened again"}
    return [
        {"id": f"{i:03}", "origin": ORIGIN, "text": f"{words[label]} in quarter {i}", "label": label}
        for i in range(count)
        for label in [labels[i % len(labels)]]
    ]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the stage: `run(config, train rows, eval rows)` -> (result, folder of its outputs)."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def do(config, train, evaluation):
        inputs = {}
        for side, rows in (("train", train), ("eval", evaluation)):
            (tmp_path / side).mkdir()
            jsonl.write(tmp_path / side / "examples.jsonl", rows)
            inputs[side] = Artifact(SimpleNamespace(digest=side), tmp_path / side)
        context = Context("run", "tiny", "train", "k" * 64, None, tmp_path / "out", tmp_path / "work")
        context.out.mkdir()
        return stage.train(config, inputs, context), context.out

    return do


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_classifier_is_saved_whole_and_learns(tiny_encoder, run, kind):
    config = TrainConfig(
        objective="classification",
        base_model=str(tiny_encoder),
        adapter={"kind": kind},
        max_steps=60,
        learning_rate=1e-2 if kind == "lora" else 2e-3,
        precision="float32",
    )
    result, out = run(config, texts(32), texts(8))
    assert result.metrics["eval_loss"] < 0.8 * result.metrics["base_eval_loss"]
    card = ModelCard.read(out / "model")
    assert (card.layout, card.labels) == ("transformers", ["down", "up"])
    assert card.reference.label_shares == {"down": 0.5, "up": 0.5}
    assert (card.trainable_weights < card.total_weights) == (kind == "lora")
    # Read back as anybody would: the adapter and the new head are in the weights.
    model = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    tokenizer = Classification(tiny_encoder, ["down", "up"]).tokenizer
    rows = texts(8)
    with torch.inference_mode():
        logits = model(**tokenizer([r["text"] for r in rows], return_tensors="pt", padding=True)).logits
    assert [card.labels[i] for i in logits.argmax(-1)] == [row["label"] for row in rows]


def test_one_label_is_no_classification(tiny_encoder, run):
    config = TrainConfig(objective="classification", base_model=str(tiny_encoder), max_steps=1)
    with pytest.raises(StageStopped, match=r"two labels or more; train has \['up'\]"):
        run(config, texts(8, ("up",)), texts(4))


def test_a_label_that_train_has_not_is_named_and_not_judged(tiny_encoder, run, caplog):
    config = TrainConfig(objective="classification", base_model=str(tiny_encoder), max_steps=1)
    odd = {**texts(1)[0], "id": "odd", "label": "sideways"}
    result, _ = run(config, texts(8), [*texts(4), odd])
    assert "labels ['sideways'] occur in eval and not in train" in caplog.text
    assert result.summary["examples"]["eval"] == {"kept": 4}


def dialogues(count):
    return [
        {"id": str(i), "origin": ORIGIN, "prompt": f"q {i}", "completion": f"a {i}"} for i in range(count)
    ]


def test_an_improvement_below_min_delta_is_none(tiny_causal, tmp_path):
    config = TrainConfig(
        objective="sft",
        base_model="tiny",
        max_steps=20,
        eval_steps=2,
        early_stopping={"patience": 3, "min_delta": 100.0},
        precision="float32",
    )
    sft = Sft(tiny_causal, "float32")
    apply_adapter(sft, config)
    encoded = [sft.encode(row) for row in dialogues(8)]
    state = fit(sft, encoded, encoded, config, "float32", tmp_path, lambda *_: None)
    # The first evaluation has nothing to improve on; three more do not improve by a hundred nats.
    assert state.stopped_early and len(state.history) == 2 * (1 + 3)
    assert not fit(
        sft,
        encoded,
        encoded,
        config.model_copy(update={"early_stopping": None}),
        "float32",
        tmp_path / "b",
        lambda *_: None,
    ).stopped_early


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradient_checkpointing_changes_no_gradient(tiny_causal, kind):
    gradients = []
    for checkpointing in (False, True):
        config = TrainConfig(
            objective="sft",
            base_model=str(tiny_causal),
            adapter={"kind": kind, **({"dropout": 0.0} if kind == "lora" else {})},
            gradient_checkpointing=checkpointing,
            precision="float32",
        )
        torch.manual_seed(0)
        objective = beginning.open_for(config, [], SimpleNamespace(store=None))
        beginning.adapt(objective, config)
        objective.model.train()
        assert (
            any(getattr(m, "gradient_checkpointing", False) for m in objective.model.modules())
            == checkpointing
        )
        objective.summed_loss([objective.encode(row) for row in dialogues(4)], 0.0).backward()
        gradients.append({n: w.grad for n, w in objective.model.named_parameters() if w.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_in_a_pod_a_training_goes_on_although_its_disk_is_gone(tiny_encoder, store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = TrainConfig(
        objective="classification",
        base_model=str(tiny_encoder),
        max_steps=12,
        per_device_batch_size=4,
        checkpoint_steps=3,
        learning_rate=2e-3,
        precision="float32",
    )

    def attempt(name, key, keep=keeping.keep):
        inputs = {}
        for side, rows in (("train", texts(32)), ("eval", texts(8))):
            (tmp_path / name / side).mkdir(parents=True)
            jsonl.write(tmp_path / name / side / "examples.jsonl", rows)
            inputs[side] = Artifact(SimpleNamespace(digest=side), tmp_path / name / side)
        disk = tmp_path / name
        context = Context("run", "tiny", "train", key, store, disk / "out", disk / "work")
        context.out.mkdir()
        monkeypatch.setattr(keeping, "keep", keep)
        result = stage.train(config, inputs, context)
        return (context.out / "model" / "model.safetensors").read_bytes(), result

    whole, _ = attempt("whole", "a" * 64)
    monkeypatch.setenv("KFP_POD_NAME", "a-pod")
    kept, real = [], keeping.keep

    def until_the_node_is_lost(path, context, checkpoints):
        real(path, context, checkpoints)
        kept.append(path.name)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt("lost", "b" * 64, until_the_node_is_lost)
    shutil.rmtree(tmp_path / "lost")
    again, result = attempt("again", "b" * 64, lambda path, *rest, **named: kept.append(path.name))
    # Cut off within the second, at whatever point, it is stored again.
    assert kept == ["step-3", "step-6", "step-6", "step-9"]
    assert again == whole and result.summary["steps"] == 12
    assert (
        [n.split("/")[2][0] for n in store.names("work/train/")]
        == ["b"] * len(store.names("work/train/"))
        != []
    )
