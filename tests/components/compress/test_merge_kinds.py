"""Merging every adapter that can be merged: the weights are those of its paper's formula."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from components.shared import sources
from components.shared.modelcard import BaseModelRef, ModelCard
from components.train import checkpoint, saving
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.objectives.sft import Sft

# Each builds, saves, merges and proves a model in PEFT, which takes seconds to import.
pytestmark = pytest.mark.slow
RANK, ALPHA = 4, 6.0
SPELT = {
    "lora": {"kind": "lora"},
    "rslora": {"kind": "lora", "rslora": True},
    "dora": {"kind": "lora", "dora": True},
    "targets": {"kind": "lora", "targets": ["q_proj", "up_proj"]},
    "qlora": {"kind": "qlora"},
    "qdora": {"kind": "qlora", "dora": True},
    "ia3": {"kind": "ia3"},
}


@pytest.fixture
def adapted(tiny_causal, tmp_path):
    """Save an adapter as train does, its weights away from where they began."""

    def make(name):
        spelt = SPELT[name] if name == "ia3" else {**SPELT[name], "rank": RANK, "alpha": ALPHA}
        config = TrainConfig(objective="sft", base_model=str(tiny_causal), adapter=spelt, precision="float32")
        torch.manual_seed(0)
        objective = Sft(tiny_causal, "float32")
        apply_adapter(objective, config)
        with torch.no_grad():
            for weight in checkpoint.trainable(objective.model).values():
                weight.add_(0.3 * torch.randn_like(weight))
        base = BaseModelRef(
            uri=str(tiny_causal), fingerprint=sources.fingerprint(str(tiny_causal), None, "model")
        )
        folder = tmp_path / "adapter"
        saving.save(objective, config, saving.card(objective, config, base, (7, 70), ""), folder)
        return folder

    return make


def by_formula(name, base, adapter, module):
    """The merged weight [out, in] of a linear layer; None where the adapter leaves it alone."""

    def part(which):
        return adapter.get(f"base_model.model.{module}.{which}")

    if name == "ia3":
        scale = part("ia3_l")  # [out, 1] of keys and values, [1, in] of the feed-forward's last product
        return None if scale is None else base * scale
    if part("lora_A.weight") is None:
        return None
    scaling = ALPHA / (RANK**0.5 if name == "rslora" else RANK)
    whole = base + scaling * part("lora_B.weight") @ part("lora_A.weight")
    if name.endswith("dora"):  # section 4: magnitude times direction, row by row of [out, in]
        return part("lora_magnitude_vector")[:, None] * whole / whole.norm(dim=1, keepdim=True)
    return whole


@pytest.mark.parametrize("name", SPELT)
def test_what_is_merged_is_the_formula(tiny_causal, adapted, run_compress, name):
    folder = adapted(name)
    result, exported = run_compress(folder)
    base = load_file(tiny_causal / "model.safetensors")
    adapter = load_file(folder / "adapter_model.safetensors")
    merged = load_file(exported / "model.safetensors")
    touched = set()
    for key, weight in base.items():
        expected = by_formula(name, weight, adapter, key.removesuffix(".weight"))
        if expected is None:
            assert torch.equal(merged[key], weight), key
        else:
            touched.add(key.split(".")[-2])
            # float32 sums of a rank in another order
            torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-6)
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    some = {"ia3": {"k_proj", "v_proj", "down_proj"}, "targets": {"q_proj", "up_proj"}}
    assert touched == some.get(name, linear)
    assert result.metrics["base_difference"] > 0.01 > 1e-4 > result.metrics["max_logit_difference"]


def test_what_leaving_nf4_costs_is_stated(adapted, run_compress):
    folder = adapted("qlora")
    assert ModelCard.read(folder).quantised == "nf4"
    result, _ = run_compress(folder)
    # Four bits are some percent off, far more than float32's rounding and less than what the adapter moved.
    assert 1e-6 < result.metrics["nf4_kl_nats"] < result.metrics["base_kl_nats"]
    assert result.metrics["nf4_max_logit_difference"] > 10 * result.metrics["max_logit_difference"]
    assert result.summary["proof"]["trained_adapted"]["kl_nats"] == result.metrics["nf4_kl_nats"]
    assert "the base was quantised in training" in result.page.read_text()
    again, _ = run_compress(adapted("lora"), "again")
    assert "nf4_kl_nats" not in again.metrics


def test_an_adapter_names_no_path_of_this_machine(tiny_causal, adapted):
    settings = json.loads((adapted("ia3") / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_causal)  # as the pipeline file has it
