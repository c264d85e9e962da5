"""Which weights move: the adapter that a pipeline file asks for, on the model of the objective."""

from __future__ import annotations

import logging
from typing import Any

from components.shared import addons, families, nf4, window
from components.shared.addons import Addon
from components.shared.errors import TuneyardError
from components.train import checkpoint
from components.train.adapters import fused, unfreezing
from components.train.adapters.config import (
    FullAdapter,
    HoulsbyAdapter,
    Ia3Adapter,
    LastLayersAdapter,
    LowRank,
    PfeifferAdapter,
    PrefixAdapter,
    ProgressiveAdapter,
    QloraAdapter,
    SoftPrompt,
)
from components.train.config import TrainConfig
from components.train.objectives.base import Objective, stop_packing

log = logging.getLogger("tuneyard.train")

# What PEFT calls a task decides which head stays whole beside the adapter.
_PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "multi-task": "SEQ_CLS",
    "reward": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "embedding": "FEATURE_EXTRACTION",
}
# Whose new head moves whole beside the adapter, which PEFT does not know.
_HEADED = ("token-classification", "image-classification")
# Below this many weights a share says little: a tiny model's adapter is a large part of it.
_TINY_WEIGHTS = 10_000_000


def apply_adapter(objective: Objective, config: TrainConfig) -> None:
    """Set which weights move, and add those that the adapter brings.

    What an adapter adds is float32 whatever the base is stored in, since small updates vanish in bfloat16.

    Raises:
        TuneyardError: the model's family cannot take the adapter.
    """
    adapter = config.adapter
    match adapter:
        case FullAdapter():
            objective.model.float().requires_grad_(True)
        case LastLayersAdapter():
            unfreezing.last_layers(objective.model.float(), adapter)
        case ProgressiveAdapter():
            unfreezing.begin(objective.model.float())
        case LowRank() | Ia3Adapter():
            _wrap(objective, config)
        case HoulsbyAdapter() | PfeifferAdapter() | SoftPrompt():
            _attach(objective, config)


def _wrap(objective: Objective, config: TrainConfig) -> None:
    """Put PEFT's adapter around the model."""
    from peft import get_peft_model

    adapter = config.adapter
    quantise(objective, config)
    peft = _low_rank(adapter, objective) if isinstance(adapter, LowRank) else _ia3(objective)
    try:
        objective.model = get_peft_model(objective.model, peft)
    except ValueError as error:  # PEFT's word for targets that are not there
        known = sorted({name.rpartition(".")[2] for name, _ in nf4.linears(objective.model)})
        raise TuneyardError(
            f"adapter {adapter.kind}: {error}", f"set train.adapter.targets to some of {', '.join(known)}"
        ) from error
    for name, weight in objective.model.named_parameters():
        if name.endswith(objective.own_weights):
            weight.requires_grad_(True)
    for weight in checkpoint.trainable(objective.model).values():
        weight.data = weight.data.float()
    fused.use(objective.model)
    # A path of this machine has no place in the artifact; the base is named as the pipeline file names it.
    objective.model.peft_config["default"].base_model_name_or_path = config.base_model


def quantise(objective: Objective, config: TrainConfig) -> None:
    """Hold the base in NF4 where its adapter is trained on such a one; what is quantised stays as it is.

    Whatever an objective asks of its base (the likelihoods of dpo) must be asked after this.

    Raises:
        TuneyardError: the model has no layers for it.
    """
    model = objective.model
    if not isinstance(config.adapter, QloraAdapter) or nf4.held(model):
        return
    before = sum(module.weight.nbytes for _, module in nf4.linears(model))
    if not before:
        raise TuneyardError(f"{type(model).__name__} has no linear layers to quantise", "use adapter lora")
    nf4.quantise(model)
    log.info(
        "train: layers held in NF4, %.1f MB in place of %.1f MB", nf4.held_bytes(model) / 1e6, before / 1e6
    )


def _low_rank(adapter: LowRank, objective: Objective) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        # PEFT leaves a new head out by itself only where it labels whole texts.
        exclude_modules=["classifier", "score"] if objective.task in _HEADED else None,
        task_type=_PEFT_TASKS.get(objective.task),
    )


def _ia3(objective: Objective) -> Any:
    """Keys, values and the input of the feed-forward's last product, in every layer.

    The modules are named here: PEFT's own table has the queries in place of the keys for some families.
    """
    from peft import IA3Config

    keyed: list[str] = []
    inner: list[str] = []
    for name, layer in families.layers(objective.model).items():
        for patterns, found in (
            (families.KEYS, keyed),
            (families.VALUES, keyed),
            (families.FEED_FORWARD_OUT, inner),
        ):
            paths = families.parts(layer, patterns)
            if not paths:
                raise TuneyardError(
                    f"adapter ia3: {name} of {type(objective.model).__name__} has no part like "
                    f"{', '.join(p.lstrip('.') for p in patterns)}",
                    "use lora or last_layers on this family",
                )
            found += [f"{name}.{path}" for path in paths]
    return IA3Config(
        target_modules=[*keyed, *inner],
        feedforward_modules=inner,
        task_type=_PEFT_TASKS.get(objective.task),
    )


