"""What compress is said to hold, against what it holds on real numbers."""

from __future__ import annotations

import pytest

from components.compress import footprint
from components.shared import chat
from tests.live import Counted
from tests.tiny import tiny_gemma


@pytest.fixture
def wide(tiny_tokenizer, tmp_path):
    """A model whose logits are most of what is held, as those of real ones are; stored in bfloat16."""
    import torch

    folder = tmp_path / "wide"
    tiny_gemma(20_000, hidden_size=64, intermediate_size=512).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_merging_holds_the_logits_of_three_models(wide, make_adapter, run_compress, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = make_adapter(wide, 0.5)
    with Counted() as live:
        run_compress(adapter)
    monkeypatch.setattr(footprint, "CAUSAL_HOST_BYTES", 0)
    # Live at once; the process has blocks of others besides.
    monkeypatch.setattr(footprint, "_COMPARED", 5)
    model = AutoModelForCausalLM.from_pretrained(wide)
    moved = [w for name, w in model.named_parameters() if "q_proj" in name or "down_proj" in name]
    shape = footprint.Shape(
        total_weights=sum(w.numel() for w in model.parameters()),
        merged_weights=sum(w.numel() for w in moved),
        vocabulary=20_000,
        file_bytes=sum(path.stat().st_size for path in wide.glob("*.safetensors")),
        sequence_tokens=footprint.probe_tokens(chat.prepare(AutoTokenizer.from_pretrained(wide))),
    )
    # Activations and the model's own workings are not in the formula.
    assert footprint.of_causal(shape) == pytest.approx(live.peak, rel=0.1)


def test_each_part_of_the_formula_counts():
    found = footprint.Shape(10**9, 10**8, 250_000, 10**9, [20, 80])
    host, logits, compared = footprint.CAUSAL_HOST_BYTES, 4 * 250_000 * 100, 8 * 4 * 250_000 * 80
    # Stored in 16 bits: the exact merged matrices are kept while the rounded model is judged.
    assert footprint.of_causal(found) == host + 4 * 10**9 + 3 * logits + compared + 4 * 10**8
    # Stored in float32 the model is the mapped file; nothing is rounded.
    whole = footprint.Shape(10**9, 10**8, 250_000, 4 * 10**9, [20, 80])
    assert footprint.of_causal(whole) == host + 4 * 10**9 + 3 * logits + compared
    # Three models are never held: what grows with the weights is one, and the file that is read.
    none = footprint.Shape(10**9, 0, 10, 2 * 10**9, [20])
    assert footprint.of_causal(none) == pytest.approx(host + 6 * 10**9, rel=1e-6)
