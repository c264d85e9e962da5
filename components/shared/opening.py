"""Opening a tuned model that is no causal one: whole, or as an adapter beside its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.shared import addons
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.store import Store


def tuned(folder: Path, store: Store, kind: Any) -> Any:
    """The float32 model of a folder of ours, in eval mode.

    Args:
        folder: of layout transformers or addon.
        store: where the base of an addon may be.
        kind: transformers' auto class of the task.

    Raises:
        TuneyardError: the base changed, or the layout is another.
    """
    import torch
    from transformers import AutoConfig

    card = ModelCard.read(folder)
    if card.layout not in ("transformers", "addon"):
        raise TuneyardError(
            f"{folder}: layout {card.layout!r} holds no PyTorch {card.task} model", "train it again"
        )
    beside = card.layout == "addon"
    model = kind.from_pretrained(
        card.base_model.folder(store) if beside else folder,
        config=AutoConfig.from_pretrained(folder, local_files_only=True),
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
    )
    if beside:
        addons.load(model, folder)
    return model.eval()
