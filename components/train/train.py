"""Train: fit a base model to the train examples, watching eval, and describe what came out."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from components.shared import causal, jsonl, sources, tracking
from components.shared.errors import StageStopped, TuneyardError
from components.shared.modelcard import BaseModelRef, ModelCard
from components.shared.stage import Artifact, Context, Result
from components.train import checkpoint, curves, job, keeping
from components.train.config import TrainConfig
from components.train.data import Ledger, fit_lengths
from components.train.fit import Fit, fit
from components.train.objectives import (
    Classification,
    Objective,
    Sft,
    apply_adapter,
    choose_attention,
    template_probe,
    weight_counts,
)
from components.train.ranks import ALONE, Ranks
from components.train.trainjob import ASKED, Nodes

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
    """The base model with its objective and adapter.

    Raises:
        StageStopped: a classification corpus with fewer than two labels.
    """
    folder = sources.model_folder(config.base_model, context.store, config.revision)
    if config.objective == "sft":
        precision = causal.preferred_precision(config.precision)
        held = precision if config.adapter.kind == "lora" else "float32"
        objective: Objective = Sft(folder, held, config.dropout)
    else:
        labels = sorted({row["label"] for row in train})
        if len(labels) < 2:
            raise StageStopped(
                f"classification needs two labels or more; train has {labels}", "check ingest.columns"
            )
        objective = Classification(folder, labels, config.dropout)
    choose_attention(objective.model, config.max_length)
    apply_adapter(objective, config)
    if config.gradient_checkpointing:
        objective.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if hasattr(objective.model, "enable_input_require_grads"):
            objective.model.enable_input_require_grads()
    return objective


def _known_labels(rows: Sequence[dict[str, Any]], objective: Objective) -> list[dict[str, Any]]:
    """Rows of eval whose label train has; another label cannot be scored and is named."""
    if not isinstance(objective, Classification):
        return list(rows)
    unknown = sorted({row["label"] for row in rows} - set(objective.labels))
    if unknown:
        log.warning("train: labels %s occur in eval and not in train; those examples are not judged", unknown)
    return [row for row in rows if row["label"] in objective.labels]


def _save(objective: Objective, config: TrainConfig, card: ModelCard, context: Context) -> None:
    """Write the model folder: an adapter for a causal LoRA, else whole weights."""
    folder = context.out / "model"
    model = objective.model
    if card.task == "classification" and config.adapter.kind == "lora":
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    # PEFT writes a page of empty headings.
    (folder / "README.md").unlink(missing_ok=True)
    objective.tokenizer.save_pretrained(folder)
    card.write(folder)


def _track(
    config: TrainConfig, context: Context, inputs: Mapping[str, Artifact], facts: dict[str, Any]
) -> str:
    settings = {k: v for k, v in config.model_dump(mode="json").items() if not isinstance(v, dict)}
    settings |= {f"adapter.{k}": v for k, v in config.adapter.model_dump().items()}
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
            precision = causal.preferred_precision(config.precision)
            folder = context.work / "checkpoints"
            result = fitting(sides["train"], sides["eval"], config, precision, folder, report)
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
) -> Result:
    """Write `model` (an adapter or whole weights, with its card) and `ledger` (rows cut or dropped, history).

    Args:
        config: settings.
        inputs: `train` and `eval`.
        context: where; of a process that writes nothing, `out` stays empty and the result says nothing.
        ranks: the processes that train together.
        saved: receives the folder of each checkpoint.

    Raises:
        StageStopped: too many examples are over-long, or there are too few labels.
        TuneyardError: the loss is not finite, or other weights move than the adapter promises.
    """
    _seed(config.seed)
    rows = {side: _rows(inputs[side]) for side in ("train", "eval")}
    objective = _open(config, rows["train"], context)
    judged = sorted(_known_labels(rows["eval"], objective), key=lambda row: row["id"])
    rows["eval"] = judged[: config.eval_examples]
    encoded, ledgers = _encode(objective, rows, config)
    moving, total = weight_counts(objective, config)
    base = BaseModelRef(
        uri=config.base_model,
        fingerprint=sources.fingerprint(config.base_model, context.store, "model", config.revision),
        revision=config.revision,
    )
    facts = {"trainable_weights": moving, "total_weights": total, "base_fingerprint": base.fingerprint}
    run_id = ""
    if ranks.writes:
        run_id = _resumed_run(context) or _track(config, context, inputs, facts)
    context.work.mkdir(parents=True, exist_ok=True)
    (context.work / "mlflow_run").write_text(run_id)
    log.info("train: %d examples, %d of %d weights move", len(encoded["train"]), moving, total)
    fitting = partial(fit, objective, ranks=ranks, saved=saved)
    result = _fit_tracked(fitting, encoded, config, context, run_id)
    if not ranks.writes:
        return Result(kinds={})
    card = _card(objective, config, base, (moving, total), run_id)
    _save(objective, config, card, context)
    return _describe(result, ledgers, card, context, run_id)


def _card(
    objective: Objective, config: TrainConfig, base: BaseModelRef, weights: tuple[int, int], run_id: str
) -> ModelCard:
    whole = config.adapter.kind == "full" or config.objective == "classification"
    return ModelCard(
        task="causal-lm" if config.objective == "sft" else "classification",
        layout="transformers" if whole else "peft",
        base_model=base,
        labels=list(objective.labels) if isinstance(objective, Classification) else [],
        max_length_tokens=config.max_length,
        template_probe=template_probe(objective, config),
        trainable_weights=weights[0],
        total_weights=weights[1],
        mlflow_run=run_id,
    )


def _encode(
    objective: Objective, rows: Mapping[str, list[dict[str, Any]]], config: TrainConfig
) -> tuple[dict[str, list[Any]], dict[str, Ledger]]:
    """Each side as token ids under the over-length policy, and its ledger."""
    encoded, ledgers = {}, {}
    for side, examples in rows.items():
        encoded[side], ledgers[side] = fit_lengths(examples, objective.encode, objective.shorten, config)
        if not encoded[side]:
            todo = "see train.max_length and train.over_length"
            raise StageStopped(f"no example of {side} is left to use", todo)
    return encoded, ledgers


def _describe(
    result: Fit, ledgers: Mapping[str, Ledger], card: ModelCard, context: Context, run_id: str
) -> Result:
    ledger = context.out / "ledger"
    for side, kept in ledgers.items():
        jsonl.write(ledger / f"{side}.jsonl", kept.rows)
    curve = [{"step": 0, "eval_loss": result.base_loss}, *result.history]
    jsonl.write(ledger / "history.jsonl", curve)
    page = context.out / "page.html"
    page.write_text(curves.page(curve, card, {s: dict(k.counts) for s, k in ledgers.items()}))
    with contextlib.suppress(TuneyardError):
        tracking.log_artifact_text(run_id, "training.html", page.read_text())
    summary = {
        "steps": len(result.history),
        "best_step": result.best_step,
        "stopped_early": result.stopped_early,
        "examples": {side: dict(kept.counts) for side, kept in ledgers.items()},
        "tokens": {side: dict(kept.tokens) for side, kept in ledgers.items()},
        "trainable_weights": card.trainable_weights,
        "total_weights": card.total_weights,
        "mlflow_run": run_id,
    }
    return Result(
        kinds={"model": "model", "ledger": "report"},
        metadata={"model": json.loads(card.model_dump_json())},
        metrics={
            "train_loss": result.history[-1]["loss"],
            "eval_loss": result.best_loss,
            "base_eval_loss": result.base_loss,
            "tokens_per_second": result.history[-1]["tokens_per_second"],
            "trainable_fraction": card.trainable_weights / card.total_weights,
        },
        summary=summary,
        page=page,
    )
