"""Merging: what is saved answers as the adapted model, and nothing that is not proved leaves the stage."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from components.compress import merge
from components.shared import causal
from components.shared.errors import TuneyardError
from components.shared.manifest import describe
from components.shared.modelcard import ModelCard

# Each test makes a model and runs the whole stage on it, with its proof: 1 to 5 s of CPU.
pytestmark = pytest.mark.slow
TARGETS = {f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")}
IDS = torch.tensor([[1, 17, 170, 99, 260, 31, 8]])  # not among the stage's own probes


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def base_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_merged_equals_adapted_and_neither_equals_the_base(tiny_causal, make_adapter, run_compress):
    adapter = make_adapter(tiny_causal, 0.5)
    result, folder = run_compress(adapter)
    adapted = logits(PeftModel.from_pretrained(base_model(tiny_causal), str(adapter)).eval())
    merged = logits(causal.load(folder, None, "float32")[0])
    # float32 sums of 32-64 terms in another order: some 1e-6 of logits near 1.
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0)
    assert (merged - logits(base_model(tiny_causal))).abs().max() > 100 * 1e-4
    assert result.metrics["max_logit_difference"] < 1e-4 < 0.01 < result.metrics["base_difference"]
    assert result.metrics["agreement"] > 0.99
    assert result.kinds == {"compressed": "model"}
    assert result.summary["proof"]["storage"] == "float32"


def test_only_the_targets_move(tiny_causal, make_adapter, run_compress):
    result, folder = run_compress(make_adapter(tiny_causal, 0.5))
    before, after = (load_file(f / "model.safetensors") for f in (tiny_causal, folder))
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == TARGETS
    assert result.metrics["tuned_tensors"] == len(TARGETS)


def test_card_and_tokenizer_are_carried_over(tiny_causal, make_adapter, run_compress):
    adapter = make_adapter(tiny_causal, 0.5)
    result, folder = run_compress(adapter)
    before, after = ModelCard.read(adapter), ModelCard.read(folder)
    assert after.layout == "transformers"
    assert after.model_copy(update={"layout": "peft"}) == before
    assert result.metadata["compressed"]["base_model"]["fingerprint"] == before.base_model.fingerprint
    carried = [p.name for p in adapter.iterdir() if "token" in p.name or "template" in p.name]
    assert "tokenizer.json" in carried and "chat_template.jinja" in carried
    for name in carried:
        assert (folder / name).read_bytes() == (adapter / name).read_bytes(), name
    assert not list(folder.glob("adapter*"))


def test_sizes_count_the_base_that_an_adapter_needs(tiny_causal, make_adapter, run_compress):
    adapter = make_adapter(tiny_causal, 0.5)
    metrics = run_compress(adapter)[0].metrics
    weights = [tiny_causal / "model.safetensors", adapter / "adapter_model.safetensors"]
    assert metrics["size_before_bytes"] == sum(p.stat().st_size for p in weights)
    assert metrics["size_ratio"] == metrics["size_after_bytes"] / metrics["size_before_bytes"] < 1


def test_equal_input_gives_equal_bytes(tiny_causal, make_adapter, run_compress):
    adapter = make_adapter(tiny_causal, 0.5)
    first, second = run_compress(adapter, "first")[1], run_compress(adapter, "second")[1]
    assert describe(first) == describe(second)


def test_an_adapter_that_changes_nothing_is_refused(tiny_causal, make_adapter, run_compress):
    with pytest.raises(TuneyardError, match="the export is the base model") as caught:
        run_compress(make_adapter(tiny_causal, 0))
    assert "4 of 4 tuned tensors equal the base" in caught.value.what


def test_a_dropped_adapter_is_refused(tiny_causal, make_adapter, run_compress, monkeypatch):
    # The classic silent defect: unload() looks like merge_and_unload() and hands back the base.
    monkeypatch.setattr(merge, "_merged", lambda adapted, folder: adapted.unload())
    with pytest.raises(TuneyardError, match="the exported model and the base"):
        run_compress(make_adapter(tiny_causal, 0.5))


@pytest.mark.parametrize("name", [min(TARGETS), "model.norm.weight"])
def test_one_flipped_weight_on_disk_is_refused(tiny_causal, make_adapter, run_compress, monkeypatch, name):
    save = merge.save

    def save_and_flip(model, source, folder, card):
        save(model, source, folder, card)
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1).view(torch.int32)[3] ^= 1  # the least bit: no logit would show it
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(merge, "save", save_and_flip)
    with pytest.raises(TuneyardError, match=f"on disk are not the merged ones: {name}"):
        run_compress(make_adapter(tiny_causal, 0.5))


def test_a_weight_that_strays_in_the_merge_is_refused(tiny_causal, make_adapter, run_compress, monkeypatch):
    merged = merge._merged

    def stray(adapted, folder):
        model = merged(adapted, folder)
        model.model.embed_tokens.weight.data[200, 0] += 1e-6
        return model

    monkeypatch.setattr(merge, "_merged", stray)
    with pytest.raises(
        TuneyardError, match=r"1 tensors that were not tuned differ: model.embed_tokens.weight"
    ):
        run_compress(make_adapter(tiny_causal, 0.5))


def test_a_wrong_scale_in_the_merge_is_refused(tiny_causal, make_adapter, run_compress, monkeypatch):
    merged = merge._merged

    def doubled(adapted, folder):
        base = {name: w.clone() for name, w in base_model(tiny_causal).named_parameters()}
        model = merged(adapted, folder)
        for name, weight in model.named_parameters():
            weight.data += weight.data - base[name]
        return model

    monkeypatch.setattr(merge, "_merged", doubled)
    with pytest.raises(TuneyardError, match="differs from the adapted model by"):
        run_compress(make_adapter(tiny_causal, 0.5))


def test_a_broken_adapter_is_refused(tiny_causal, make_adapter, run_compress):
    adapter = make_adapter(tiny_causal, 0.5)
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(t for name, t in sorted(tensors.items()) if "lora_B" in name)[0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(TuneyardError, match="cannot be merged"):
        run_compress(adapter)


def test_a_large_update_is_stored_as_the_base_is(bfloat16_base, make_adapter, run_compress):
    result, folder = run_compress(make_adapter(bfloat16_base, 0.5))
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert result.summary["proof"]["storage"] == "bfloat16"
    assert result.metrics["max_logit_difference"] <= 0.05
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert causal.served_precision(folder) == causal.preferred_precision("auto")


def test_an_update_that_bfloat16_would_bury_stays_in_float32(bfloat16_base, make_adapter, run_compress):
    # B of 0.0003 moves most weights by less than half a unit in bfloat16's last place.
    result, folder = run_compress(make_adapter(bfloat16_base, 0.0003))
    stored = {name: t.dtype for name, t in load_file(folder / "model.safetensors").items()}
    assert {name for name, dtype in stored.items() if dtype == torch.float32} == TARGETS
    assert set(stored.values()) == {torch.float32, torch.bfloat16}
    assert result.summary["proof"]["storage"] == "bfloat16, merged weights float32"
    assert 10 * result.metrics["max_logit_difference"] <= result.metrics["base_difference"]
    # Neither dtype="auto" nor our own loading may round it away after all.
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float32
    assert causal.served_precision(folder) == "float32"


def test_a_full_model_is_copied_as_it_is(tiny_causal, make_full, run_compress):
    tuned = make_full(tiny_causal, 0.01)
    result, folder = run_compress(tuned)
    assert describe(folder) == describe(tuned)
    assert result.metrics["size_ratio"] == 1
    assert result.metrics["tuned_tensors"] == 1
    assert result.metrics["base_difference"] > 1e-3


def test_a_full_model_that_is_its_base_is_refused(tiny_causal, make_full, run_compress):
    with pytest.raises(TuneyardError, match="the export is the base model"):
        run_compress(make_full(tiny_causal, 0))


def test_a_layout_without_a_compression_is_named(tiny_causal, make_adapter, run_compress):
    adapter = make_adapter(tiny_causal, 0.5)
    ModelCard.read(adapter).model_copy(update={"task": "classification"}).write(adapter)
    with pytest.raises(TuneyardError, match="classification model of layout 'peft'"):
        run_compress(adapter)


def test_the_page_stands_alone_and_shows_the_proof(tiny_causal, make_adapter, run_compress):
    page = run_compress(make_adapter(tiny_causal, 0.5))[0].page.read_text()
    assert "4 of 4" in page and "at most 0.05" in page
    assert "http" not in page and "<script" not in page


def test_tuned_tensors_are_read_from_an_adapters_own_names():
    keys = [
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.weight",
    ]
    names = {"model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"}
    assert merge.tuned_tensors(keys) == names
