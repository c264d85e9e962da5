"""Two phases of one training: domain text first, then the task, by the same weights.

The second phase goes on with what the first one moved, adapter and all (docs/decisions/0019-mixed-route.md).
Its checkpoints are numbered on from those of the first, hold every weight that moves and how the first phase
went, so a training that is cut off in either goes on from its newest checkpoint and from nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.shared import digest, families, jsonl
from components.shared.errors import TuneyardError
from components.shared.examples import DOMAIN
from components.shared.modelcard import DomainPhase
from components.shared.stage import Artifact
from components.train import checkpoint
from components.train.config import TrainConfig
from components.train.data import Ledger
from components.train.ongoing import Fit

log = logging.getLogger("tuneyard.train")


def documents(inputs: Mapping[str, Artifact]) -> dict[str, list[dict[str, Any]]]:
    """The domain text of train and eval, which split laid beside their examples.

    Raises:
        TuneyardError: there is none.
    """
    found = {}
    for side in ("train", "eval"):
        path = inputs[side].path / DOMAIN
        if not path.exists():
            raise TuneyardError(
                f"train.first: {side} has no {DOMAIN}",
                "submit the pipeline from its start: ingest reads the domain text, split looks through it",
            )
        found[side] = list(jsonl.read(path))
    return found


def begun(folder: Path) -> dict[str, Any] | None:
    """How the first phase went, where the second one has begun; see Fit."""
    found = checkpoint.newest(folder)
    return (found[1]["state"]["first"] or None) if found else None


def ended(result: Fit) -> dict[str, Any]:
    """How a first phase went, as the second keeps it."""
    return {name: value for name, value in asdict(result).items() if name != "first"}


def _common_names(model: Any) -> dict[str, str]:
    """Name of a weight -> the name that it has in any model over the same body."""
    inside = families.body(model)
    own = {id(weight): f"body.{name}" for name, weight in inside.named_parameters()}
    outer = [name.partition("base_model.model.")[2] or name for name, _ in model.named_parameters()]
    return {
        name: own.get(id(weight), bare)
        for (name, weight), bare in zip(model.named_parameters(), outer, strict=True)
    }


def taken(model: Any) -> dict[str, Any]:
    """A copy of the weights that a phase moved, by names that the other phase's model has too."""
    names = _common_names(model)
    return {names[name]: weight for name, weight in checkpoint.copy_weights(model).items()}


def hand_over(weights: Mapping[str, Any], model: Any) -> None:
    """Put what the first phase moved into the model of the second; a head that only the first had is dropped.

    Raises:
        TuneyardError: a weight would not move on, or none of them is there.
    """
    import torch

    names = {common: name for name, common in _common_names(model).items()}
    moving, given = checkpoint.trainable(model), 0
    faults = []
    with torch.no_grad():
        for common, value in weights.items():
            weight = moving.get(names.get(common, ""))
            if weight is not None and weight.shape == value.shape:
                weight.copy_(value)
                given += 1
            elif common in names or common.startswith("body."):
                faults.append(common)
    if faults or not given:
        raise TuneyardError(
            f"train.first: of {len(weights)} tensors that the first phase moved, the task's model takes over "
            f"{given}; {len(faults)} do not move on in it: {', '.join(faults[:5])}",
            "choose another train.adapter, or train the phases as two pipelines (components/train/README.md)",
        )
    log.info("train: %d of %d tensors of the first phase are trained on", given, len(weights))


def described(
    config: TrainConfig, first: Mapping[str, Any], ledger: Ledger, inputs: Mapping[str, Artifact]
) -> DomainPhase:
    """What the model's card says of the first phase.

    Args:
        config: settings of the training.
        first: how it went.
        ledger: of the documents that were trained on.
        inputs: of the stage.
    """
    assert config.first is not None
    return DomainPhase(
        source=config.first.source,
        documents_digest=digest.of_file(inputs["train"].path / DOMAIN),
        objective=config.first.objective.kind,
        documents=sum(ledger.counts.values()),
        steps=len(first["history"]),
        base_eval_loss=first["base_loss"],
        eval_loss=first["best_loss"],
    )
