"""NF4 by its paper: the code book, the nearest level, the size, and a product that keeps no whole weights."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch

from components.shared import nf4
from components.shared.dryrun import shapes_only


def test_the_code_book_is_the_papers_quantiles():
    # Section 3: 2^(k-1) quantiles of N(0, 1) for one half and 2^(k-1) + 1 for the other, without the second
    # zero, over [-1, 1]; the outermost probability is the mean of 1 - 1/30 and 1 - 1/32.
    edge = 1 - (1 / 32 + 1 / 30) / 2

    def half(count):
        return [NormalDist().inv_cdf(edge + (0.5 - edge) * i / count) for i in range(count)]

    quantiles = sorted([-q for q in half(7)] + [0.0] + half(8))
    expected = [q / max(quantiles) for q in quantiles]
    assert pytest.approx(expected, abs=1e-6) == nf4.LEVELS


def test_every_weight_gets_its_nearest_level():
    weight = torch.randn(5, 77, generator=torch.Generator().manual_seed(0))  # 385: the last block is short
    codes, scales = nf4.codes_and_scales(weight)
    flat, levels = weight.view(-1), torch.tensor(nf4.LEVELS)
    for block, scale in enumerate(scales):
        at = slice(block * 64, min(block * 64 + 64, 385))
        assert scale == flat[at].abs().max()
        errors = (flat[at, None] / scale - levels[None]).abs()
        chosen = errors.gather(1, codes[at].long()[:, None])[:, 0]
        assert torch.equal(chosen, errors.min(dim=1).values)


def linear(rows=96, columns=128, bias=True, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.nn.Linear(columns, rows, bias=bias).to(dtype).requires_grad_(False)


def test_weights_come_back_within_the_rounding_of_four_bits():
    source = linear()
    torch.nn.init.normal_(source.weight, std=0.02)
    back = nf4.linear_class()(source).weight
    error = (back - source.weight).pow(2).mean().sqrt() / source.weight.pow(2).mean().sqrt()
    # The levels are on average 0.13 apart in units of the block's largest (2.4 deviations for 64): about a
    # tenth.
    assert 0.07 < float(error) < 0.11
    worst = (back - source.weight).abs().max() / source.weight.abs().max()
    assert worst < 0.16  # half the widest gap between two levels, 0.304, and the 8-bit scales' own 3%


@pytest.mark.parametrize("shape", [(96, 128), (33, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_and_its_gradient_are_those_of_the_dequantised_weights(shape, dtype):
    quantised = nf4.linear_class()(linear(*shape, dtype=dtype))
    dense = torch.nn.Linear(shape[1], shape[0]).to(dtype)
    with torch.no_grad():
        dense.weight.copy_(quantised.weight)
        dense.bias.copy_(quantised.bias)
    inputs = torch.randn(4, 3, shape[1], dtype=dtype)
    found, expected = [], []
    for layer, results in ((quantised, found), (dense, expected)):
        at = inputs.clone().requires_grad_()
        out = layer(at)
        out.float().pow(2).sum().backward()
        results += [out, at.grad]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_weight_takes_little_more_than_four_bits_and_none_is_kept_for_the_backward_pass():
    source = linear(1024, 1024)
    quantised = nf4.linear_class()(source)
    assert 8 * nf4.held_bytes(quantised) / 1024**2 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    inputs = torch.randn(2, 1024, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = quantised(inputs)
    assert sum(kept) < 1024**2 // 16
    out.sum().backward()
    assert inputs.grad is not None


def test_a_models_layers_shrink_and_come_back(tiny_causal):
    from transformers import AutoModelForCausalLM

    from components.shared import families

    model, whole = (AutoModelForCausalLM.from_pretrained(tiny_causal, dtype=torch.bfloat16) for _ in range(2))
    before = sum(module.weight.nbytes for _, module in nf4.linears(model))
    count = sum(module.weight.numel() for _, module in nf4.linears(model))
    nf4.quantise(model)
    assert nf4.held(model) == count
    assert nf4.held_bytes(model) < before / 3.8
    # What is no layer stays as it was: embeddings, norms, a head.
    names = {n for n, _ in model.named_parameters()}
    assert names == {n for n, _ in whole.named_parameters()} - {f"{n}.weight" for n, _ in nf4.linears(whole)}
    nf4.restore(families.body(model), families.body(whole))
    ids = torch.tensor([[1, 5, 9, 200]])
    again = AutoModelForCausalLM.from_pretrained(tiny_causal, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_it_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")  # of the gpu extra
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, scales = nf4.codes_and_scales(weight)
    assert torch.equal(scales, state.absmax)
    theirs = packed.view(-1)
    # A weight half-way between two levels may go either way: theirs are compared with rounded middles.
    same = torch.cat([codes[::2] == theirs >> 4, codes[1::2] == (theirs & 15)])
    assert same.float().mean() > 0.9999
    source = torch.nn.Linear(256, 64)
    with torch.no_grad():
        source.weight.copy_(weight)
    ours = nf4.linear_class()(source).weight
    double, nested = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    back = functional.dequantize_4bit(double, nested)
    # Both hold the scales in 8 bits, each in its own float: at most 6% of the spread of the scales apart.
    assert (ours - back).abs().max() < 0.06 * weight.abs().max()


def test_what_a_dry_run_computed_first_is_computed_again():
    """Its table of levels has no bytes; a real product afterwards must not take it."""
    weights, inputs = torch.randn(8, 64), torch.randn(3, 64)

    def product():
        layer = torch.nn.Linear(64, 8, bias=False)
        layer.weight.data = weights.clone()
        return nf4.linear_class()(layer)(inputs)

    expected = product().detach()
    nf4.forget_tables()
    with shapes_only():
        layer = torch.nn.Linear(64, 8, bias=False)
        nf4.linear_class()(layer)(torch.randn(3, 64))
    assert torch.equal(product(), expected)
