"""Examples laid end to end: the loss and the gradient of padded ones, and nothing of a neighbour."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.shared import packed
from components.shared.causal import Encoded
from components.train.config import TrainConfig
from components.train.data import schedule_batches
from components.train.objectives.base import choose_attention
from components.train.objectives.sft import Sft

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def _folder(name, tiny_causal, tiny_tokenizer, tmp_path):
    import transformers

    if name == "gemma3":  # its sliding window of 64 is shorter than some examples here
        return tiny_causal
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")
    shape = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 300} if name == "GPT2" else SHAPE
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    model(config(**shape)).save_pretrained(tmp_path / name)
    tiny_tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / name


def batch_of(*lengths, seed=0):
    ids = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randint(3, 290, (count,), generator=ids).tolist()

    return [Encoded(draw(prompt), draw(answer)) for prompt, answer in lengths]


RAGGED = ((1, 3), (40, 90), (5, 1), (20, 20))


def _gradient(sft, batch):
    sft.model.zero_grad()
    loss = sft.summed_loss(batch, 0.0)
    loss.backward()
    return float(loss.detach()), {n: w.grad.clone() for n, w in sft.model.named_parameters()}


@pytest.mark.parametrize("name", ["gemma3", "Llama", "Qwen2", "Qwen3", "Mistral", "GPT2", "Gemma2"])
def test_packed_equals_padded(name, tiny_causal, tiny_tokenizer, tmp_path):
    sft = Sft(_folder(name, tiny_causal, tiny_tokenizer, tmp_path), "float32")
    batch = batch_of(*RAGGED)
    sft.model.set_attn_implementation("eager")
    plain, expected = _gradient(sft, batch)
    choose_attention(sft, 128)
    assert sft.packs
    loss, found = _gradient(sft, batch)
    # The same sums in another order: float32 rounding only.
    assert loss == pytest.approx(plain, rel=1e-5)
    for name_, gradient in expected.items():
        torch.testing.assert_close(found[name_], gradient, rtol=1e-3, atol=1e-4)


def test_a_long_example_goes_through_the_fused_kernel_with_the_same_result(tiny_tokenizer, tmp_path):
    sft = Sft(_folder("Llama", None, tiny_tokenizer, tmp_path), "float32")
    batch = batch_of((900, 300), (2, 5))
    assert len(batch[0]) > packed._PLAIN_TOKENS
    sft.model.set_attn_implementation("eager")
    plain, _ = _gradient(sft, batch)
    choose_attention(sft, 2048)
    assert _gradient(sft, batch)[0] == pytest.approx(plain, rel=1e-5)


def test_an_example_is_not_touched_by_its_neighbours(tiny_causal):
    sft = Sft(tiny_causal, "float32")
    choose_attention(sft, 128)
    mine = batch_of((6, 9))[0]
    with torch.no_grad():
        states = []
        for seed in (1, 2):
            other = batch_of((30, 30), (8, 8), seed=seed)
            inputs = packed.lay([[*e.prompt, *e.answer] for e in (other[0], mine, other[1])], "cpu")
            states.append(sft.model.base_model(**inputs, use_cache=False)[0][0, 60:75])
    # Bit for bit: not a single operation mixes two examples.
    assert torch.equal(*states)


def test_dropout_of_attention_is_drawn(tiny_causal):
    sft = Sft(tiny_causal, "float32", dropout=0.5)
    choose_attention(sft, 128)
    sft.model.train()
    batch = batch_of((6, 9))
    with torch.no_grad():
        assert float(sft.summed_loss(batch, 0.0)) != float(sft.summed_loss(batch, 0.0))
    sft.model.eval()
    with torch.no_grad():
        assert float(sft.summed_loss(batch, 0.0)) == float(sft.summed_loss(batch, 0.0))


def test_what_runs_along_a_row_cannot_be_packed():
    import transformers

    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, state_size=4)
    )
    sinks = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1, head_dim=8)
    )
    assert not packed.possible(mamba) and not packed.possible(sinks)


def test_a_packed_model_refuses_a_padded_batch(tiny_causal):
    sft = Sft(tiny_causal, "float32")
    choose_attention(sft, 128)
    with pytest.raises(ValueError, match="takes packed rows alone"):
        sft.model(input_ids=torch.ones(2, 4, dtype=torch.long))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=90), st.integers(1, 7), st.integers(1, 4))
def test_an_update_takes_each_example_once_in_as_few_micro_batches_as_there_may_be(lengths, size, accumulate):
    config = _config(size, accumulate)
    steps = schedule_batches(lengths, config, packs=True)
    assert sorted(i for step in steps for micro in step for i in micro) == list(range(len(lengths)))
    for step in steps:
        assert all(0 < len(micro) <= size for micro in step)
        assert len(step) == math.ceil(sum(map(len, step)) / size) <= accumulate


def test_micro_batches_of_an_update_are_alike_in_tokens():
    lengths = [2 ** (n % 9) for n in range(64)]
    for step in schedule_batches(lengths, _config(4, 4), packs=True):
        tokens = [sum(lengths[i] for i in micro) for micro in step]
        # Longest first, each to the emptiest (Graham 1969): no more apart than one example, the longest.
        assert max(tokens) - min(tokens) <= max(lengths[i] for micro in step for i in micro)


def _config(size, accumulate):
    return TrainConfig(
        objective="sft",
        base_model="tiny",
        epochs=1,
        per_device_batch_size=size,
        gradient_accumulation_steps=accumulate,
    )


def test_a_mask_that_an_evaluation_made_serves_training_too():
    packed._blocked.cache_clear()
    with torch.inference_mode():
        packed._blocked(7, 3)
    scores = torch.zeros(7, 7, requires_grad=True)
    scores.masked_fill(packed._blocked(7, 3), -1.0).sum().backward()
    assert float(scores.grad.sum()) == 1 + 2 + 3 * 5  # what may be seen: a window of three


def by_the_book(query, key, value, starts, _starts, longest, _longest, *, scale, window_size, enable_gqa):
    """What PyTorch says of varlen_attn, computed in plain products: [tokens, heads, width] of each."""
    back, ahead = window_size
    assert ahead == 0 and starts.dtype == torch.int32 and longest == int(starts.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert query.dtype == key.dtype == value.dtype and query.stride(-1) == 1
    query, key, value = (part.transpose(0, 1).float() for part in (query, key, value))
    key, value = (part.repeat_interleave(len(query) // len(part), 0) for part in (key, value))
    rows = []
    for a, b in itertools.pairwise(starts.tolist()):
        far = torch.arange(b - a)[:, None] - torch.arange(b - a)
        seen = (far >= 0) & ((far <= back) | (back < 0))
        scores = (query[:, a:b] @ key[:, a:b].transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        rows.append(torch.softmax(scores, -1) @ value[:, a:b])
    return torch.cat(rows, 1).transpose(0, 1).to(torch.bfloat16)


@pytest.fixture
def kernel(monkeypatch):
    """The GPU's kernel as it is documented, on a CPU."""
    from torch.nn.attention import varlen

    parameters = inspect.signature(varlen.varlen_attn).parameters

    def checked(*args, **named):
        assert len(args) == sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
        assert named.keys() <= parameters.keys()
        return by_the_book(*args, **named)

    def replace(found=checked):
        monkeypatch.setattr(varlen, "varlen_attn", found)

    replace()
    return replace


