"""Train: fit a base model to the train examples, watching eval, and describe what came out."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from components.shared import drift, sources, tracking
from components.shared.modelcard import BaseModelRef, ModelCard
from components.shared.stage import Artifact, Context, Result
from components.train import (
    job,
    keeping,
    phases,
    processes,
    retention,
    runs,
    saving,
)
from components.train.beginning import Ready, examples, models_beside, ready
from components.train.config import TrainConfig
from components.train.data import Ledger
from components.train.fit import fit, judged
from components.train.objectives.base import Objective
from components.train.ongoing import Fit
from components.train.ranks import ALONE, Ranks
from components.train.search.guide import ALONE_STANDING, Guide
from components.train.search.search import search
from components.train.sharding.config import WHOLE, Sharding
from components.train.sharding.opening import open_layout
from components.train.sharding.whole import Whole
from components.train.trainjob import ASKED, Nodes

log = logging.getLogger("tuneyard.train")

# Kubeflow Pipelines sets it in each pod it starts.
_POD = "KFP_POD_NAME"


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
    others = {name: _reference(uri, context) for name, uri in models_beside(config).items()}
    return card.model_copy(update=others)


def train(config: TrainConfig, inputs: Mapping[str, Artifact], context: Context) -> Result:
    """Train in this process, in one for each GPU of this machine, or in the nodes of a TrainJob.

    TUNEYARD_TRAIN_PROCESSES and TUNEYARD_TRAIN_JOB say which.

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
    here = processes.asked_here()
    if here:
        return processes.train_in_processes(here, config, inputs, context)
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
    sharding: Sharding = WHOLE,
) -> Result:
    """Write `model` (an adapter or whole weights, with its card) and `ledger` (rows cut or dropped, history).

    Args:
        config: settings.
        inputs: `train` and `eval`.
        context: where; of a process that writes nothing, `out` stays empty and the result says nothing.
        ranks: the processes that train together.
        saved: receives the folder of each checkpoint.
        guide: of a trial of a search.
        sharding: what lies in pieces among them.

    Raises:
        Pruned: the search ended this trial.
        StageStopped: too many examples are over-long, or there are too few labels.
        TuneyardError: the loss is not finite, or other weights move than the adapter promises.
    """
    base = _reference(config.base_model, context, config.revision)
    rows, layout = examples(inputs), open_layout(sharding, ranks)
    with contextlib.ExitStack() as open_runs:
        before = None
        if config.first:
            before = _learn_domain(config, inputs, base, context, ranks, saved, open_runs)
        with layout.opening():
            made = ready(config, rows, context, guide)
        facts = made.facts(base)
        if before is None:
            ours = runs.tracked(config, context, inputs, facts, ranks, guide)
            run_id, first = open_runs.enter_context(ours), {}
        else:
            run_id, first = before.run_id, _go_on(before, made, config, layout)
            tracking.log_settings(run_id, facts)
        result = _fitted(made, config, context, run_id, layout, saved, guide=guide, first=first)
    layout.end(everything=saving.takes_base(made.objective, config))
    if not ranks.writes:
        return Result(kinds={})
    ledgers = {**(before.ledgers if before else {}), **made.ledgers}
    found = _seen(made, result, config, inputs, ledgers) | {"chosen": dict(guide.chosen)}
    card = _card(made.objective, config, base, made.weights, run_id, context).model_copy(update=found)
    saving.save(made.objective, config, card, context.out / "model")
    made.objective.leave(context.out / "ledger")
    return saving.describe(result, ledgers, card, context, run_id, made.checked, ranks.count)


def _seen(
    made: Ready,
    result: Fit,
    config: TrainConfig,
    inputs: Mapping[str, Artifact],
    ledgers: Mapping[str, Ledger],
) -> dict[str, Any]:
    """Fields of the card that the fit and its examples tell."""
    first = result.first
    return {
        "retention": retention.figures(result.history, result.best_step, result.base_retention_loss),
        "reference": drift.of_training(made.encoded["train"], made.learned),
        "first": phases.described(config, first, ledgers["first_train"], inputs) if first else None,
    }


def _fitted(
    made: Ready,
    config: TrainConfig,
    context: Context,
    run_id: str,
    layout: Whole,
    saved: Callable[[Path], None],
    prefix: str = "",
    guide: Guide = ALONE_STANDING,
    **phase: Any,
) -> Fit:
    """Fit a phase; its curve goes to MLflow, the loss of the start as step 0."""
    folder, report = context.work / "checkpoints", runs.curve(run_id, prefix, guide)
    sides = made.encoded["train"], made.encoded["eval"]
    together: dict[str, Any] = {"ranks": layout.ranks, "saved": saved, "layout": layout}
    result = fit(
        made.objective, sides[0], sides[1], config, made.precision, folder, report, **together, **phase
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
    made = ready(own, phases.documents(inputs), context)
    facts = {"base_fingerprint": base.fingerprint}
    run_id = open_runs.enter_context(runs.tracked(config, context, inputs, facts, ranks))
    ledgers = {f"first_{side}": ledger for side, ledger in made.ledgers.items()}
    if known is not None:
        return _Before(run_id, known, {}, ledgers)
    log.info("train: first phase, %s", own.objective.kind)
    result = _fitted(made, own, context, run_id, Whole(ranks), saved, prefix="first.", more=True)
    return _Before(run_id, phases.ended(result), phases.taken(made.objective.model), ledgers)


def _go_on(before: _Before, made: Ready, config: TrainConfig, layout: Whole) -> dict[str, Any]:
    """Hand over to the second phase; what the base would have lost on the task is taken down first."""
    if not before.weights:
        return before.how
    original = judged(made.objective, made.encoded["eval"], config, made.precision, layout)
    phases.hand_over(before.weights, made.objective.model)
    return {**before.how, "original": original}