def addon_of(config: TrainConfig) -> Addon:
    """What an adapter builds beside its base."""
    adapter = config.adapter
    assert isinstance(adapter, HoulsbyAdapter | PfeifferAdapter | SoftPrompt)
    size = adapter.tokens if isinstance(adapter, SoftPrompt) else adapter.size
    return Addon.model_validate(
        {"kind": adapter.kind, "size": size, "moves_base": isinstance(adapter, HoulsbyAdapter)}
    )


def _attach(objective: Objective, config: TrainConfig) -> None:
    """Build bottlenecks or a soft prompt into the model, and let them and a new head alone move."""
    adapter, model = config.adapter, objective.model
    if isinstance(adapter, SoftPrompt):
        stop_packing(model, config.max_length)
        places = window.learned(model)
        if places is not None and adapter.tokens + config.max_length > places:
            raise TuneyardError(
                f"{adapter.tokens} virtual tokens and examples of {config.max_length} need more than the "
                f"{places} positions of {type(model).__name__}",
                f"set train.max_length to {places - adapter.tokens} or less",
            )
    projection = adapter.projection if isinstance(adapter, PrefixAdapter) else 0
    moving = set(addons.attach(model, addon_of(config), projection))
    moving |= _heads(objective, adapter)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in moving or addons.own(name))
        if weight.requires_grad:
            weight.data = weight.data.float()


def _new_head(objective: Objective) -> list[str]:
    """Weights that the task added to the base; a causal model's head came with it."""
    return [] if objective.task == "causal-lm" else families.head(objective.model)


def weight_counts(objective: Objective, config: TrainConfig, steps: int) -> tuple[int, int]:
    """(trainable, all) weights, after asserting that what the adapter promises is what moves.

    Args:
        objective: with the adapter applied.
        config: settings.
        steps: optimizer updates of the run.

    Raises:
        TuneyardError: other weights would move, or more than the adapter's kind is good for.
    """
    adapter, model = config.adapter, objective.model
    if isinstance(adapter, ProgressiveAdapter):
        unfreezing.settle(model, adapter, steps)
    weights = checkpoint.trainable(model)
    moving = sum(weight.numel() for weight in weights.values())
    total = sum(weight.numel() for weight in model.parameters()) + nf4.held(model)
    if isinstance(adapter, FullAdapter) and moving != total:
        raise TuneyardError(
            f"full fine-tuning would move {moving:,} of {total:,} weights", "report this model class"
        )
    heads = _heads(objective, adapter)
    if adapter.most < 1:
        foreign = [name for name in weights if name not in heads and not _promised(name, adapter)]
        if foreign or not weights:
            raise TuneyardError(
                f"adapter {adapter.kind} would move {len(weights)} tensors, {len(foreign)} of them the "
                f"base's own: {foreign[:5]}",
                "set train.adapter: {kind: full} if that is meant",
            )
        added = sum(weight.numel() for name, weight in weights.items() if name not in heads)
        _insist_small(added, total, adapter)
    elif not weights:
        raise TuneyardError(f"adapter {adapter.kind} would move nothing", "see train.adapter")
    log.info("train: adapter %s moves %.3f%% of the weights", adapter.kind, 100 * moving / total)
    return moving, total


def _heads(objective: Objective, adapter: Any) -> set[str]:
    """Names of a new head's weights and the objective's own, which move whole beside any adapter."""
    names = [name for name, _ in objective.model.named_parameters()]
    own = {name for name in names if name.endswith(objective.own_weights)}
    if isinstance(adapter, LowRank | Ia3Adapter):
        return own | {name for name in names if ".modules_to_save." in name}
    return own | set(_new_head(objective))


def _promised(name: str, adapter: Any) -> bool:
    """Whether a weight of that name is one of the adapter's."""
    if isinstance(adapter, LowRank):
        return ".lora_" in name
    if isinstance(adapter, Ia3Adapter):
        return ".ia3_" in name
    return addons.own(name) or (isinstance(adapter, HoulsbyAdapter) and "norm" in name.lower())


def _insist_small(added: int, total: int, adapter: Any) -> None:
    """Hold an adapter to the share of weights that its kind is good for.

    Raises:
        TuneyardError: it is larger, and the model is none of the tiny ones where that says nothing.
    """
    if added <= adapter.most * total:
        return
    share, most = f"{added / total:.1%}", f"{adapter.most:.0%}"
    said = f"adapter {adapter.kind} moves {share} of the weights, it is meant for at most {most}"
    if total >= _TINY_WEIGHTS:
        smaller = next(n for n in ("rank", "size", "projection", "tokens", "kind") if hasattr(adapter, n))
        raise TuneyardError(said, f"lower train.adapter.{smaller}, or use adapter full")
    log.warning("train: %s; this model is small", said)
