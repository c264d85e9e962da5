"""The objective that a pipeline file asks for, over its base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared import causal
from components.train.config import TrainConfig
from components.train.objectives.base import Objective, choose_attention
from components.train.objectives.classification import Classification, class_weights, labels_of
from components.train.objectives.config import (
    ClassificationObjective,
    ContrastiveObjective,
    LanguageModelingObjective,
    MaskedLanguageModelingObjective,
    MultiTaskObjective,
    RegressionObjective,
    Seq2SeqObjective,
    SftObjective,
    TokenClassificationObjective,
)
from components.train.objectives.contrastive import Contrastive
from components.train.objectives.language_modeling import LanguageModeling
from components.train.objectives.masked_language_modeling import MaskedLanguageModeling
from components.train.objectives.multi_task import MultiTask, heads_of
from components.train.objectives.regression import Regression, scale_of
from components.train.objectives.seq2seq import Seq2Seq
from components.train.objectives.sft import Sft
from components.train.objectives.token_classification import TokenClassification, entity_labels


def open_objective(config: TrainConfig, rows: Sequence[Mapping[str, Any]], folder: Path) -> Objective:
    """The objective over the base model in `folder`; every weight as the base has it.

    Args:
        config: settings.
        rows: the train examples, which tell labels.
        folder: of the base model.

    Raises:
        StageStopped: the examples do not fit the objective (fewer than two labels, one score for all).
    """
    objective: Objective
    match config.objective:
        case SftObjective():
            objective = Sft(folder, held_in(config), config.dropout, config.objective)
        case LanguageModelingObjective():
            objective = LanguageModeling(folder, held_in(config), config.dropout)
        case MaskedLanguageModelingObjective():
            objective = MaskedLanguageModeling(folder, config.objective, config.dropout)
        case Seq2SeqObjective():
            objective = Seq2Seq(folder, config.dropout)
        case ClassificationObjective():
            asked = config.objective.class_weights
            weights = class_weights(rows, asked) if asked else None
            objective = Classification(folder, labels_of(rows), config.dropout, weights)
        case RegressionObjective():
            scale = scale_of([row["score"] for row in rows], "scores")
            objective = Regression(folder, config.objective, scale, config.dropout)
        case TokenClassificationObjective():
            objective = TokenClassification(folder, entity_labels(rows), config.dropout)
        case ContrastiveObjective():
            objective = Contrastive(folder, config.objective, config.dropout)
        case MultiTaskObjective():
            found = heads_of(rows, config.objective)
            objective = MultiTask(folder, config.objective, found, config.learning_rate, config.dropout)
    choose_attention(objective, config.max_length)
    return objective


def held_in(config: TrainConfig) -> causal.Precision:
    """What the weights of a causal model are held in: those that move, and all with them, in float32."""
    return causal.preferred_precision(config.precision) if config.adapter.frozen else "float32"
