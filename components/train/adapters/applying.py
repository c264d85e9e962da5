"""Which weights move: the adapter that a pipeline file asks for, on the model of the objective."""

from __future__ import annotations

import logging

from components.shared.errors import TuneyardError
from components.train import checkpoint
from components.train.adapters import fused
from components.train.config import TrainConfig
from components.train.objectives.base import Objective

log = logging.getLogger("tuneyard.train")

# What PEFT calls a task decides which head stays whole beside the adapter.
_PEFT_TASKS = {"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS", "reward": "SEQ_CLS"}


def apply_adapter(objective: Objective, config: TrainConfig) -> None:
    """Set which weights move; for LoRA, add the adapter to every linear layer of the body.

    The adapter is float32 whatever the base is stored in, since small updates vanish in bfloat16.
    """
    if config.adapter.kind == "full":
        objective.model.float().requires_grad_(True)
        return
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.adapter.rank,
        lora_alpha=config.adapter.alpha,
        lora_dropout=config.adapter.dropout,
        target_modules="all-linear",
        task_type=_PEFT_TASKS.get(objective.task),
    )
    objective.model = get_peft_model(objective.model, lora)
    fused.use(objective.model)
    # A path of this machine has no place in the artifact; the base is named as the pipeline file names it.
    objective.model.peft_config["default"].base_model_name_or_path = config.base_model


def weight_counts(objective: Objective, config: TrainConfig) -> tuple[int, int]:
    """(trainable, all) weights, after asserting that what the adapter promises is what moves.

    Raises:
        TuneyardError: LoRA would train more than a tenth of the weights, or full fine-tuning not all.
    """
    weights = checkpoint.trainable(objective.model)
    moving = sum(weight.numel() for weight in weights.values())
    total = sum(weight.numel() for weight in objective.model.parameters())
    if config.adapter.kind == "full" and moving != total:
        raise TuneyardError(
            f"full fine-tuning would move {moving:,} of {total:,} weights", "report this model class"
        )
    if config.adapter.kind == "lora":
        # A classifier's head is new, so it moves whole beside the adapter.
        foreign = [name for name in weights if "lora_" not in name and "modules_to_save" not in name]
        if foreign or not weights:
            raise TuneyardError(
                f"LoRA would move {len(weights)} tensors, {len(foreign)} the base's own: {foreign[:5]}",
                "set train.adapter: {kind: full} if that is meant",
            )
        if moving > total // 10:
            log.warning(
                "train: LoRA of rank %d moves %.0f%% of this small model",
                config.adapter.rank,
                100 * moving / total,
            )
    return moving, total
