"""Train: fit a base model to the train examples, watching eval, and describe what came out."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from components.shared import causal, drift, media, sources, tracking
from components.shared.modelcard import BaseModelRef, ModelCard
from components.shared.stage import Artifact, Context, Result
from components.train import holding, job, keeping, phases, retention, runs, saving, selfcheck, tokens
from components.train.adapters.applying import apply_adapter, weight_counts
from components.train.config import TrainConfig
from components.train.data import Ledger, total_steps
from components.train.fit import fit, judged
from components.train.objectives.base import Objective
from components.train.objectives.opening import computed_in, open_objective
from components.train.ongoing import Fit
from components.train.ranks import ALONE, Ranks
from components.train.search.guide import ALONE_STANDING, Guide
from components.train.search.search import search
from components.train.trainjob import ASKED, Nodes
from components.train.update import autocast

log = logging.getLogger("tuneyard.train")

# Kubeflow Pipelines sets it in each pod it starts.
_POD = "KFP_POD_NAME"


_Rows = dict[str, list[dict[str, Any]]]


def _rows(artifact: Artifact) -> list[dict[str, Any]]:
    return list(media.read(artifact.path))


def _seed(seed: int) -> None:
    """Seed everything; on a GPU, choose reproducible kernels over the fastest ones."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _open(config: TrainConfig, train: Sequence[Mapping[str, Any]], context: Context) -> Objective:
    """The base model with its objective."""
    folder = sources.model_folder(config.base_model, context.store, config.revision)
    others = {name: sources.model_folder(uri, context.store) for name, uri in _others(config).items()}
    return open_objective(config, train, folder, others.get("reward_model"), others.get("teacher"))


def _others(config: TrainConfig) -> dict[str, str]:
    """URIs of the models that the objective learns from, by their field of the card."""
    named = {name: getattr(config.objective, name, None) for name in ("reward_model", "teacher")}
    return {name: uri for name, uri in named.items() if uri}


def _reference(uri: str, context: Context, revision: str = "main") -> BaseModelRef:
    """What a URI names now."""
    found = sources.fingerprint(uri, context.store, "model", revision)
    return BaseModelRef(uri=uri, fingerprint=found, revision=revision)


def _card(
    objective: Objective,
    config: TrainConfig,
    base: BaseModelRef,
    weights: tuple[int, int],
    run_id: str,
    context: Context,
) -> ModelCard:
    """The card of the trained model, with what judged its answers or taught it."""
    card = saving.card(objective, config, base, weights, run_id)
    others = {name: _reference(uri, context) for name, uri in _others(config).items()}
    return card.model_copy(update=others)


def _adapt(objective: Objective, config: TrainConfig) -> None:
    """Put the adapter on."""
    apply_adapter(objective, config)
    if config.gradient_checkpointing:
        objective.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if hasattr(objective.model, "enable_input_require_grads"):
            objective.model.enable_input_require_grads()


def train(config: TrainConfig, inputs: Mapping[str, Artifact], context: Context) -> Result:
    """Train in this process, or where TUNEYARD_TRAIN_JOB says so in the nodes of a TrainJob.

    In a pod of Kubeflow Pipelines checkpoints also go to the store: an attempt's disk goes with its pod.

    Raises:
        StageStopped: as `train_here`.
        TuneyardError: as `train_here`, or the job failed.
    """
    asked = os.environ.get(ASKED)
    if asked:
        return job.train_as_job(Nodes.model_validate_json(asked), config, inputs, context)
    if config.search:
        return search(config, config.search, inputs, context, partial(runs.begin, config, context, inputs))
    if not os.environ.get(_POD):
        return train_here(config, inputs, context)
    keeping.resume(context, ALONE)
    saved = partial(keeping.keep, context=context, checkpoints=config.keep_checkpoints)
    return train_here(config, inputs, context, saved=saved)


def train_here(
    config: TrainConfig,
    inputs: Mapping[str, Artifact],
    context: Context,
    ranks: Ranks = ALONE,
    saved: Callable[[Path], None] = lambda _: None,
    guide: Guide = ALONE_STANDING,
) -> Result:
    """Write `model` (an adapter or whole weights, with its card) and `ledger` (rows cut or dropped, history).

    Args:
        config: settings.
        inputs: `train` and `eval`.
        context: where; of a process that writes nothing, `out` stays empty and the result says nothing.
        ranks: the processes that train together.
        saved: receives the folder of each checkpoint.
        guide: of a trial of a search.

    Raises:
        Pruned: the search ended this trial.
        StageStopped: too many examples are over-long, or there are too few labels.
        TuneyardError: the loss is not finite, or other weights move than the adapter promises.
    """
    base = _reference(config.base_model, context, config.revision)
    rows = examples(inputs)
    with contextlib.ExitStack() as open_runs:
        before = None
        if config.first:
            before = _learn_domain(config, inputs, base, context, ranks, saved, open_runs)
        made = _ready(config, rows, context, guide)
        facts: dict[str, Any] = {"trainable_weights": made.weights[0], "total_weights": made.weights[1]}
        facts["base_fingerprint"] = base.fingerprint
        if before is None:
            ours = runs.tracked(config, context, inputs, facts, ranks, guide)
            run_id, first = open_runs.enter_context(ours), {}
        else:
            run_id, first = before.run_id, _go_on(before, made, config, ranks)
            tracking.log_settings(run_id, facts)
        result = _fitted(made, config, context, run_id, ranks, saved, guide=guide, first=first)
    if not ranks.writes:
        return Result(kinds={})
    ledgers = {**(before.ledgers if before else {}), **made.ledgers}
    kept = retention.figures(result.history, result.best_step, result.base_retention_loss)
    reference = drift.of_training(made.encoded["train"], made.learned)
    learnt = phases.described(config, first, ledgers["first_train"], inputs) if first else None
    found = {"retention": kept, "reference": reference, "first": learnt, "chosen": dict(guide.chosen)}
    card = _card(made.objective, config, base, made.weights, run_id, context).model_copy(update=found)
    saving.save(made.objective, config, card, context.out / "model")
    made.objective.leave(context.out / "ledger")
    return saving.describe(result, ledgers, card, context, run_id, made.checked)


