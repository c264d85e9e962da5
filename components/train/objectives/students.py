"""A student that begins as some layers of its base (Sanh et al. 2019, arXiv:1910.01108, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from components.shared import families
from components.shared.errors import TuneyardError


def keep_layers(model: Any, kept: Sequence[int]) -> None:
    """Leave a model with these of its layers, in their order; embeddings, norms and head stay.

    Raises:
        TuneyardError: it has no such layers, or more than one stack of them.
    """
    import torch

    names = list(families.layers(model))
    stacks = {name.rpartition(".")[0] for name in names}
    if len(stacks) != 1:
        raise TuneyardError(
            f"{type(model).__name__} has {len(stacks)} stacks of layers ({', '.join(sorted(stacks))})",
            "drop train.objective.student, and name a smaller train.base_model",
        )
    if kept[-1] >= len(names):
        raise TuneyardError(
            f"train.objective.student.layers {list(kept)}: {type(model).__name__} has {len(names)} layers",
            f"name layers from 0 to {len(names) - 1}",
        )
    path = stacks.pop()
    blocks = model.get_submodule(path)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, torch.nn.ModuleList(blocks[at] for at in kept))
    for index, block in enumerate(model.get_submodule(path)):
        for part in block.modules():
            if hasattr(part, "layer_idx"):  # where its keys are in a cache
                part.layer_idx = index
    _describe(model.config.get_text_config(), len(names), kept)


def _describe(settings: Any, layers: int, kept: Sequence[int]) -> None:
    """Say it in the model's config, also where that has an entry for each layer."""
    for name, value in settings.to_dict().items():
        if isinstance(value, list) and len(value) == layers and hasattr(settings, name):
            setattr(settings, name, [value[at] for at in kept])
    settings.num_hidden_layers = len(kept)
