"""Adapters that move the base's own weights: which of them, from when on, and at what share of the rate.

Weights go in groups from the input up: embeddings, each layer, the head. A weight that a run will move
later has `requires_grad` off and `waits` on: the pass back through it is saved, yet it is counted, kept in
checkpoints and known to the optimizer, which passes over what has no gradient.
"""

from __future__ import annotations

from typing import Any

from components.shared import families
from components.shared.errors import TuneyardError
from components.train.adapters.config import LastLayersAdapter, OwnWeights, ProgressiveAdapter


def last_layers(model: Any, adapter: LastLayersAdapter) -> None:
    """Freeze all but the topmost layers.

    Raises:
        TuneyardError: there are fewer layers, or nothing would move.
    """
    embeddings, *layers, head = families.groups(model)
    if adapter.layers > len(layers):
        raise TuneyardError(
            f"train.adapter.layers is {adapter.layers}, and {type(model).__name__} has {len(layers)} layers",
            f"set it to {len(layers)} or less, or use adapter full",
        )
    moving = [name for layer in layers[len(layers) - adapter.layers :] for name in layer]
    moving += head if adapter.head else []
    moving += embeddings if adapter.embeddings else []
    if not moving:
        raise TuneyardError("adapter last_layers would move nothing", "set layers, head or embeddings")
    chosen = set(moving)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in chosen)


def begin(model: Any) -> None:
    """Let the head move and every other weight wait."""
    head = set(_from_above(model)[0])
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in head)
        weight.waits = name not in head


def settle(model: Any, adapter: ProgressiveAdapter, steps: int) -> None:
    """Freeze for good what a run of so many updates never comes to."""
    from_above = _from_above(model)
    weights = dict(model.named_parameters())
    for group in from_above[_moving(adapter, steps - 1, steps, len(from_above)) :]:
        for name in group:
            weights[name].waits = False


def thaw(model: Any, adapter: object, number: int, total: int) -> None:
    """Let move what moves in update `number` (from 0) of `total`; only `progressive` needs it."""
    if not isinstance(adapter, ProgressiveAdapter):
        return
    from_above = _from_above(model)
    weights = dict(model.named_parameters())
    for group in from_above[: _moving(adapter, number, total, len(from_above))]:
        for name in group:
            weights[name].requires_grad_(True).waits = False


def _from_above(model: Any) -> list[list[str]]:
    """Groups of weights from the head down; one that holds none (an untied head may be empty) is no step."""
    return [group for group in reversed(families.groups(model)) if group]


def _moving(adapter: ProgressiveAdapter, number: int, total: int, groups: int) -> int:
    """How many groups move in update `number` of `total`."""
    if adapter.every_steps is not None:
        return min(groups, 1 + number // adapter.every_steps)
    assert adapter.until is not None  # ProgressiveAdapter has one of the two
    return min(groups, 1 + int(number * (groups - 1) / max(1.0, adapter.until * total)))


def rate_shares(model: Any, adapter: object) -> dict[str, float]:
    """Weight -> its share of the learning rate, where that is not the same for all."""
    if not isinstance(adapter, OwnWeights) or adapter.layer_decay == 1:
        return {}
    from_above = reversed(families.groups(model))
    return {name: adapter.layer_decay**depth for depth, group in enumerate(from_above) for name in group}
