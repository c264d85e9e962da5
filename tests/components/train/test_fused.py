"""A LoRA layer as one operation computes what PEFT's does, value and gradient, and is off when PEFT's is."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from components.train.adapters import fused


def layer(bias=True, dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    base = nn.Linear(24, 40, bias=bias).to(dtype).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout)
    found = PeftLinear(base, adapter_name="default", config=config, r=4, lora_alpha=8, lora_dropout=dropout)
    nn.init.normal_(found.lora_B["default"].weight)
    return nn.Sequential(found)


def gradients(model, x, autocast=False):
    x = x.detach().requires_grad_(True)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    (y.float() * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    return [y.detach(), x.grad, *(w.grad.clone() for w in model.parameters() if w.requires_grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24)])
def test_float32_equals_peft(bias, shape):
    model, x = layer(bias), torch.randn(*shape)
    expected = gradients(model, x)
    assert fused.use(model) == 1
    for found, wanted in zip(gradients(model, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # float32 in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_as_near_to_float32_as_peft(dtype):
    model, x = layer(dtype=dtype), torch.randn(64, 24)
    exact = gradients(layer(dtype=dtype).float(), x)
    expected = gradients(model, x.to(dtype), autocast=True)
    fused.use(model)
    for found, peft, wanted in zip(gradients(model, x.to(dtype), True), expected, exact, strict=True):
        ours, theirs = ((got.float() - wanted).norm() / wanted.norm() for got in (found, peft))
        assert found.dtype == peft.dtype and ours < 1.5 * theirs + 1e-3


def test_dropout_is_on_the_adapters_input_alone():
    model, x = layer(dropout=0.5), torch.randn(64, 24)
    fused.use(model)
    adapter = model[0]
    model.train()
    torch.manual_seed(3)
    found = gradients(model, x)
    torch.manual_seed(3)
    a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    leaf = x.clone().requires_grad_(True)
    y = adapter.base_layer(leaf) + 2.0 * (nn.functional.dropout(leaf, 0.5) @ a.T) @ b.T
    (y * torch.linspace(-1, 1, 40)).sum().backward()
    torch.testing.assert_close(found[0], y.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], leaf.grad, rtol=1e-5, atol=1e-5)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_off_and_merged_are_pefts_own():
    model, x = layer(), torch.randn(5, 24)
    fused.use(model)
    adapter = model[0]
    with torch.no_grad():
        adapted = model(x)
        adapter.enable_adapters(False)
        assert torch.equal(model(x), adapter.base_layer(x)) and not torch.allclose(model(x), adapted)
        adapter.enable_adapters(True)
        adapter.merge()
        torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(x), adapter.base_layer(x))


def test_other_kinds_stay_as_they_are():
    trainable = layer()
    trainable[0].base_layer.weight.requires_grad_(True)
    dora = LoraConfig(r=4, use_dora=True)
    with_magnitude = nn.Sequential(
        PeftLinear(nn.Linear(8, 8).requires_grad_(False), adapter_name="default", config=dora, r=4)
    )
    assert fused.use(trainable) == 0 and fused.use(with_magnitude) == 0
