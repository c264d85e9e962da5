"""Where the parts of a transformer are, in the classes of many families: found by structure and name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from components.shared.errors import TuneyardError

# Ends of a module's path within its layer. A pattern that begins with a dot must be the whole path: BERT
# calls the last product of its feed-forward `output.dense` and that of its attention
# `attention.output.dense`.
ATTENTION_OUT = (
    "attention.output.dense",
    "self_attn.o_proj",
    "self_attn.out_proj",
    "attention.o_proj",
    "attention.out_lin",
    "attn.c_proj",
    "SelfAttention.o",
)
FEED_FORWARD_OUT = (
    ".output.dense",
    "mlp.down_proj",
    "mlp.fc2",
    "fc2",
    "ffn.lin2",
    "mlp.c_proj",
    "DenseReluDense.wo",
)
KEYS = ("attention.self.key", "k_proj", "attention.k_lin", "SelfAttention.k", "EncDecAttention.k")
VALUES = ("attention.self.value", "v_proj", "attention.v_lin", "SelfAttention.v", "EncDecAttention.v")


def body(model: Any) -> Any:
    """The transformer below the heads of a model.

    Args:
        model: a transformers model, one in PEFT's wrapping, or a module that holds one.

    Raises:
        TuneyardError: there is no transformers model in it.
    """
    from transformers import PreTrainedModel

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for module in inner.modules():
        if isinstance(module, PreTrainedModel):
            return module.base_model
    raise TuneyardError(
        f"{type(inner).__name__} holds no transformers model", "set train.adapter: {kind: full}"
    )


def layers(model: Any) -> dict[str, Any]:
    """Name -> module of each layer, the lowest first; an encoder's before its decoder's.

    Raises:
        TuneyardError: none are found.
    """
    import torch

    inside = body(model)
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{layer}.") for layer in found)
        if isinstance(module, torch.nn.ModuleList) and not nested and _within(module, inside):
            blocks = {f"{name}.{index}": block for index, block in enumerate(module)}
            # A list of bare matrices is a part of something else.
            if all(any(True for _ in block.children()) for block in blocks.values()):
                found |= blocks
    if not found:
        raise TuneyardError(
            f"no list of layers in {type(inside).__name__}", "set train.adapter: {kind: full} or {kind: lora}"
        )
    return found


def _within(module: Any, inside: Any) -> bool:
    return any(part is module for part in inside.modules())


def groups(model: Any) -> list[list[str]]:
    """Names of the weights in groups from the input up: embeddings, each layer, then the head.

    What stands between two stacks of layers goes with the layer below it; what comes after the last one, and
    whatever is no part of the body, is the head. A projection that is tied to the embeddings is theirs.
    """
    prefixes = [f"{name}." for name in layers(model)]
    inside = body(model)
    own = {id(weight) for weight in inside.parameters()}
    found: list[list[str]] = [[] for _ in range(len(prefixes) + 2)]
    reached = 0
    for name, weight in model.named_parameters():
        at = next((i for i, prefix in enumerate(prefixes, 1) if name.startswith(prefix)), None)
        if id(weight) not in own:
            found[-1].append(name)
        elif at is not None:
            reached = at
            found[at].append(name)
        else:
            found[-1 if reached == len(prefixes) else reached].append(name)
    return found


def head(model: Any) -> list[str]:
    """Names of the weights that a task adds to a base: all outside the body, and a pooler in it."""
    inside = body(model)
    own = {id(weight) for name, weight in inside.named_parameters() if not name.startswith("pooler.")}
    return [name for name, weight in model.named_parameters() if id(weight) not in own]


def parts(layer: Any, patterns: Sequence[str]) -> list[str]:
    """Paths within a layer that end as one of the patterns says."""
    return [
        path
        for path, _ in layer.named_modules()
        if any(path == p[1:] if p[0] == "." else path == p or path.endswith(f".{p}") for p in patterns)
    ]


def norms(layer: Any) -> list[str]:
    """Names, within a layer, of the weights of its norms."""
    return [
        f"{path}.{name}"
        for path, module in layer.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    ]
