"""A model whose adapter stays beside its base: trained, committed as a small folder, judged on its base."""

from __future__ import annotations

import json
import shutil

import pytest

from components.evaluate.config import EvaluateConfig
from components.evaluate.evaluate import evaluate
from components.shared import causal
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.stage import Context
from components.train.config import TrainConfig
from components.train.train import train

# Trainings, and the baselines of an evaluation.
pytestmark = pytest.mark.slow


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Run the train stage on a line. Returns (its result, folder of the model)."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(line, inputs, **settings):
        config = TrainConfig(
            base_model=str(line.root / "base"),
            max_length=24 if "classification" in settings.values() else 96,
            max_steps=40,
            per_device_batch_size=6,
            precision="float32",
            over_length="truncate_prompt",
            max_over_length=1.0,
            dropout=0.0,
            **settings,
        )
        sides = {"train": inputs["train"], "eval": inputs["train"]}
        out = tmp_path / "training"
        context = Context("run", "line", "train", "k" * 64, None, out / "out", out / "work")
        context.out.mkdir(parents=True)
        return train(config, sides, context), context.out / "model"

    return run


def judged(inputs, folder, context, artifact):
    given = {"test": inputs["test"], "train": inputs["train"], "model": artifact(folder, "model")}
    evaluate(EvaluateConfig(max_generated=3, max_new_tokens=6), given, context)
    return json.loads((context.out / "evaluation" / "evaluation.json").read_text())["systems"]


@pytest.mark.parametrize("adapter", [{"kind": "houlsby", "size": 8}, {"kind": "prefix", "tokens": 4}])
def test_a_classifier(class_line, class_inputs, context, trained, make_artifact, adapter):
    result, folder = trained(
        class_line, class_inputs, objective="classification", adapter=adapter, learning_rate=0.02
    )
    card = ModelCard.read(folder)
    assert card.layout == "addon" and result.metrics["eval_loss"] < result.metrics["base_eval_loss"]
    systems = judged(class_inputs, folder, context, make_artifact)
    assert systems["tuned"]["accuracy"] > 0.6  # a third of the texts is of each class
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert weights < (class_line.root / "base" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("kind", ["pfeiffer", "p_tuning_v2"])
def test_a_causal_model(
    causal_line, causal_inputs, context, trained, make_artifact, kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(causal, "preferred_precision", lambda setting: "float32")
    _, folder = trained(causal_line, causal_inputs, objective="sft", adapter=kind, learning_rate=0.02)
    systems = judged(causal_inputs, folder, context, make_artifact)
    assert systems["tuned"]["loss"] < systems["base"]["loss"]
    # The base is the one that was tuned, by its digest, or nothing is loaded.
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    card = ModelCard.read(moved)
    other = card.base_model.model_copy(update={"fingerprint": "0" * 64})
    card.model_copy(update={"base_model": other}).write(moved)
    with pytest.raises(TuneyardError, match="changed since the training"):
        causal.load(moved, context.store, "float32")
