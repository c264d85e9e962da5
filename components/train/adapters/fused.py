"""A linear layer under LoRA as one operation.

PEFT adds the adapter's branch in separate operations, casting the input to the adapter's float32 and, under
autocast, back again; autograd does all of it once more. On a CPU those passes over memory cost as much as the
adapter's products. Here W x + s B A x is one node of autograd that keeps the input once, in the precision it
computes in; its gradient is written out (Hu et al. 2021, arXiv:2106.09685, section 4.1, differentiated). PEFT
still owns the weights: what it saves, merges and switches off does not change.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any


def use(model: Any) -> int:
    """Compute the plain LoRA layers of a PEFT model in one operation each.

    Layers of another kind (quantised, with a magnitude, on an embedding or a convolution) stay PEFT's.

    Returns:
        How many layers were changed.
    """
    from peft.tuners.lora import layer as lora
    from torch import nn

    found = 0
    for module in model.modules():
        plain = type(module) is lora.Linear and type(module.get_base_layer()) is nn.Linear
        if not plain or module.lora_variant or len(module.lora_A) != 1:
            continue
        # The gradient of the base's own weights is not computed: they must be frozen.
        if not any(weight.requires_grad for weight in module.get_base_layer().parameters()):
            module.forward = partial(_forward, module, module.forward)
            found += 1
    return found


def _forward(module: Any, usual: Any, x: Any, *args: Any, **named: Any) -> Any:
    """What PEFT's layer computes; its own way where the adapter is merged or off."""
    if module.merged or module.disable_adapters or args or named:
        return usual(x, *args, **named)
    (name,) = module.lora_A
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    base = module.get_base_layer()
    dropped = dropout(x) if module.training and getattr(dropout, "p", 0.0) else None
    # An adapter's B may have a bias of its own (lora_bias).
    if a.bias is not None or b.bias is not None or name not in module.active_adapters:
        return usual(x)
    return _function().apply(x, dropped, base.weight, base.bias, a.weight, b.weight, module.scaling[name])


@cache
def _function() -> Any:
    import torch

    class LoraLinear(torch.autograd.Function):
        """y = x W' + bias + s (d A') B' for rows x, and d, which is x or what dropout left of it."""

        @staticmethod
        def forward(
            ctx: Any, x: Any, dropped: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float
        ) -> Any:
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            with torch.autocast(kind, enabled=False):
                rows = x.reshape(-1, x.shape[-1]).to(dtype)
                low_in = rows if dropped is None else dropped.reshape(rows.shape).to(dtype)
                low = low_in @ a.to(dtype).T
                y = torch.nn.functional.linear(
                    rows, weight.to(dtype), None if bias is None else bias.to(dtype)
                )
                y.addmm_(low, b.to(dtype).T, alpha=scale)
            ctx.save_for_backward(low_in, low, weight, a, b)
            ctx.scale, ctx.given, ctx.split = scale, (x.shape, x.dtype), dropped is not None
            return y.view(*x.shape[:-1], len(weight))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            low_in, low, weight, a, b = ctx.saved_tensors
            shape, given = ctx.given
            dtype = low.dtype
            grad = grads[0].reshape(len(low), -1).to(dtype)
            through = (grad @ b.to(dtype)).mul_(ctx.scale)
            of_x = of_dropped = None
            if ctx.needs_input_grad[0]:
                of_x = grad @ weight.to(dtype)
                if not ctx.split:
                    of_x.addmm_(through, a.to(dtype))
                of_x = of_x.view(shape).to(given)
            if ctx.split and ctx.needs_input_grad[1]:
                of_dropped = (through @ a.to(dtype)).view(shape).to(given)
            of_a = (through.T @ low_in).to(a.dtype)
            of_b = (grad.T @ low).to(b.dtype).mul_(ctx.scale)
            return of_x, of_dropped, None, None, of_a, of_b, None

    return LoraLinear