@dataclass(frozen=True)
class _Ready:
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


def examples(inputs: Mapping[str, Artifact]) -> _Rows:
    """The examples of train and eval."""
    return {side: _rows(inputs[side]) for side in ("train", "eval")}


def opened(
    config: TrainConfig, rows: _Rows, context: Context, guide: Guide = ALONE_STANDING
) -> tuple[Objective, Mapping[str, Sequence[Any]], dict[str, Sequence[Any]], dict[str, Ledger]]:
    """The objective over its base with everything seeded, and each side as text, token ids and ledger."""
    _seed(config.seed)
    objective = _open(config, rows["train"], context)
    watched = sorted(objective.usable(rows["eval"]), key=lambda row: row["id"])
    rows = {**rows, "eval": watched[: config.eval_examples]}
    learned, unused = objective.rewritten(rows, context.work / "rewritten")
    folder = sources.model_folder(config.base_model, context.store, config.revision)
    cache: Path | None = getattr(context.store, "cache", None)  # without one, each run tokenises
    encoded, ledgers = tokens.encoded(objective, learned, config, folder, cache, guide.longest_judged)
    for side, left_out in unused.items():
        ledgers[side].leave_out(left_out)
    return objective, learned, encoded, ledgers


def _ready(config: TrainConfig, rows: _Rows, context: Context, guide: Guide = ALONE_STANDING) -> _Ready:
    """Everything before the first update of a phase: the same whenever it is done again."""
    objective, learned, encoded, ledgers = opened(config, rows, context, guide)
    precision = computed_in(config)
    objective.prepare([*encoded["train"], *encoded["eval"]], partial(autocast, precision))
    _adapt(objective, config)
    weights = weight_counts(objective, config, total_steps(len(encoded["train"]), config))
    objective.start()
    checked = selfcheck.check(objective, encoded["train"], learned["train"], precision)
    holding.begin(objective, config, context.store, partial(autocast, precision))
    log.info("train: %d examples, %d of %d weights move", len(encoded["train"]), *weights)
    return _Ready(objective, learned["train"], encoded, ledgers, weights, checked, precision)


def _fitted(
    made: _Ready,
    config: TrainConfig,
    context: Context,
    run_id: str,
    ranks: Ranks,
    saved: Callable[[Path], None],
    prefix: str = "",
    guide: Guide = ALONE_STANDING,
    **phase: Any,
) -> Fit:
    """Fit a phase; its curve goes to MLflow, the loss of the start as step 0."""
    folder, report = context.work / "checkpoints", runs.curve(run_id, prefix, guide)
    sides = made.encoded["train"], made.encoded["eval"]
    result = fit(
        made.objective, *sides, config, made.precision, folder, report, ranks=ranks, saved=saved, **phase
    )
    tracking.log_metrics(run_id, {f"{prefix}eval_loss": result.base_loss})
    return result


@dataclass(frozen=True)
class _Before:
    """A first phase that has ended: how it went, and the weights it moved, which the second takes over.

    Where the second has begun there are none: its checkpoint has them.
    """

    run_id: str
    how: dict[str, Any]
    weights: dict[str, Any]
    ledgers: dict[str, Ledger]


def _learn_domain(
    config: TrainConfig,
    inputs: Mapping[str, Artifact],
    base: BaseModelRef,
    context: Context,
    ranks: Ranks,
    saved: Callable[[Path], None],
    open_runs: contextlib.ExitStack,
) -> _Before:
    """The first phase, done or, by the newest checkpoint, found done."""
    known, own = phases.begun(context.work / "checkpoints"), config.first_phase()
    made = _ready(own, phases.documents(inputs), context)
    facts = {"base_fingerprint": base.fingerprint}
    run_id = open_runs.enter_context(runs.tracked(config, context, inputs, facts, ranks))
    ledgers = {f"first_{side}": ledger for side, ledger in made.ledgers.items()}
    if known is not None:
        return _Before(run_id, known, {}, ledgers)
    log.info("train: first phase, %s", own.objective.kind)
    result = _fitted(made, own, context, run_id, ranks, saved, prefix="first.", more=True)
    return _Before(run_id, phases.ended(result), phases.taken(made.objective.model), ledgers)


def _go_on(before: _Before, made: _Ready, config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Hand over to the second phase; what the base would have lost on the task is taken down first."""
    if not before.weights:
        return before.how
    original = judged(made.objective, made.encoded["eval"], config, made.precision, ranks)
    phases.hand_over(before.weights, made.objective.model)
    return {**before.how, "original": original}
