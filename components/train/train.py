"""Train: fit a base model to the train examples, watching eval, and describe what came out."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from components.shared import drift, jsonl, sources, tracking
from components.shared.errors import StageStopped
from components.shared.modelcard import BaseModelRef, ModelCard
from components.shared.stage import Artifact, Context, Result
from components.train import checkpoint, holding, job, keeping, processes, retention, saving, selfcheck
from components.train.adapters.applying import apply_adapter, weight_counts
from components.train.config import TrainConfig
from components.train.data import Ledger, fit_lengths, total_steps
from components.train.fit import Fit, fit
from components.train.objectives.base import Objective
from components.train.objectives.config import PpoObjective
from components.train.objectives.opening import computed_in, open_objective
from components.train.ranks import ALONE, Ranks
from components.train.sharding.config import WHOLE, Sharding
from components.train.sharding.opening import open_layout
from components.train.trainjob import ASKED, Nodes
from components.train.update import autocast

log = logging.getLogger("tuneyard.train")

# Kubeflow Pipelines sets it in each pod it starts.
_POD = "KFP_POD_NAME"

_REPORT_SECONDS = 15.0


def _rows(artifact: Artifact) -> list[dict[str, Any]]:
    return list(jsonl.read(artifact.path / "examples.jsonl"))


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
    judging = config.objective.reward_model if isinstance(config.objective, PpoObjective) else None
    reward_folder = sources.model_folder(judging, context.store) if judging else None
    return open_objective(config, train, folder, reward_folder)


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
    """The card of the trained model, with what judged its answers."""
    card = saving.card(objective, config, base, weights, run_id)
    if not isinstance(config.objective, PpoObjective):
        return card
    return card.model_copy(update={"reward_model": _reference(config.objective.reward_model, context)})


def _adapt(objective: Objective, config: TrainConfig) -> None:
    """Put the adapter on."""
    apply_adapter(objective, config)
    if config.gradient_checkpointing:
        objective.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if hasattr(objective.model, "enable_input_require_grads"):
            objective.model.enable_input_require_grads()


def _track(
    config: TrainConfig, context: Context, inputs: Mapping[str, Artifact], facts: dict[str, Any]
) -> str:
    settings = {k: v for k, v in config.model_dump(mode="json").items() if not isinstance(v, dict)}
    for axis in ("objective", "adapter"):
        settings |= {f"{axis}.{k}": v for k, v in getattr(config, axis).model_dump(mode="json").items()}
    digests = {f"digest.{name}": artifact.manifest.digest for name, artifact in inputs.items()}
    tags = {"tuneyard.run": context.run, "tuneyard.key": context.key} | digests
    return tracking.start_run(context.pipeline, context.run, settings | facts, tags)


def _fit_tracked(
    fitting: Callable[..., Fit],
    sides: Mapping[str, list[Any]],
    config: TrainConfig,
    context: Context,
    run_id: str,
) -> Fit:
    """Fit with curves and system metrics in MLflow; the MLflow run says how it ended."""
    logged, sent = 0, time.monotonic()

    def report(history: list[dict[str, float]], ended: bool) -> None:
        # MLflow keeps a point that it is sent twice, with its own time, once: a resumed run may repeat some.
        nonlocal logged, sent
        if ended or time.monotonic() - sent > _REPORT_SECONDS:
            tracking.log_history(run_id, history[logged:])
            logged, sent = len(history), time.monotonic()

    ended: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        with tracking.system_metrics(run_id):
            folder = context.work / "checkpoints"
            result = fitting(sides["train"], sides["eval"], config, folder=folder, report=report)
        tracking.log_metrics(run_id, {"eval_loss": result.base_loss})  # as step 0 of the curve
        ended = "FINISHED"
    except KeyboardInterrupt:
        ended = "KILLED"
        raise
    finally:
        tracking.end_run(run_id, ended)
    return result


def _resumed_run(context: Context) -> str:
    """The MLflow run of an attempt that was cut off, so that its curve goes on; empty for none."""
    note = context.work / "mlflow_run"
    return note.read_text() if note.exists() and checkpoint.newest(context.work / "checkpoints") else ""


def _run_of(
    config: TrainConfig,
    context: Context,
    inputs: Mapping[str, Artifact],
    weights: tuple[int, int],
    base: BaseModelRef,
) -> str:
    """The MLflow run of this training, noted where a later attempt finds it."""
    counts = dict(zip(("trainable_weights", "total_weights"), weights, strict=True))
    facts = {**counts, "base_fingerprint": base.fingerprint}
    run_id = _resumed_run(context) or _track(config, context, inputs, facts)
    context.work.mkdir(parents=True, exist_ok=True)
    (context.work / "mlflow_run").write_text(run_id)
    return run_id


def _judged(
    objective: Objective, rows: Sequence[dict[str, Any]], config: TrainConfig
) -> list[dict[str, Any]]:
    """The rows of eval that are judged."""
    return sorted(objective.usable(rows), key=lambda row: row["id"])[: config.eval_examples]


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
    sharding: Sharding = WHOLE,
) -> Result:
    """Write `model` (an adapter or whole weights, with its card) and `ledger` (rows cut or dropped, history).

    Args:
        config: settings.
        inputs: `train` and `eval`.
        context: where; of a process that writes nothing, `out` stays empty and the result says nothing.
        ranks: the processes that train together.
        saved: receives the folder of each checkpoint.
        sharding: what lies in pieces among them.

    Raises:
        StageStopped: too many examples are over-long, or there are too few labels.
        TuneyardError: the loss is not finite, or other weights move than the adapter promises.
    """
    _seed(config.seed)
    layout = open_layout(sharding, ranks)
    rows = {side: _rows(inputs[side]) for side in ("train", "eval")}
    precision = computed_in(config)
    with layout.opening():
        objective = _open(config, rows["train"], context)
        rows["eval"] = _judged(objective, rows["eval"], config)
        encoded, ledgers = _encode(objective, rows, config)
        objective.prepare([*encoded["train"], *encoded["eval"]], partial(autocast, precision))
        _adapt(objective, config)
        moving, total = weight_counts(objective, config, total_steps(len(encoded["train"]), config))
        objective.start()
        checked = selfcheck.check(objective, encoded["train"], rows["train"], precision)
        holding.begin(objective, config, context.store, partial(autocast, precision))
    base = _reference(config.base_model, context, config.revision)
    run_id = _run_of(config, context, inputs, (moving, total), base) if ranks.writes else ""
    log.info("train: %d examples, %d of %d weights move", len(encoded["train"]), moving, total)
    fitting = partial(fit, objective, precision=precision, ranks=layout.ranks, saved=saved, layout=layout)
    result = _fit_tracked(fitting, encoded, config, context, run_id)
    layout.end(everything=saving.takes_base(objective, config))
    if not ranks.writes:
        return Result(kinds={})
    card = _card(objective, config, base, (moving, total), run_id, context)
    kept = retention.figures(result.history, result.best_step, result.base_retention_loss)
    reference = drift.of_training(encoded["train"], rows["train"])
    card = card.model_copy(update={"retention": kept, "reference": reference})
    saving.save(objective, config, card, context.out / "model")
    return saving.describe(result, ledgers, card, context, run_id, checked)


def _encode(
    objective: Objective, rows: Mapping[str, list[dict[str, Any]]], config: TrainConfig
) -> tuple[dict[str, list[Any]], dict[str, Ledger]]:
    """Each side as token ids under the over-length policy, and its ledger."""
    encoded, ledgers = {}, {}
    for side, examples in rows.items():
        encoded[side], ledgers[side] = fit_lengths(
            examples, objective.encode, objective.shorten, config, objective.pieces
        )
        ledgers[side].parts = objective.account(examples, encoded[side])
        if not encoded[side]:
            todo = "see train.max_length and train.over_length"
            raise StageStopped(f"no example of {side} is left to use", todo)
    return encoded, ledgers
