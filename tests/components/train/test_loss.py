"""The loss is the loss you asked for."""

from __future__ import annotations

import pytest
import torch

from components.shared.loss import summed_cross_entropy, token_nats


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("tokens", [1, 256, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_equal_torch_on_whole_logits(smoothing, cap, tokens, bias):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 97, bias=bias)
    hidden = torch.randn(tokens, 16, requires_grad=True)
    targets = torch.randint(0, 97, (tokens,))
    logits = head(hidden)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    reference = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    expected = torch.autograd.grad(reference * 0.5, [hidden, *head.parameters()])
    ours = summed_cross_entropy(hidden, head, cap, targets, smoothing)
    found = torch.autograd.grad(ours * 0.5, [hidden, *head.parameters()])
    # float32 sums of up to 300 terms in another order: some 1e-6 relative each.
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-4)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_token_nats_equals_torch(cap):
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(8, 50), torch.randn(600, 8), torch.randint(0, 50, (600,))
    logits = torch.tanh(head(hidden) / cap) * cap if cap else head(hidden)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(token_nats(hidden, head, cap, targets), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # an evaluation computes no gradient
        total = summed_cross_entropy(hidden, head, cap, targets)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-5, atol=1e-4)


def test_a_frozen_head_gets_no_gradient():
    head = torch.nn.Linear(8, 50).requires_grad_(False)
    hidden = torch.randn(5, 8, requires_grad=True)
    summed_cross_entropy(hidden, head, 0.0, torch.zeros(5, dtype=torch.long)).backward()
    assert head.weight.grad is None and hidden.grad is not None
