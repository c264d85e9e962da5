"""What a training leaves: the model folder with its card, the ledger of its examples, the page."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from components.shared import addons, families, jsonl, nf4, tracking
from components.shared.errors import TuneyardError
from components.shared.modelcard import BaseModelRef, ModelCard
from components.shared.stage import Context, Result
from components.train import checkpoint, curves, diagnostics, measures
from components.train.adapters.applying import addon_of
from components.train.adapters.config import QloraAdapter
from components.train.config import TrainConfig
from components.train.data import Ledger
from components.train.objectives.base import Objective
from components.train.ongoing import Fit


def card(
    objective: Objective, config: TrainConfig, base: BaseModelRef, weights: tuple[int, int], run_id: str
) -> ModelCard:
    """The card of the model that comes out.

    Args:
        objective: with the trained model.
        config: settings.
        base: what it was tuned from.
        weights: (trainable, all).
        run_id: of the MLflow run.
    """
    return ModelCard(
        task=objective.task,
        layout=_layout(objective, config),
        quantised="nf4" if isinstance(config.adapter, QloraAdapter) else None,
        base_model=base,
        labels=list(objective.labels),
        max_length_tokens=config.max_length,
        template_probe=objective.template_probe(),
        trainable_weights=weights[0],
        total_weights=weights[1],
        mlflow_run=run_id,
        **objective.card_facts(),
    )


def _layout(objective: Objective, config: TrainConfig) -> Literal["transformers", "peft", "addon"]:
    """How the model is stored: whole, as an adapter that compress merges, or beside its base for good."""
    if config.adapter.beside:
        return "addon"
    # What judges and exports other models than causal ones takes whole ones.
    return "peft" if _wrapped(objective) and objective.task == "causal-lm" else "transformers"


def takes_base(objective: Objective, config: TrainConfig) -> bool:
    """Whether the base's own weights are in the model folder."""
    return _layout(objective, config) == "transformers"


def _wrapped(objective: Objective) -> bool:
    """Whether the model is in PEFT's wrapping."""
    return hasattr(objective.model, "merge_and_unload")


def save(objective: Objective, config: TrainConfig, card: ModelCard, folder: Path) -> None:
    """Write the model folder: whole weights, or an adapter; see the card's layout.

    Args:
        objective: with the trained model.
        config: settings.
        card: of the model.
        folder: to be made.
    """
    objective.finish()
    model = objective.model
    if card.layout == "addon":
        addons.save(model, addon_of(config), checkpoint.trainable(model), folder)
    else:
        if card.layout == "transformers" and _wrapped(objective):
            model = merged(model)
        model.save_pretrained(folder)
    # PEFT writes a page of empty headings.
    (folder / "README.md").unlink(missing_ok=True)
    objective.tokenizer.save_pretrained(folder)
    card.write(folder)


def merged(model: Any) -> Any:
    """A model in PEFT's wrapping with its adapter merged; one in NF4 into the weights it was made from."""
    from transformers import AutoModel

    if nf4.held(model):
        base = AutoModel.from_pretrained(
            model.get_base_model().config.name_or_path, local_files_only=True, use_safetensors=True
        )
        nf4.restore(families.body(model), base)
    return model.merge_and_unload()


def describe(
    result: Fit,
    ledgers: Mapping[str, Ledger],
    card: ModelCard,
    context: Context,
    run_id: str,
    checked: Mapping[str, float],
    processes: int,
) -> Result:
    """Write the ledger and the page, and say what the stage says of itself.

    Args:
        result: of the fit.
        ledgers: side -> what became of its examples.
        card: of the model.
        context: where.
        run_id: of the MLflow run.
        checked: what the self-check measured.
        processes: that trained together.
    """
    ledger = context.out / "ledger"
    for side, kept in ledgers.items():
        jsonl.write(ledger / f"{side}.jsonl", kept.rows)
    first, (curve, before) = result.first, _curves(result)
    jsonl.write(ledger / "history.jsonl", curve)
    if first:
        jsonl.write(ledger / "first_history.jsonl", before)
    page = context.out / "page.html"
    counts = {side: dict(kept.counts) for side, kept in ledgers.items()}
    found = diagnostics.diagnose(result.history, result.base_loss)
    page.write_text(curves.page(curve, card, counts, found, result.range_test, before))
    with contextlib.suppress(TuneyardError):
        tracking.log_artifact_text(run_id, "training.html", page.read_text())
    return Result(
        kinds={"model": "model", "ledger": "report"},
        metadata={"model": json.loads(card.model_dump_json())},
        metrics={
            "train_loss": result.history[-1]["loss"],
            "eval_loss": result.best_loss,
            "base_eval_loss": first["original"]["eval_loss"] if first else result.base_loss,
            **(_of_first(result) if first else {}),
            "tokens_per_second": result.history[-1]["tokens_per_second"],
            "trainable_fraction": card.trainable_weights / card.total_weights,
            **card.retention,
        },
        summary=_summary(result, ledgers, card, processes)
        | {"self_check": dict(checked), "findings": [asdict(one) for one in found], "mlflow_run": run_id},
        page=page,
    )


def _curves(result: Fit) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The history from its start on, and that of the first phase; empty where there is none."""
    first = result.first
    start = {"step": 0, "eval_loss": result.base_loss, "retention_loss": result.base_retention_loss}
    curve = [{name: value for name, value in start.items() if not math.isnan(value)}, *result.history]
    return curve, [{"step": 0, "eval_loss": first["base_loss"]}, *first["history"]] if first else []


def _of_first(result: Fit) -> dict[str, float]:
    """What the first phase did: to its documents of eval, and to the task's eval before it was trained."""
    return {
        "first_base_eval_loss": result.first["base_loss"],
        "first_eval_loss": result.first["best_loss"],
        "eval_loss_after_first": result.base_loss,
    }


def _summary(result: Fit, ledgers: Mapping[str, Ledger], card: ModelCard, processes: int) -> dict[str, Any]:
    return {
        "hardware": measures.hardware(processes),  # `tuneyard advise` compares it
        **({"first": _phase(result.first)} if result.first else {}),
        "steps": len(result.history),
        "best_step": result.best_step,
        "stopped_early": result.stopped_early,
        "learning_rate": max(row["learning_rate"] for row in result.history),
        "examples": {side: dict(kept.counts) for side, kept in ledgers.items()},
        "tokens": {side: dict(kept.tokens) for side, kept in ledgers.items()},
        "pieces": {side: kept.pieces for side, kept in ledgers.items() if kept.pieces},
        **{side: kept.parts for side, kept in ledgers.items() if kept.parts},
        "trainable_weights": card.trainable_weights,
        "total_weights": card.total_weights,
    }


def _phase(first: Mapping[str, Any]) -> dict[str, Any]:
    """The first phase in the summary; its examples and tokens are among those of the sides."""
    found = diagnostics.diagnose(first["history"], first["base_loss"])
    return {
        "steps": len(first["history"]),
        "best_step": first["best_step"],
        "stopped_early": first["stopped_early"],
        "learning_rate": max(row["learning_rate"] for row in first["history"]),
        "findings": [asdict(one) for one in found],
    }
