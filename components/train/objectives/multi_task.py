"""Several tasks on one encoder: a head for each, weighted losses, gradients kept from conflict."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import causal, clock, encoders, heads
from components.shared.errors import StageStopped
from components.shared.heads import Head
from components.shared.tasks import Task
from components.train import checkpoint
from components.train.objectives import surgery, texts
from components.train.objectives.base import Arithmetic, Objective
from components.train.objectives.config import MultiTaskObjective, TaskHead
from components.train.objectives.regression import scale_of
from components.train.ranks import Ranks

log = logging.getLogger("tuneyard.train")

_LOG_VARIANCES = "task_log_variances"
# What the learned log variances move by in an update at the peak of the schedule, whatever the encoder's own
# rate: at 2e-5, a usual one for an encoder, they would stand still for a thousand updates.
_LOG_VARIANCE_RATE = 1e-2


@dataclass(frozen=True)
class Asked:
    """Token ids of a text, the index of its task, and its target: index of a label, or standardised score."""

    ids: list[int]
    task: int
    target: float

    def __len__(self) -> int:
        return len(self.ids)


class MultiTask(Objective):
    """Classification and regression heads on one encoder: see MultiTaskObjective."""

    task: Task = "multi-task"

    def __init__(
        self,
        folder: Path,
        settings: MultiTaskObjective,
        found: Sequence[Head],
        learning_rate: float,
        dropout: float | None = None,
    ) -> None:
        import torch

        self._settings, self.heads = settings, list(found)
        self._slices = [place for _, place in heads.slices(self.heads)]
        self._index = {head.task: index for index, head in enumerate(self.heads)}
        self._weights = [settings.tasks.get(head.task, TaskHead()).weight for head in self.heads]
        self._ratio = _LOG_VARIANCE_RATE / learning_rate
        self._conflicts = 0
        self.tokenizer = texts.open_tokenizer(folder)
        outputs = [f"{head.task}: {label}" for head in self.heads for label in head.labels or ["score"]]
        self.model = texts.open_headed(folder, self.tokenizer, outputs, dropout)
        if settings.weighting == "uncertainty":
            zeros = torch.zeros(len(self.heads), device=causal.device())
            self.model.register_parameter(_LOG_VARIANCES, torch.nn.Parameter(zeros))
            self.own_weights = (_LOG_VARIANCES,)

    def usable(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows whose task and label train has."""
        kept = [row for row in rows if target_fault(self.heads, row) is None]
        if len(kept) < len(rows):
            faults = sorted({f"{target_fault(self.heads, row)}" for row in rows} - {"None"})
            log.warning("train: %d examples of eval are not judged: %s", len(rows) - len(kept), faults[:5])
        return kept

    def encode(self, example: Mapping[str, Any]) -> Asked:
        """See Objective."""
        index = self._index[example["task"]]
        named = self._settings.conditioning == "name"
        ids = texts.token_ids(self.tokenizer, heads.asked(example["task"], example["text"], named))
        return Asked(ids, index, target(self.heads[index], example["label"]))

    def shorten(self, encoded: Asked, max_length: int) -> Asked | None:
        """Cut the end of the text."""
        return Asked(texts.cut(self.tokenizer, encoded.ids, max_length), encoded.task, encoded.target)

    def terms(self, encoded: Asked) -> int:
        """One label or score."""
        return 1

    def summed_loss(self, batch: Sequence[Asked], label_smoothing: float) -> Any:
        """Sum of w_t L over the examples; with uncertainty weighting of w_t (c L exp(-s_t) + s_t / 2).

        s_t is the log variance of task t, c is 1 for cross-entropy and 1/2 for a squared error (Kendall et
        al. 2018, arXiv:1705.07115, section 3.2). Eval is judged by the fixed weights alone: a loss whose
        weights learn too would fall without any task becoming better.
        """
        import torch

        inputs = encoders.padded(self.model, self.tokenizer, [e.ids for e in batch])
        outputs = self.model(**inputs).logits.float()
        total: Any = 0.0
        for task, head in enumerate(self.heads):
            rows = [i for i, e in enumerate(batch) if e.task == task]
            if not rows:
                continue
            ours = outputs[rows, self._slices[task]]
            targets = torch.tensor([batch[i].target for i in rows], device=causal.device())
            if head.labels:
                loss = torch.nn.functional.cross_entropy(
                    ours, targets.long(), reduction="sum", label_smoothing=label_smoothing
                )
            else:
                loss = torch.nn.functional.mse_loss(ours[:, 0], targets, reduction="sum")
            if self.own_weights and torch.is_grad_enabled():
                s = self._log_variances()[task]
                loss = loss * torch.exp(-s) * (1.0 if head.labels else 0.5) + len(rows) * s / 2
            total = total + self._weights[task] * loss
        return total

    def gradient(
        self,
        micros: Sequence[Sequence[Any]],
        terms: int,
        label_smoothing: float,
        arithmetic: Arithmetic,
        ranks: Ranks,
    ) -> float:
        """See Objective; with gradient surgery one gradient for each task, then what `surgery` makes of them.

        The encoder's weights are what tasks share, so those are projected; a head belongs to its task.
        """
        import torch

        if self._settings.gradients == "sum":
            return super().gradient(micros, terms, label_smoothing, arithmetic, ranks)
        weights = list(checkpoint.trainable(self.model).values())
        body = {id(weight) for weight in _inner(self.model).base_model.parameters()}
        shared = [weight for weight in weights if id(weight) in body]
        rest = [weight for weight in weights if id(weight) not in body]
        loss, found, others = 0.0, [], [torch.zeros_like(weight) for weight in rest]
        for task in range(len(self.heads)):
            parts = [[e for e in micro if e.task == task] for micro in micros]
            parts = [part for part in parts if part]
            loss += super().gradient(parts, terms, label_smoothing, arithmetic, ranks)
            ranks.add_gradients(weights)
            with clock.arithmetic():
                # A task without examples in the update has no gradient, and nothing to be in conflict with.
                if any(weight.grad is not None for weight in shared):
                    found.append(torch.cat([_gradient(weight).flatten() for weight in shared]))
                for weight, other in zip(rest, others, strict=True):
                    other += _gradient(weight)
                for weight in weights:
                    weight.grad = None
        with clock.arithmetic():
            total, self._conflicts = surgery.projected(found)
            pieces = total.split([weight.numel() for weight in shared])
            # Every process has the sum over all of them; one of them hands it in.
            for weight, piece in zip([*shared, *rest], [*pieces, *others], strict=True):
                weight.grad = piece.view_as(weight) if ranks.writes else None
        return loss

    def notes(self) -> dict[str, float]:
        """Learned weight exp(-s) of each task, and pairs of tasks whose gradients were in conflict."""
        found: dict[str, float] = {}
        if self.own_weights:
            weights = self._log_variances().detach().neg().exp().tolist()
            found |= {f"weight_{head.task}": w for head, w in zip(self.heads, weights, strict=True)}
        if self._settings.gradients == "pcgrad":
            found["conflicts"] = float(self._conflicts)
        return found

    def _log_variances(self) -> Any:
        """The log variances [tasks], which move at their own rate.

        The optimizer moves each weight by about its learning rate, so one that stands for `ratio` times its
        value moves that much faster; its gradient is kept as it would be, for it is clipped with the others'.
        """
        raw = getattr(_inner(self.model), _LOG_VARIANCES)
        return self._ratio * raw.detach() + (raw - raw.detach())

    def card_facts(self) -> dict[str, Any]:
        """The heads, and whether the model reads the task's name."""
        return {"heads": self.heads, "task_in_text": self._settings.conditioning == "name"}

    def finish(self) -> None:
        """The log variances are no part of the model."""
        if self.own_weights:
            delattr(_inner(self.model), _LOG_VARIANCES)
            self.own_weights = ()


