"""Cross-entropy over a large vocabulary without keeping the logits.

Logits of 2,000 answer tokens over 262,144 words are 2 GiB in float32, and autograd keeps several copies.
Here the projection, the softmax and their gradient are computed for a few hundred tokens at a time and only
the gradient of the hidden states is kept: the same arithmetic (one product forward, one or two backward),
a hundredth of the memory. The idea is that of fused linear cross-entropy (Hsu et al. 2024, Liger Kernel,
arXiv:2410.10989, section 3.2); label smoothing is Szegedy et al. 2016 (arXiv:1512.00567, section 7).
"""

from __future__ import annotations

from typing import Any

CHUNK_TOKENS = 256


class _Projection:
    """Projects hidden states on the vocabulary, a chunk at a time, into buffers that are made once.

    Fresh memory of this size (268 MB for 256 tokens of Gemma 3) is given back and zeroed by the kernel every
    time, which takes longer than the product.
    """

    def __init__(self, weight: Any, bias: Any, tokens: int) -> None:
        import torch

        shape = min(CHUNK_TOKENS, tokens), weight.shape[0]
        self._weight, self._bias = weight, bias
        self.raw = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        exact = weight.dtype == torch.float32
        self._float32 = self.raw if exact else torch.empty(shape, device=weight.device)

    def logits(self, states: Any) -> Any:
        """float32 logits [n, vocabulary] of states [n, width], before any cap; valid until the next call."""
        import torch

        products = torch.mm(states, self._weight.T, out=self.raw[: len(states)])
        return self._float32[: len(states)].copy_(
            products if self._bias is None else products.add_(self._bias)
        )


def token_nats(hidden: Any, head: Any, cap: float, targets: Any) -> Any:
    """Negative log-likelihood of each target in nats, without gradient.

    Args:
        hidden: [n, width].
        head: the vocabulary projection (a Linear).
        cap: the model's soft cap of logits; 0 for none.
        targets: [n] token ids.

    Returns:
        [n] float32.
    """
    import torch

    with torch.inference_mode():
        projection = _Projection(head.weight, head.bias, len(targets))
        parts = []
        for states, wanted in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
            logits = projection.logits(states.to(head.weight.dtype))
            if cap:
                logits.div_(cap).tanh_().mul_(cap)
            at_target = logits[torch.arange(len(wanted), device=wanted.device), wanted]
            highest = logits.amax(-1)
            parts.append(logits.sub_(highest[:, None]).exp_().sum(-1).log() + highest - at_target)
    return torch.cat(parts)


def summed_cross_entropy(
    hidden: Any, head: Any, cap: float, targets: Any, label_smoothing: float = 0.0
) -> Any:
    """Sum over tokens of the cross-entropy, differentiable in `hidden` and in the head's weight and bias.

    Args:
        hidden: [n, width].
        head: the vocabulary projection (a Linear), computed in its own dtype.
        cap: the model's soft cap of logits; 0 for none.
        targets: [n] token ids.
        label_smoothing: share of the target spread evenly over the vocabulary, 0-1.

    Returns:
        float32 scalar; equals torch's cross_entropy(reduction="sum") on whole logits.
    """
    import torch

    if not label_smoothing and not torch.is_grad_enabled():
        return token_nats(hidden, head, cap, targets).sum()
    return _function().apply(hidden, head.weight, head.bias, targets, cap, label_smoothing)


def token_cross_entropy(hidden: Any, head: Any, cap: float, targets: Any) -> Any:
    """Cross-entropy of each token, differentiable in `hidden` and in the head's weight and bias.

    For losses that weigh whole answers, when the weight of a token is known only after all were seen: what
    the hidden states get is computed in the forward pass and scaled in the backward pass, and what the head
    gets, if it moves, is computed in the backward pass from logits that are made again.

    Args:
        hidden: [n, width].
        head: the vocabulary projection (a Linear), computed in its own dtype.
        cap: the model's soft cap of logits; 0 for none.
        targets: [n] token ids.

    Returns:
        [n] float32; equals torch's cross_entropy(reduction="none") on whole logits.
    """
    import torch

    if not torch.is_grad_enabled():
        return token_nats(hidden, head, cap, targets)
    return _token_function().apply(hidden, head.weight, head.bias, targets, cap)


