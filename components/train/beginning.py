"""What a training does before its first update: data, base, adapter, self-check."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from components.shared import causal, clock, media, sources
from components.shared.modelcard import BaseModelRef
from components.shared.stage import Artifact, Context
from components.train import holding, selfcheck, tokens
from components.train.adapters.applying import apply_adapter, weight_counts
from components.train.config import TrainConfig
from components.train.data import Ledger, refuse_beyond, total_steps
from components.train.objectives.base import Objective
from components.train.objectives.opening import computed_in, open_objective
from components.train.search.guide import ALONE_STANDING, Guide
from components.train.update import autocast

log = logging.getLogger("tuneyard.train")

Rows = dict[str, list[dict[str, Any]]]


def _rows(artifact: Artifact) -> list[dict[str, Any]]:
    return list(media.read(artifact.path))


def examples(inputs: Mapping[str, Artifact]) -> Rows:
    """The examples of train and eval."""
    return {side: _rows(inputs[side]) for side in ("train", "eval")}


def _seed(seed: int) -> None:
    """Seed everything; choose few kernels on a CPU, and on a GPU reproducible ones over the fastest."""
    import numpy
    import torch

    clock.keep_few_kernels()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def models_beside(config: TrainConfig) -> dict[str, str]:
    """URIs of the models that the objective learns from, by their field of the card."""
    named = {name: getattr(config.objective, name, None) for name in ("reward_model", "teacher")}
    return {name: uri for name, uri in named.items() if uri}


def open_for(config: TrainConfig, train: Sequence[Mapping[str, Any]], context: Context) -> Objective:
    """The base model with its objective."""
    folder = sources.model_folder(config.base_model, context.store, config.revision)
    others = {name: sources.model_folder(uri, context.store) for name, uri in models_beside(config).items()}
    return open_objective(config, train, folder, others.get("reward_model"), others.get("teacher"))


def opened(
    config: TrainConfig, rows: Rows, context: Context, guide: Guide = ALONE_STANDING
) -> tuple[Objective, Mapping[str, Sequence[Any]], dict[str, Sequence[Any]], dict[str, Ledger]]:
    """The objective over its base with everything seeded, and each side as text, token ids and ledger."""
    _seed(config.seed)
    objective = open_for(config, rows["train"], context)
    watched = sorted(objective.usable(rows["eval"]), key=lambda row: row["id"])
    rows = {**rows, "eval": watched[: config.eval_examples]}
    learned, unused = objective.rewritten(rows, context.work / "rewritten")
    folder = sources.model_folder(config.base_model, context.store, config.revision)
    cache: Path | None = getattr(context.store, "cache", None)  # without one, each run tokenises
    encoded, ledgers = tokens.encoded(objective, learned, config, folder, cache, guide.longest_judged)
    for side in encoded.values():
        refuse_beyond(objective.window_tokens, objective.longest_tokens(side))
    for side, left_out in unused.items():
        ledgers[side].leave_out(left_out)
    return objective, learned, encoded, ledgers


def adapt(objective: Objective, config: TrainConfig) -> None:
    """Put the adapter on."""
    apply_adapter(objective, config)
    if config.gradient_checkpointing:
        objective.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if hasattr(objective.model, "enable_input_require_grads"):
            objective.model.enable_input_require_grads()


@dataclass(frozen=True)
class Ready:
    """An objective whose adapter is on and which passed the self-check, and the examples it encoded.

    `learned` are those of train as text, as the objective learns them.
    """

    objective: Objective
    learned: Sequence[Mapping[str, Any]]
    encoded: dict[str, Sequence[Any]]
    ledgers: dict[str, Ledger]
    weights: tuple[int, int]
    checked: dict[str, float]
    precision: causal.Precision

    def facts(self, base: BaseModelRef) -> dict[str, Any]:
        """What its MLflow run says beside the settings."""
        moving, total = self.weights
        return {
            "trainable_weights": moving,
            "total_weights": total,
            "base_fingerprint": base.fingerprint,
        }


def ready(config: TrainConfig, rows: Rows, context: Context, guide: Guide = ALONE_STANDING) -> Ready:
    """Everything before the first update of a phase: the same whenever it is done again."""
    objective, learned, encoded, ledgers = opened(config, rows, context, guide)
    precision = computed_in(config)
    objective.prepare([*encoded["train"], *encoded["eval"]], partial(autocast, precision))
    adapt(objective, config)
    weights = weight_counts(objective, config, total_steps(len(encoded["train"]), config))
    objective.start()
    checked = selfcheck.check(objective, encoded["train"], learned["train"], precision)
    holding.begin(objective, config, context.store, partial(autocast, precision))
    log.info("train: %d examples, %d of %d weights move", len(encoded["train"]), *weights)
    return Ready(objective, learned["train"], encoded, ledgers, weights, checked, precision)
