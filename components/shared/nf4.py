"""NF4: linear layers held in 4 bits (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3).

A weight is one of 16 levels times the largest magnitude of its block of 64. Those magnitudes, less their
mean, are held in 8-bit floats, with a scale for each 256 of them (double quantisation): 4.13 bits a weight
in all. A layer is brought back to 16 or 32 bits when it is computed, forward and again backward, and never
kept so. It is plain PyTorch and runs wherever PyTorch does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from components.shared import families

# Appendix E: quantiles of a standard normal, scaled to [-1, 1], with an exact zero.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK = 64
SCALES_BLOCK = 256
_LARGEST_FLOAT8 = 448.0  # of e4m3


def codes_and_scales(weight: Any) -> tuple[Any, Any]:
    """Nearest level of each weight, and the largest magnitude of each block.

    Args:
        weight: any shape; read flat, the last block may be short.

    Returns:
        codes [weights] uint8 below 16, and scales [blocks] float32.
    """
    import torch

    flat = weight.detach().float().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = padded.abs().amax(dim=1)
    levels = torch.tensor(LEVELS, device=flat.device)
    between = (levels[1:] + levels[:-1]) / 2
    shares = padded / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares, between, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: len(flat)], scales


def _small(scales: Any) -> tuple[Any, Any, Any]:
    """Scales as (8-bit floats by their bits, the scale of each 256, their mean)."""
    import torch

    mean = scales.mean()
    padded = torch.nn.functional.pad(scales - mean, (0, -len(scales) % SCALES_BLOCK)).view(-1, SCALES_BLOCK)
    steps = padded.abs().amax(dim=1) / _LARGEST_FLOAT8
    shares = padded / steps.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    eight = shares.to(torch.float8_e4m3fn).view(torch.uint8).view(-1)[: len(scales)]
    return eight, steps, mean


@functools.cache
def linear_class() -> Any:
    """The class of a linear layer in NF4; made once, so that isinstance holds."""
    import torch

    class Nf4Linear(torch.nn.Linear):
        """A frozen linear layer in NF4; its bias, if any, stays as it was."""

        def __init__(self, source: Any) -> None:
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = source.in_features, source.out_features
            self.stored_dtype = source.weight.dtype
            codes, scales = codes_and_scales(source.weight)
            even = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
            eight, steps, mean = _small(scales)
            self.register_buffer("codes", even[:, 0] * 16 + even[:, 1], persistent=False)
            self.register_buffer("scales", eight, persistent=False)
            self.register_buffer("steps", steps, persistent=False)
            self.register_buffer("mean", mean, persistent=False)
            self.bias = source.bias

        @property
        def weight(self) -> Any:
            """The weights brought back, [out, in], in what they were held in; a new tensor each time."""
            return self.dequantised(self.stored_dtype)

        def dequantised(self, dtype: Any) -> Any:
            """The weights brought back, [out, in]."""
            count = self.in_features * self.out_features
            steps = self.steps.repeat_interleave(SCALES_BLOCK)[: len(self.scales)]
            scales = self.scales.view(torch.float8_e4m3fn).float() * steps + self.mean
            # One look-up gives the two weights of a byte.
            pairs = torch.nn.functional.embedding(self.codes.int(), _pairs(self.codes.device))
            pairs = pairs.view(-1)[:count]
            if count % BLOCK:
                return (pairs * scales.repeat_interleave(BLOCK)[:count]).to(dtype).view(self._shape)
            return pairs.view(-1, BLOCK).mul_(scales[:, None]).to(dtype).view(self._shape)

        @property
        def _shape(self) -> tuple[int, int]:
            return self.out_features, self.in_features

        def forward(self, inputs: Any) -> Any:
            device = inputs.device.type
            if torch.is_autocast_enabled(device):
                inputs = inputs.to(torch.get_autocast_dtype(device))
            return _product().apply(inputs, self)

    return Nf4Linear


@functools.cache
def _product() -> Any:
    """The product of an NF4 layer, which autograd cannot look into."""
    import torch

    class Product(torch.autograd.Function):
        """inputs @ weights.T + bias; what is kept for the backward pass is nothing."""

        @staticmethod
        def forward(ctx: Any, inputs: Any, layer: Any) -> Any:
            ctx.layer = layer
            bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
            return torch.nn.functional.linear(inputs, layer.dequantised(inputs.dtype), bias)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] @ ctx.layer.dequantised(grads[0].dtype), None

    return Product


@functools.cache
def _pairs(device: Any) -> Any:
    """[256, 2]: the two levels that a byte holds."""
    import torch

    # What an evaluation looked up first must serve training too.
    with torch.inference_mode(False):
        levels = torch.tensor(LEVELS, device=device)
        byte = torch.arange(256, device=device)
        return torch.stack([levels[byte // 16], levels[byte % 16]], dim=1)


def forget_tables() -> None:
    """Let the table of levels be made anew, by whoever needs it next."""
    _pairs.cache_clear()


def linears(model: Any) -> Iterator[tuple[str, Any]]:
    """Name and module of each linear layer within the layers of a model; embeddings and heads are none."""
    import torch

    for prefix, layer in families.layers(model).items():
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                yield f"{prefix}.{name}", module


def quantise(model: Any) -> None:
    """Replace, in place, every linear layer within the layers of a model by its NF4 form, one at a time."""
    replace(model, {name: linear_class()(module) for name, module in _freeing(model)})


def _freeing(model: Any) -> Iterator[tuple[str, Any]]:
    """As `linears`; each layer's weights are let go before the next one is quantised."""
    import torch

    for name, module in list(linears(model)):
        yield name, module
        module.weight = torch.nn.Parameter(module.weight.new_empty(0), requires_grad=False)


def replace(model: Any, modules: dict[str, Any]) -> None:
    """Put modules in the place of those of the same name."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def restore(model: Any, source: Any) -> None:
    """Put the weights of an unquantised model in the place of the NF4 layers of the same name, in place.

    Args:
        model: a body, PEFT's layers in it or not.
        source: the same body as its files have it.
    """
    quantised = {n: m for n, m in model.named_modules() if isinstance(m, linear_class())}
    # PEFT calls the layer that it wraps `base_layer`.
    whole = {name: source.get_submodule(name.removesuffix(".base_layer")) for name in quantised}
    for name, module in quantised.items():
        whole[name].to(module.codes.device)
        whole[name].weight.requires_grad_(False)
    replace(model, whole)


def held(model: Any) -> int:
    """How many weights of a model are in NF4."""
    return sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, linear_class()))


def held_bytes(model: Any) -> int:
    """Bytes that those take."""
    return sum(
        buffer.numel() * buffer.element_size()
        for module in model.modules()
        if isinstance(module, linear_class())
        for buffer in module.buffers(recurse=False)
    )


def stored_bytes(model: Any) -> int:
    """Bytes that those took before they were quantised."""
    return sum(
        module.in_features * module.out_features * module.stored_dtype.itemsize
        for module in model.modules()
        if isinstance(module, linear_class())
    )
