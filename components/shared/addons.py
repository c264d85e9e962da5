"""Adapters that stay beside their base: bottlenecks and soft prompts, with the head that moved along.

A folder of layout `addon` holds `addon.json` (what to build), `addon.safetensors` (every weight that moved,
by its name in the model) and the model's config; the weights of the base are read from where the card says,
and it must still be the one that was tuned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from components.shared import bottlenecks, families, prompts
from components.shared.errors import TuneyardError

NAME, WEIGHTS = "addon.json", "addon.safetensors"


class Addon(BaseModel):
    """What is built beside a base.

    Args:
        kind: see bottlenecks and prompts.
        size: neurons of a bottleneck, or virtual tokens of a prompt.
        moves_base: whether weights of the base's body moved too, and are in the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["houlsby", "pfeiffer", "prompt", "prefix", "p_tuning_v2"]
    size: int
    moves_base: bool = False

    @classmethod
    def read(cls, folder: Path) -> Addon:
        """Read it from a model folder.

        Raises:
            TuneyardError: there is none or it does not fit.
        """
        try:
            return cls.model_validate(json.loads((folder / NAME).read_text()))
        except (OSError, ValueError) as error:
            raise TuneyardError(f"{folder}: no usable {NAME} ({error})", "train the model again") from error


def attach(model: Any, addon: Addon, projection: int = 0) -> list[str]:
    """Build an adapter into a model; its weights are new.

    Args:
        model: a transformers model.
        addon: what to build.
        projection: neurons of the network behind a prefix in training; 0 for none.

    Returns:
        Names of the base's own weights that move with it.
    """
    if addon.kind == "houlsby" or addon.kind == "pfeiffer":
        return bottlenecks.add(model, addon.kind, addon.size)
    prompts.add(model, addon.kind, addon.size, projection)
    return []


def own(name: str) -> bool:
    """Whether the weight of that name belongs to what `attach` built, and not to the base."""
    parts = name.split(".")
    return bottlenecks.CHILD in parts or prompts.CHILD in parts


def save(model: Any, addon: Addon, moved: Mapping[str, Any], folder: Path) -> None:
    """Write what `load` needs.

    Args:
        model: with the addon built in.
        addon: as it was attached.
        moved: every weight that training moved, by name.
        folder: to write into.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight for name, weight in moved.items() if f"{prompts.CHILD}." not in name}
    inside = families.body(model)
    if hasattr(inside, prompts.CHILD):
        # The network behind a prefix has done its work: what is kept is what it gives.
        prefix = next(name for name in moved if f"{prompts.CHILD}." in name).partition(f"{prompts.CHILD}.")[0]
        weights[f"{prefix}{prompts.CHILD}.{prompts.VALUES}"] = prompts.values(inside.soft_prompt)
    plain = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(plain, folder / WEIGHTS, {"format": "pt"})
    (folder / NAME).write_text(addon.model_dump_json(indent=1))
    model.config.save_pretrained(folder)


def load(model: Any, folder: Path) -> None:
    """Build the adapter of a folder into its base, in place.

    Raises:
        TuneyardError: the file holds other weights than this model takes.
    """
    import torch
    from safetensors.torch import load_file

    attach(model, Addon.read(folder))
    saved, here = load_file(folder / WEIGHTS), dict(model.named_parameters())
    faults = [f"{name} is not in the model" for name in saved.keys() - here.keys()]
    faults += [f"{name} is not in the file" for name in here if own(name) and name not in saved]
    faults += [
        f"{name} is {tuple(saved[name].shape)} in the file and {tuple(here[name].shape)} in the model"
        for name in saved.keys() & here.keys()
        if saved[name].shape != here[name].shape
    ]
    if faults:
        raise TuneyardError(
            f"{folder / WEIGHTS} does not fit its base: " + "; ".join(sorted(faults)), "train the model again"
        )
    with torch.no_grad():
        for name, weight in saved.items():
            here[name].copy_(weight)