@pytest.mark.parametrize("name", ["gemma3", "Llama", "Mistral"])
def test_the_kernel_of_a_gpu_is_asked_for_the_same_attention(
    name, tiny_causal, tiny_tokenizer, tmp_path, kernel, monkeypatch
):
    sft = Sft(_folder(name, tiny_causal, tiny_tokenizer, tmp_path), "bfloat16")
    assert packed.kernel_fault(sft.model, "cpu") == ""
    choose_attention(sft, 128)
    batch = batch_of(*RAGGED)
    loss, expected = _gradient(sft, batch)
    lay = packed.lay

    def on_gpu(rows, device):
        laid = lay(rows, device)
        return laid | packed.kernel_inputs(laid["cu_seq_lens_q"], device)

    monkeypatch.setattr(packed, "lay", on_gpu)
    monkeypatch.setattr(packed, "_of_one", None)  # nothing is computed one by one
    found, gradient = _gradient(sft, batch)
    # Two ways of rounding to bfloat16.
    assert found == pytest.approx(loss, rel=2e-3)
    apart = sum(float((gradient[n].float() - e.float()).pow(2).sum()) for n, e in expected.items())
    assert apart < 0.03**2 * sum(float(e.float().pow(2).sum()) for e in expected.values())


def test_a_kernel_that_goes_wrong_is_not_used(tiny_causal, kernel):
    model = Sft(tiny_causal, "bfloat16").model

    def leaking(query, key, value, starts, *others, **named):
        return by_the_book(query, key, value, starts[[0, -1]], *others[:1], int(starts[-1]), 0, **named)

    def one_more(*args, window_size, **named):
        return by_the_book(*args, window_size=(window_size[0] + (window_size[0] > 0), 0), **named)

    def refusing(*args, **named):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")

    for found, says in (
        (leaking, "the kernel is off by "),
        (one_more, "the kernel is off by "),
        (refusing, "refuses heads of 16: FlashAttention only supports Ampere GPUs or newer."),
    ):
        kernel(found)
        assert says in packed.kernel_fault(model, "cpu")


@pytest.mark.parametrize("setting", ["attn_logit_softcapping", "attention_dropout"])
def test_what_the_kernel_cannot_do_is_not_asked_of_it(tiny_causal, kernel, setting):
    model = Sft(tiny_causal, "bfloat16").model
    setattr(model.config.get_text_config(), setting, 0.5)
    assert packed.kernel_fault(model, "cpu").startswith("the kernel ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel itself runs on a GPU alone")
def test_the_kernel_itself(tiny_tokenizer, tmp_path):
    model = Sft(_folder("Llama", None, tiny_tokenizer, tmp_path), "bfloat16").model
    assert packed.kernel_fault(model, "cuda") == ""
