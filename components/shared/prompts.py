"""Soft prompts: learned vectors that a frozen model reads before the text.

`prompt` (Lester et al. 2021, arXiv:2104.08691) puts them before the word vectors. `prefix` (Li and Liang
2021, arXiv:2101.00190) and `p_tuning_v2` (Liu et al. 2021, arXiv:2110.07602) put learned keys and values
before those of every layer: prefix as the output of a small network that is dropped after training,
p_tuning_v2 directly.

They act inside the model's body, so that whoever computes with it (a loss on some positions, an evaluation
with a cache) gets the outputs of the text alone, at the text's own places. The text's positions count on
from the prompt's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from components.shared import families
from components.shared.errors import TuneyardError

Kind = Literal["prompt", "prefix", "p_tuning_v2"]
CHILD = "soft_prompt"
VALUES = "values"
_DEVIATION = 0.02


def add(model: Any, kind: Kind, tokens: int, projection: int = 0) -> None:
    """Put a soft prompt before everything that a model reads.

    Args:
        model: a transformers model whose body reads tokens.
        kind: where its vectors go.
        tokens: how many virtual tokens.
        projection: neurons of the network behind a prefix; 0 for none, as in a trained one.

    Raises:
        TuneyardError: the family cannot take it.
    """
    import torch

    inside = families.body(model)
    takes = inspect.signature(inside.forward).parameters
    _refuse_strange(inside, kind, takes)
    embedding = inside.get_input_embeddings()
    device = embedding.weight.device
    if kind == "prompt":
        # Lester et al., section 3.2: vectors of the vocabulary are a better start than noise.
        chosen = torch.randint(embedding.weight.shape[0], (tokens,), device=device)
        with torch.no_grad():
            start = embedding(chosen).float().clone()
        prompt = _module(start)
    else:
        layers, heads, width = _shape(inside.config)
        rows = layers * 2 * heads * width
        if projection:
            prompt = torch.nn.Module()
            prompt.words = torch.nn.Parameter(torch.randn(tokens, embedding.weight.shape[1]))
            prompt.network = torch.nn.Sequential(
                torch.nn.Linear(embedding.weight.shape[1], projection),
                torch.nn.Tanh(),
                torch.nn.Linear(projection, rows),
            )
        else:
            prompt = _module(torch.randn(tokens, rows) * _DEVIATION)
    prompt.unread, prompt.tokens = False, tokens
    inside.add_module(CHILD, prompt.to(device))
    before = _before_words if kind == "prompt" else _before_layers
    _read_first(inside, list(takes), before)


def of(model: Any) -> Any | None:
    """The soft prompt that a model reads; None where there is none."""
    return next((module for name, module in model.named_modules() if name.split(".")[-1] == CHILD), None)


@contextmanager
def unread(model: Any) -> Iterator[None]:
    """While it lasts, a model reads the text alone: it is its base. One without a soft prompt always does."""
    prompt = of(model)
    before = prompt.unread if prompt is not None else False
    try:
        if prompt is not None:
            prompt.unread = True
        yield
    finally:
        if prompt is not None:
            prompt.unread = before


def _module(values: Any) -> Any:
    import torch

    module = torch.nn.Module()
    module.values = torch.nn.Parameter(values)
    return module


def _refuse_strange(inside: Any, kind: str, takes: Any) -> None:
    config = inside.config
    needed = "inputs_embeds" if kind == "prompt" else "past_key_values"
    lacking = ""
    if config.is_encoder_decoder:
        lacking = "is an encoder-decoder, which has two places for it"
    elif needed not in takes:
        lacking = f"takes no {needed}"
    elif kind != "prompt" and (getattr(config, "num_kv_shared_layers", None) or len(_shapes(config)) > 1):
        lacking = "has layers that share keys or differ in their shape"
    if lacking:
        raise TuneyardError(
            f"adapter {kind}: {type(inside).__name__} {lacking}", "use lora or houlsby on this family"
        )


def _shape(config: Any) -> tuple[int, int, int]:
    """(layers, heads of keys and values, width of a head)."""
    return (config.num_hidden_layers, *next(iter(_shapes(config))))


def _shapes(config: Any) -> set[tuple[int, int]]:
    """(heads of keys and values, width of a head), as the layers have them."""
    different = getattr(config, "per_layer_config", None)
    layers = [different[i] for i in range(config.num_hidden_layers)] if different else [config]
    heads = config.num_attention_heads
    return {
        (
            getattr(layer, "num_key_value_heads", None) or heads,
            getattr(layer, "head_dim", None) or config.hidden_size // heads,
        )
        for layer in layers
    }


def values(prompt: Any) -> Any:
    """What a soft prompt gives: [tokens, width] word vectors, or [tokens, layers x 2 x heads x width]."""
    return prompt.values if hasattr(prompt, VALUES) else prompt.network(prompt.words)


def _read_first(inside: Any, names: list[str], before: Any) -> None:
    """Make a body read its soft prompt before the text, and give the outputs of the text alone."""
    original = inside.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if inside.soft_prompt.unread:
            return original(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        extra = before(inside, given)
        output = original(**given)
        if extra:
            output.last_hidden_state = output.last_hidden_state[:, extra:]
            if output.get("hidden_states") is not None:
                output.hidden_states = tuple(states[:, extra:] for states in output.hidden_states)
            if output.get("pooler_output") is not None:
                # What pools takes the first place, which must be the text's.
                output.pooler_output = inside.pooler(output.last_hidden_state)
        return output

    inside.forward = forward


def _count(prompt: Any) -> int:
    return len(prompt.values if hasattr(prompt, VALUES) else prompt.words)


def _dtype(inside: Any) -> Any:
    """What a body computes in now."""
    import torch

    device = inside.get_input_embeddings().weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return inside.get_input_embeddings().weight.dtype


def _make_room(inside: Any, given: dict[str, Any]) -> tuple[int, int, bool]:
    """Widen mask and positions by the virtual tokens.

    Returns:
        (rows, virtual tokens, whether they are still to be read: not where a cache already holds them).
    """
    import torch

    count = _count(inside.soft_prompt)
    text = given.get("input_ids")
    text = given["inputs_embeds"] if text is None else text
    cache = given.get("past_key_values")
    read = 0 if cache is None else cache.get_seq_length()
    first = read == 0
    mask = given.get("attention_mask")
    if mask is None:
        _refuse_packed(given.get("position_ids"))
        held = max(0, read - count)
        mask = torch.ones(len(text), held + text.shape[1], dtype=torch.long, device=text.device)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise _packed()
    given["attention_mask"] = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)
    if given.get("position_ids") is not None:
        given["position_ids"] = given["position_ids"] + count
    return len(text), count, first


def _packed() -> TuneyardError:
    return TuneyardError(
        "several examples share a row, and a soft prompt is read once at the start of a row",
        "use lora, or switch packing off",
    )


def _refuse_packed(places: Any) -> None:
    """Positions that fall within a row are how transformers is told of packing where there is no mask."""
    if places is not None and places.shape[-1] > 1 and bool((places.diff(dim=-1) < 0).any()):
        raise _packed()


def _before_words(inside: Any, given: dict[str, Any]) -> int:
    """Put the prompt before the word vectors; how many outputs are its own."""
    import torch

    rows, count, first = _make_room(inside, given)
    if not first:
        return 0
    words = given.pop("inputs_embeds", None)
    ids = given.pop("input_ids", None)
    words = inside.get_input_embeddings()(ids) if words is None else words
    prompt = inside.soft_prompt.values.to(words.dtype).expand(rows, -1, -1)
    given["inputs_embeds"] = torch.cat([prompt, words], dim=1)
    if given.get("token_type_ids") is not None:
        kinds = given["token_type_ids"]
        given["token_type_ids"] = torch.cat([kinds.new_zeros(rows, count), kinds], dim=1)
    if given.get("position_ids") is not None:
        own = torch.arange(count, device=words.device).expand(rows, -1)
        given["position_ids"] = torch.cat([own, given["position_ids"].expand(rows, -1)], dim=1)
    return count


def _before_layers(inside: Any, given: dict[str, Any]) -> int:
    """Put the prefix into the cache that the layers read; no output is its own."""
    from transformers import DynamicCache

    rows, count, first = _make_room(inside, given)
    if not first:
        return 0
    layers, heads, width = _shape(inside.config)
    flat = values(inside.soft_prompt).to(_dtype(inside))
    # [layers, 2, heads, tokens, width]
    states = flat.view(count, layers, 2, heads, width).permute(1, 2, 3, 0, 4)
    cache = given.get("past_key_values")
    if cache is None:
        cache = DynamicCache(config=inside.config)
    for layer, (keys, vectors) in enumerate(states):
        cache.update(keys.expand(rows, -1, -1, -1), vectors.expand(rows, -1, -1, -1), layer)
    given["past_key_values"] = cache
    return 0
