"""The objective that a pipeline file asks for, over its base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared import causal
from components.train.adapters.applying import quantise
from components.train.config import TrainConfig
from components.train.objectives.answering import judge_of
from components.train.objectives.base import Objective, choose_attention
from components.train.objectives.classification import Classification, class_weights, labels_of
from components.train.objectives.classification_distillation import ClassificationDistillation
from components.train.objectives.config import (
    ClassificationObjective,
    ContrastiveObjective,
    DpoObjective,
    GrpoObjective,
    LanguageModelingObjective,
    MaskedLanguageModelingObjective,
    MultiTaskObjective,
    PpoObjective,
    RegressionObjective,
    RewardObjective,
    RlooObjective,
    Seq2SeqObjective,
    SftObjective,
    TokenClassificationObjective,
)
from components.train.objectives.contrastive import Contrastive
from components.train.objectives.distillation import Distillation
from components.train.objectives.distillation_config import (
    ClassificationDistillationObjective,
    DistillationObjective,
    Taught,
)
from components.train.objectives.dpo import Dpo
from components.train.objectives.groups import Grpo, Rloo
from components.train.objectives.image_classification import ImageClassification
from components.train.objectives.language_modeling import LanguageModeling
from components.train.objectives.masked_language_modeling import MaskedLanguageModeling
from components.train.objectives.media_config import ImageClassificationObjective, SpeechRecognitionObjective
from components.train.objectives.multi_task import MultiTask, heads_of
from components.train.objectives.pairs import refuse_without_scores
from components.train.objectives.ppo import Ppo
from components.train.objectives.regression import Regression, scale_of
from components.train.objectives.reward import Reward
from components.train.objectives.seq2seq import Seq2Seq
from components.train.objectives.sft import Sft
from components.train.objectives.speech_recognition import SpeechRecognition
from components.train.objectives.students import keep_layers
from components.train.objectives.teacher_answers import SequenceDistillation
from components.train.objectives.teachers import open_causal, open_classifier
from components.train.objectives.token_classification import TokenClassification, entity_labels


def open_objective(
    config: TrainConfig,
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    reward_folder: Path | None = None,
    teacher_folder: Path | None = None,
) -> Objective:
    """The objective over the base model in `folder`; every weight as the base has it, in NF4 under qlora.

    Args:
        config: settings.
        rows: the train examples, which tell labels.
        folder: of the base model.
        reward_folder: of the reward model, where the objective has one.
        teacher_folder: of the teacher, where the objective has one.

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
        case DpoObjective():
            refuse_without_scores(rows, config.objective)
            objective = Dpo(folder, held_in(config), config.objective, config.dropout)
        case RewardObjective():
            refuse_without_scores(rows, config.objective)
            objective = Reward(folder, config.objective, config.dropout)
        case PpoObjective():
            assert reward_folder is not None  # whoever reads the pipeline file gives it with this objective
            judge, inside = judge_of(reward_folder), config.adapter.base_inside
            objective = Ppo(folder, held_in(config), config.objective, judge, inside)
        case GrpoObjective() | RlooObjective():
            objective = _grouped(config, config.objective, folder, reward_folder)
        case DistillationObjective() | ClassificationDistillationObjective():
            objective = _taught(config, rows, folder, teacher_folder)
        case SpeechRecognitionObjective():
            objective = SpeechRecognition(folder, config, rows)
        case _:
            objective = _encoder(config, rows, folder)
    quantise(objective, config)
    choose_attention(objective, config.max_length, computed_in(config))
    return objective


def _encoder(config: TrainConfig, rows: Sequence[Mapping[str, Any]], folder: Path) -> Objective:
    """An objective over an encoder; what it predicts is told by the train examples."""
    match config.objective:
        case ClassificationObjective():
            asked = config.objective.class_weights
            weights = class_weights(rows, asked) if asked else None
            return Classification(folder, labels_of(rows), config.dropout, weights)
        case ImageClassificationObjective():
            return ImageClassification(folder, config, rows)
        case RegressionObjective():
            scale = scale_of([row["score"] for row in rows], "scores")
            return Regression(folder, config.objective, scale, config.dropout)
        case TokenClassificationObjective():
            return TokenClassification(folder, entity_labels(rows), config.dropout)
        case ContrastiveObjective():
            return Contrastive(folder, config.objective, config.dropout)
        case MultiTaskObjective():
            found = heads_of(rows, config.objective)
            return MultiTask(folder, config.objective, found, config.peak_rate, config.dropout)
    raise AssertionError(f"no objective {config.objective.kind}")


def _grouped(
    config: TrainConfig, asked: GrpoObjective | RlooObjective, folder: Path, reward_folder: Path | None
) -> Objective:
    """An objective that compares answers."""
    judge = judge_of(reward_folder) if reward_folder else None
    inside = config.adapter.base_inside
    if isinstance(asked, GrpoObjective):
        return Grpo(folder, held_in(config), asked, judge, inside)
    return Rloo(folder, held_in(config), asked, judge, inside)


def _taught(
    config: TrainConfig, rows: Sequence[Mapping[str, Any]], folder: Path, teacher_folder: Path | None
) -> Objective:
    """An objective with a teacher, over the layers of the base that its student keeps."""
    asked = config.objective
    assert isinstance(asked, Taught)
    assert teacher_folder is not None  # as the reward model's
    objective: Objective
    if isinstance(asked, ClassificationDistillationObjective):
        reads = open_classifier(teacher_folder)
        objective = ClassificationDistillation(folder, labels_of(rows), asked, reads, config.dropout)
    else:
        assert isinstance(asked, DistillationObjective)
        kind = Distillation if asked.level == "logits" else SequenceDistillation
        teacher = open_causal(teacher_folder, computed_in(config))
        objective = kind(folder, held_in(config), asked, teacher, config.dropout)
    if asked.student:
        keep_layers(objective.model, asked.student.layers)
    return objective


def held_in(config: TrainConfig) -> causal.Precision:
    """What the weights of a causal model are held in: those that move, and all with them, in float32."""
    return computed_in(config) if config.adapter.frozen else "float32"


def computed_in(config: TrainConfig) -> causal.Precision:
    """What a training computes in."""
    exact = config.adapter.exact and config.precision == "auto"
    return "float32" if exact else causal.preferred_precision(config.precision)