def _inner(model: Any) -> Any:
    """The transformers model, within its adapter if any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _gradient(weight: Any) -> Any:
    import torch

    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def target(head: Head, label: str) -> float:
    """What a head learns for a label as the data has it."""
    return float(head.labels.index(label)) if head.scale is None else head.scale.standardised(float(label))


def target_fault(found: Sequence[Head], row: Mapping[str, Any]) -> str | None:
    """What is wrong with an example's task or label for these heads, or None."""
    head = next((head for head in found if head.task == row["task"]), None)
    if head is None:
        return f"no task {row['task']!r} in train"
    if head.scale is None:
        return None if row["label"] in head.labels else f"{head.task}: no label {row['label']!r} in train"
    return None if _is_number(row["label"]) else f"{head.task}: {row['label']!r} is no number"


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def heads_of(rows: Sequence[Mapping[str, Any]], settings: MultiTaskObjective) -> list[Head]:
    """A head for each task of the train examples, by name.

    Raises:
        StageStopped: a task of the settings is not there, has one label, or scores that are no numbers; all
            such faults.
    """
    by_task: dict[str, list[str]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row["label"])
    faults = [f"train has no task {name!r}" for name in sorted(set(settings.tasks) - set(by_task))]
    found = []
    for name, labels in sorted(by_task.items()):
        if settings.tasks.get(name, TaskHead()).head == "regression":
            odd = sorted({label for label in labels if not _is_number(label)})
            if odd:
                faults.append(f"{name}: scores {odd[:3]} are no numbers")
            else:
                scale = scale_of([float(label) for label in labels], f"scores of task {name}")
                found.append(Head(task=name, scale=scale))
        elif len(set(labels)) < 2:
            faults.append(f"{name}: two labels or more are needed; train has {sorted(set(labels))}")
        else:
            found.append(Head(task=name, labels=sorted(set(labels))))
    if faults:
        raise StageStopped(
            f"train.objective.tasks: {'; '.join(faults)}; the tasks of train are {sorted(by_task)}",
            "name the tasks as the corpus does, and mark those with numbers {head: regression}",
        )
    return found
