"""Decoding several answers together: the key-value cache of rows that come and go.

Rows are aligned at their right end and padded on the left, so that a token is appended to all of them at
one slot, and a row can join or leave at any token: its keys carry rotary positions of its own count, which
do not depend on the slot they lie in. Padding is masked out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from components.shared.errors import TuneyardError

_JOIN_TOLERANCE = 0.1  # of the logits' standard deviation

# Tokens of a prompt that are read at once. Between two such pieces the rows that are being decoded take a
# step, so a long prompt cannot hold them up for longer than one piece, and masks stay small.
PROMPT_PIECE_TOKENS = 512


@dataclass(frozen=True)
class Rows:
    """Sequences in decoding.

    Args:
        cache: transformers DynamicCache; each layer holds keys and values [rows, heads, slots, head size].
        mask: [rows, slots], 1 where a slot holds a token of the row, 0 where it is padding.
    """

    cache: Any
    mask: Any

    @property
    def slots(self) -> int:
        """Width of the cache."""
        return int(self.mask.shape[1])


def read_prompt(model: Any, token_ids: Sequence[int]) -> Iterator[tuple[Any, Rows]]:
    """Read a prompt alone, piece by piece, so that no neighbour and no padding touches it.

    Yields:
        After each piece: logits [1, vocabulary] of the token that would come next, and the row so far.
    """
    import torch
    from transformers import DynamicCache

    # Built without the model's config on purpose: layers with a sliding window then keep all their keys too
    # (the mask still hides what is outside the window), which is what lets rows join.
    cache = DynamicCache()
    ids = torch.tensor([list(token_ids)], device=model.device)
    for start in range(0, len(token_ids), PROMPT_PIECE_TOKENS):
        piece = ids[:, start : start + PROMPT_PIECE_TOKENS]
        end = start + piece.shape[1]
        mask = torch.ones((1, end), dtype=torch.long, device=model.device)
        position_ids = torch.arange(start, end, device=model.device)[None]
        yield _forward(model, piece, mask, position_ids, cache), Rows(cache, mask)


def step(model: Any, rows: Rows, tokens: Sequence[int]) -> tuple[Any, Rows]:
    """Append one token to every row.

    Args:
        model: the causal model.
        rows: is used up; go on with the returned one.
        tokens: one id a row.

    Returns:
        Logits [rows, vocabulary] of what comes next, and the longer rows.
    """
    import torch

    position_ids = rows.mask.sum(1, keepdim=True)
    mask = torch.nn.functional.pad(rows.mask, (0, 1), value=1)
    ids = torch.tensor(list(tokens), device=model.device)[:, None]
    return _forward(model, ids, mask, position_ids, rows.cache), Rows(rows.cache, mask)


def _forward(model: Any, ids: Any, mask: Any, position_ids: Any, cache: Any) -> Any:
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1]


def join(first: Rows | None, second: Rows) -> Rows:
    """The rows of both, `first` above `second`, the narrower one padded on the left."""
    import torch
    from transformers import DynamicCache

    if first is None:
        return second
    slots = max(first.slots, second.slots)
    layers = zip(_widened(first, slots), _widened(second, slots), strict=True)
    joined = [(torch.cat([k1, k2]), torch.cat([v1, v2])) for (k1, v1), (k2, v2) in layers]
    pad = torch.nn.functional.pad
    masks = [pad(rows.mask, (slots - rows.slots, 0)) for rows in (first, second)]
    return Rows(DynamicCache(joined), torch.cat(masks))


def _widened(rows: Rows, slots: int) -> Iterator[tuple[Any, Any]]:
    import torch

    pad = (0, 0, slots - rows.slots, 0)
    for layer in rows.cache.layers:
        yield torch.nn.functional.pad(layer.keys, pad), torch.nn.functional.pad(layer.values, pad)


def keep(rows: Rows, indices: Sequence[int]) -> Rows | None:
    """Only these rows, without slots that are padding in all of them; None for no indices."""
    import torch
    from transformers import DynamicCache

    if not indices:
        return None
    chosen = torch.tensor(list(indices), device=rows.mask.device)
    mask = rows.mask[chosen]
    first = int(mask.any(0).nonzero()[0])
    kept = [
        (layer.keys[chosen][:, :, first:], layer.values[chosen][:, :, first:]) for layer in rows.cache.layers
    ]
    return Rows(DynamicCache(kept), mask[:, first:])


def bytes_per_token(rows: Rows) -> int:
    """Bytes of keys and values that one slot of one row takes."""
    cells = rows.mask.numel()
    return (
        sum(t.numel() * t.element_size() for layer in rows.cache.layers for t in (layer.keys, layer.values))
        // cells
    )


def verify_joins(model: Any, prompts: tuple[Sequence[int], Sequence[int]]) -> None:
    """Check that two prompts of different lengths decode together as they do apart.

    Holds for attention with a key-value cache; an architecture with another memory (a recurrent state) does
    not survive `join`.

    Raises:
        TuneyardError: it does not hold for this model, or its logits are not finite.
    """
    import torch

    (first, a), (second, b) = (list(read_prompt(model, prompt))[-1] for prompt in prompts)
    tokens = [int(first.argmax()), int(second.argmax())]
    # `join` copies, so that the rows it was given can still be decoded apart.
    together, _ = step(model, join(a, b), tokens)
    alone = torch.cat([step(model, rows, [token])[0] for rows, token in zip((a, b), tokens, strict=True)])
    if not bool(torch.isfinite(torch.cat([together, alone])).all()):
        raise TuneyardError(
            f"{type(model).__name__} gives logits that are not finite", "train the model again"
        )
    difference = float((together - alone).detach().float().abs().max())
    spread = float(alone.detach().float().std())
    # bfloat16 keeps 8 bits: differences of a few hundredths of the logits' spread are rounding. A row that
    # reads the wrong keys is off by about the spread itself.
    if difference > _JOIN_TOLERANCE * spread:
        raise TuneyardError(
            f"rows of {type(model).__name__} decoded together differ from rows decoded apart "
            f"by {difference:.3g} (logits spread {spread:.3g})",
            "the server decodes attention models with a plain key-value cache only; serve this one elsewhere",
        )