def _token_function() -> Any:
    import torch

    class TokenCrossEntropy(torch.autograd.Function):
        """Keeps the gradient of the hidden states [n, width], never that of the logits."""

        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, cap: float) -> Any:
            nats = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
            grad_hidden = torch.empty_like(hidden)
            projection = _Projection(weight, bias, len(targets))
            for start in range(0, len(targets), CHUNK_TOKENS):
                at = slice(start, start + CHUNK_TOKENS)
                logits = projection.logits(hidden[at].to(weight.dtype))
                nats[at] = _losses_and_gradient(logits, targets[at], 0.0, cap)
                grad = projection.raw[: len(logits)].copy_(logits)
                grad_hidden[at] = torch.mm(grad, weight).to(hidden.dtype)
            ctx.cap = cap
            ctx.save_for_backward(hidden, weight, bias, targets, grad_hidden)
            return nats

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            hidden, weight, bias, targets, grad_hidden = ctx.saved_tensors
            scale = grads[0][:, None]
            grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
            grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
            if grad_weight is not None or grad_bias is not None:
                projection = _Projection(weight, bias, len(targets))
                for start in range(0, len(targets), CHUNK_TOKENS):
                    at = slice(start, start + CHUNK_TOKENS)
                    states = hidden[at].to(weight.dtype)
                    logits = projection.logits(states)
                    _losses_and_gradient(logits, targets[at], 0.0, ctx.cap)
                    grad = projection.raw[: len(logits)].copy_(logits.mul_(scale[at]))
                    if grad_weight is not None:
                        grad_weight += grad.T @ states
                    if grad_bias is not None:
                        grad_bias += grad.sum(0)
            return grad_hidden * scale.to(grad_hidden.dtype), grad_weight, grad_bias, None, None

    return TokenCrossEntropy


def _function() -> Any:
    import torch

    class SummedCrossEntropy(torch.autograd.Function):
        """Computes the gradients in the forward pass, chunk by chunk, and hands them out in the backward."""

        @staticmethod
        def forward(
            ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, cap: float, smoothing: float
        ) -> Any:
            total = hidden.new_zeros((), dtype=torch.float32)
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
            grad_bias = torch.zeros_like(bias) if bias is not None and bias.requires_grad else None
            projection = _Projection(weight, bias, len(targets))
            for start in range(0, len(targets), CHUNK_TOKENS):
                at = slice(start, start + CHUNK_TOKENS)
                states = hidden[at].to(weight.dtype)
                logits = projection.logits(states)
                total += _losses_and_gradient(logits, targets[at], smoothing, cap).sum()
                grad = projection.raw[: len(states)].copy_(logits)
                grad_hidden[at] = torch.mm(grad, weight).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += grad.T @ states
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
            ctx.gradients = grad_hidden, grad_weight, grad_bias
            return total

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            scaled = [g * grads[0].to(g.dtype) if g is not None else None for g in ctx.gradients]
            return (*scaled, None, None, None)

    return SummedCrossEntropy


def _losses_and_gradient(logits: Any, targets: Any, smoothing: float, cap: float) -> Any:
    """Loss of each token; the logits become its gradient with respect to the uncapped logits.

    All in place, five passes over memory: at this size the passes cost more than the arithmetic.
    """
    import torch

    rows = torch.arange(len(targets), device=targets.device)
    slope = None
    if cap:
        logits.div_(cap).tanh_()
        slope = 1 - logits**2
        logits.mul_(cap)
    at_target = logits[rows, targets]
    mean = logits.mean(-1) if smoothing else 0.0
    highest = logits.amax(-1)
    logits.sub_(highest[:, None]).exp_()
    total = logits.sum(-1)
    log_normaliser = total.log() + highest
    losses = log_normaliser - (1 - smoothing) * at_target - smoothing * mean
    logits.div_(total[:, None])
    logits[rows, targets] -= 1 - smoothing
    if smoothing:
        logits -= smoothing / logits.shape[-1]
    if slope is not None:
        logits.mul_(slope)
    return losses
