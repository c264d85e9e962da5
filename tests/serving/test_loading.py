"""From a manifest to a model, in this process: adapters, and files that are not what they say."""

from __future__ import annotations

import pytest

from components.shared import causal, chat, sources
from components.shared.errors import TuneyardError
from components.shared.manifest import FileEntry, Manifest
from components.shared.modelcard import BaseModelRef, ModelCard
from serving import files, loading
from serving.identity import Identity


@pytest.fixture
def adapter(causal_folder, store, tokenizer, tmp_path):
    """A LoRA adapter beside a base in the store, and the text of both for a prompt."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = causal_folder(1)
    uri = f"s3://{store.bucket}/{store.key('bases/tiny')}"
    for path in base.iterdir():
        if path.name != "tuneyard.json":
            store.client.upload_file(str(path), store.bucket, store.key(f"bases/tiny/{path.name}"))
    model, _ = causal.open_folder(base, causal.preferred_precision("auto"))
    prompt = torch.tensor([chat.prompt_ids(tokenizer, [{"role": "user", "content": "1 + 1 = ?"}])])

    def answer(generator):
        out = generator.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        return tokenizer.decode(out, skip_special_tokens=True)

    untuned = answer(model)
    torch.manual_seed(1)
    # Not zero at the start, so that the adapter changes the answer.
    tuned = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    folder = tmp_path / "adapter"
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    ModelCard(
        task="causal-lm",
        layout="peft",
        base_model=BaseModelRef(uri=uri, fingerprint=sources.fingerprint(uri, store, "model")),
        max_length_tokens=64,
        template_probe=chat.probe(tokenizer),
        trainable_weights=1,
        total_weights=1,
    ).write(folder)
    return folder, untuned, answer(tuned.eval())


def test_an_adapter_is_served_with_its_base(adapter, store):
    folder, untuned, tuned = adapter
    manifest = store.put_tree(folder, "model")
    identity = Identity("legal", "1", manifest.digest)
    served, card = loading.open_model(identity, store.manifest_uri(manifest), store, lambda count: None)
    try:
        assert card.layout == "peft"
        assert tuned != untuned
        assert served.probe() == tuned
    finally:
        served.abort(10)


def test_a_manifest_with_another_digest_than_the_deployment_is_refused(store, onnx_folder):
    manifest = store.put_tree(onnx_folder, "model")
    with pytest.raises(
        TuneyardError, match=f"digest {manifest.digest[:12]}, the deployment says 000000000000"
    ):
        uri = store.manifest_uri(manifest)
        loading.open_model(Identity("news", "1", "0" * 64), uri, store, lambda count: None)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", b"\x80\x04\x95pickle", "no safetensors file"),
        ("model.safetensors", b"\xff" * 8 + b"{}", "no safetensors file"),
        ("model.onnx", b"PK\x03\x04", "no ONNX model"),
        ("config.json", b"{", "no json"),
        ("vocab.txt", b"a\x00b", "NUL bytes"),
        ("chat_template.jinja", b"\xff\xfe", "no jinja"),
    ],
)
def test_content_that_is_not_what_the_name_says_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    manifest = Manifest("model", (FileEntry(name, len(content), "0" * 64),))
    with pytest.raises(TuneyardError, match=f"{name}: {said}"):
        files.verify_contents(tmp_path, manifest)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "modeling_tiny.py", "model.onnx.data", "weights", "a.PKL"]
)
def test_other_types_are_refused_by_name(name):
    manifest = Manifest("model", (FileEntry("config.json", 2, "0" * 64), FileEntry(name, 1, "0" * 64)))
    with pytest.raises(TuneyardError, match="files of other types"):
        files.verify_names(manifest, "s3://x")


def test_a_data_set_is_no_model():
    with pytest.raises(TuneyardError, match="is a dataset, no model"):
        files.verify_names(Manifest("dataset", ()), "s3://x")
