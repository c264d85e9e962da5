"""Tiny tuned models for the compress stage, and a way to run it."""

from __future__ import annotations

import shutil

import pytest

from components.compress.compress import compress
from components.compress.config import CompressConfig
from components.shared import chat, sources
from components.shared.manifest import Manifest
from components.shared.modelcard import BaseModelRef, ModelCard
from components.shared.stage import Artifact, Context


@pytest.fixture
def run_compress(tmp_path):
    """Run the stage on a model folder. Returns (result, folder of the export)."""

    def run(folder, name="run", **settings):
        out = tmp_path / name / "out"
        out.mkdir(parents=True)
        context = Context(name, "test", "compress", "key", None, out, tmp_path / name)
        artifact = Artifact(Manifest("model", ()), folder)
        return compress(CompressConfig(**settings), {"model": artifact}, context), out / "compressed"

    return run


@pytest.fixture
def bfloat16_base(tiny_causal, tmp_path):
    """The tiny causal model, stored in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "bfloat16"
    shutil.copytree(tiny_causal, folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def causal_card(base, tokenizer, layout):
    fingerprint = sources.fingerprint(str(base), None, "model")
    return ModelCard(
        task="causal-lm",
        layout=layout,
        base_model=BaseModelRef(uri=str(base), fingerprint=fingerprint),
        max_length_tokens=128,
        template_probe=chat.probe(tokenizer),
        trainable_weights=7,
        total_weights=70,
        mlflow_run="abc",
    )


@pytest.fixture
def make_adapter(tmp_path):
    """Make a LoRA folder on a base; `size` is the standard deviation of B, which PEFT starts at zero."""

    def make(base, size, name="adapter"):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(1)
        folder = tmp_path / name
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tokenizer = chat.prepare(AutoTokenizer.from_pretrained(base))
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
        for key, weight in adapted.named_parameters():
            if "lora_B" in key and size:
                torch.nn.init.normal_(weight, std=size)
        adapted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        causal_card(base, tokenizer, "peft").write(folder)
        return folder

    return make


@pytest.fixture
def make_full(tmp_path):
    """Make a fully tuned model of a base; `size` is how far one matrix moved."""

    def make(base, size, name="full"):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = tmp_path / name
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tokenizer = chat.prepare(AutoTokenizer.from_pretrained(base))
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.add_(size)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        causal_card(base, tokenizer, "transformers").write(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, tiny_encoder):
    """A random BERT classifier whose word table is large enough to be worth quantising."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("classifier")
    config = BertConfig(
        vocab_size=4096,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        num_labels=3,
        initializer_range=0.2,  # at the usual 0.02 a random model hardly tells two texts apart
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    ModelCard(
        task="classification",
        layout="transformers",
        base_model=BaseModelRef(uri="s3://models/tiny", fingerprint="0" * 64),
        labels=["earn", "acq", "trade"],
        max_length_tokens=64,
        trainable_weights=7,
        total_weights=7,
    ).write(folder)
    return folder
