"""Against forgetting: what the base could, on a retention set that is read beside the train examples.

Three ways, each to be had alone or with the others: `replay` lets some examples of each update come from the
retention set, `ewc` holds weights that matter for it near the base's, `distil_from_base` holds predictions near
the base's own. Whatever is chosen, the loss on the retention set is judged beside that on eval.
"""

from __future__ import annotations

import copy
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.shared import clock, examples, sources, tasks
from components.shared.errors import StageStopped, TuneyardError
from components.shared.store import Store
from components.train import checkpoint
from components.train.config import TrainConfig
from components.train.data import fit_lengths
from components.train.objectives.base import Objective

log = logging.getLogger("tuneyard.train")

_SHOWN = 5
# Rows of logits in memory at a time; see shared/loss.py.
_CHUNK = 256


@dataclass
class Retained:
    """The retention set, encoded.

    Args:
        judged: examples whose loss is watched; none of them is trained on.
        kept: the others, for replay and for the Fisher information.
    """

    judged: Sequence[Any]
    kept: Sequence[Any]


def read(config: TrainConfig, store: Store) -> list[dict[str, Any]]:
    """The rows of the retention set: every line of its *.jsonl files, fields as the objective's data has them.

    Raises:
        TuneyardError: there is no such file, or lines lack a field; names the first of them.
    """
    assert config.retain is not None
    folder = _folder(config.retain.source, store)
    files = sorted(folder.rglob("*.jsonl")) if folder.is_dir() else [folder]
    formats = tasks.OBJECTIVES[config.objective.kind].formats
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            row, fault = _row(line, formats)
            if fault:
                faults.append(f"{path.name}:{number} {fault}")
            elif row is not None:
                origin = {"file": path.name, "line": number, "part": "main"}
                rows.append({"id": f"{path.name}:{number}", "origin": origin, **row})
    if faults or len(rows) < 2:
        first = "; ".join(faults[:_SHOWN]) or f"{len(rows)} rows in {len(files)} *.jsonl files"
        raise TuneyardError(
            f"train.retain.source {config.retain.source}: {len(faults)} unusable lines: {first}",
            f"give JSON lines, two or more, with the fields of {' or '.join(formats)} data",
        )
    return rows


def _folder(uri: str, store: Store) -> Path:
    if sources.kind_of(uri) == "s3":
        return store.get_prefix(uri)
    return Path(uri).expanduser()


def _row(line: str, formats: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
    """(row, what is wrong with the line); neither for an empty line."""
    if not line.strip():
        return None, ""
    try:
        row = json.loads(line)
    except ValueError:
        return None, "is no JSON"
    if not isinstance(row, dict):
        return None, "is no JSON object"
    lacking = [[n for n in examples.REQUIRED[kind] if row.get(n) is None] for kind in formats]
    return (row, "") if [] in lacking else (None, f"lacks {' or '.join(', '.join(n) for n in lacking)}")


def encode(objective: Objective, rows: Sequence[dict[str, Any]], config: TrainConfig) -> Retained:
    """The retention set, its rows dealt into those that are judged and those that are trained on.

    Raises:
        StageStopped: too few rows fit.
    """
    assert config.retain is not None
    usable = objective.usable(list(rows))
    random.Random(f"{config.seed}/retain").shuffle(usable)
    judged = min(config.retain.judged_examples, len(usable) // 2)
    sides = []
    for part in (usable[:judged], usable[judged:]):
        encoded, _ = fit_lengths(part, objective.encode, objective.shorten, config)
        sides.append(encoded)
    if not all(sides):
        raise StageStopped(
            f"of {len(rows)} retention examples {len(sides[0])} can be judged and {len(sides[1])} trained on",
            "give train.retain.source more examples that fit, see train.max_length",
        )
    return Retained(*sides)


def replayed(
    updates: Sequence[Sequence[Sequence[Any]]], kept: Sequence[Any], fraction: float, config: TrainConfig
) -> list[list[list[Any]]]:
    """Updates with retention examples among theirs, so many that they are this fraction of all so far.

    Every example of train still comes up as before. Those of the retention set come in a random order, each
    once before any comes again.

    Args:
        updates: [update][micro-batch] -> encoded examples.
        kept: encoded retention examples.
        fraction: 0-1, of all examples of the run.
        config: seed, and the most that a micro-batch holds.
    """
    if not fraction:
        return [[list(micro) for micro in update] for update in updates]
    order, supply = random.Random(f"{config.seed}/replay"), _forever(kept, config)
    del order
    found, trained, added = [], 0, 0
    for update in updates:
        trained += sum(map(len, update))
        due = round(trained * fraction / (1 - fraction)) - added
        added += due
        found.append(_filled(update, [next(supply) for _ in range(due)], config.per_device_batch_size))
    return found


def _forever(kept: Sequence[Any], config: TrainConfig) -> Iterator[Any]:
    order = random.Random(f"{config.seed}/replay")
    while True:
        yield from order.sample(list(kept), len(kept))


def _filled(update: Sequence[Sequence[Any]], more: Sequence[Any], size: int) -> list[list[Any]]:
    """The micro-batches with more examples: in those that have room, then in new ones."""
    micros, rest = [list(micro) for micro in update], list(more)
    for micro in micros:
        while rest and len(micro) < size:
            micro.append(rest.pop())
    return micros + [rest[at : at + size] for at in range(0, len(rest), size)]


class Ewc:
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3).

    The loss gets strength / 2 * sum of F_i (w_i - base_i)^2 over the weights that move. F is the diagonal of
    the empirical Fisher information on the retention set: the mean over its terms of the squared gradient,
    squared for each example, whose terms are taken as independent.

    Args:
        objective: with the base's weights.
        kept: encoded retention examples.
        strength: see above.
        arithmetic: gives the context to compute in.
    """

    def __init__(
        self,
        objective: Objective,
        kept: Sequence[Any],
        strength: float,
        arithmetic: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        import torch

        self._strength = strength
        weights = checkpoint.trainable(objective.model)
        self._base = {name: weight.detach().clone() for name, weight in weights.items()}
        self.fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        with calm(objective.model), clock.arithmetic():
            for example in kept:
                objective.model.zero_grad(set_to_none=True)
                with arithmetic():
                    loss = objective.summed_loss([example], 0.0)
                loss.backward()
                for name, weight in weights.items():
                    if weight.grad is not None:
                        self.fisher[name] += weight.grad.detach().square()
        terms = sum(map(objective.terms, kept))
        for fisher in self.fisher.values():
            fisher /= terms

    def add(self, weights: Mapping[str, Any]) -> float:
        """Add the gradient of the penalty to that of these weights; returns the penalty in nats."""
        penalty = 0.0
        for name, weight in weights.items():
            away = weight.detach() - self._base[name]
            pull = self.fisher[name] * away
            penalty += float((pull * away).sum())
            if weight.grad is None:
                weight.grad = self._strength * pull
            else:
                weight.grad += self._strength * pull
        return self._strength / 2 * penalty


class Base:
    """The base's own predictions: of the model with its adapter off, or of a copy kept beside it.

    Args:
        model: with the base's weights.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._copy: dict[str, Any] = {}
        if not hasattr(model, "disable_adapter"):
            log.info("train: a copy of the base's weights is kept beside the model, for its predictions")
            self._copy = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    @contextmanager
    def weights(self) -> Iterator[None]:
        """While it lasts, the model is the base, without dropout or gradients."""
        import torch

        training = self._model.training
        self._model.eval()
        moved: dict[str, Any] = {}
        if self._copy:
            for name, weight in self._model.named_parameters():
                moved[name] = weight.data
                weight.data = self._copy[name]
        try:
            with torch.no_grad(), nullcontext() if self._copy else self._model.disable_adapter():
                yield
        finally:
            for name, weight in self._model.named_parameters():
                if name in moved:
                    weight.data = moved[name]
            self._model.train(training)


def divergence(theirs: Any, ours: Any, project: Callable[[Any], Any], base_project: Callable[[Any], Any]) -> Any:
    """KL(base || model) in nats, summed over terms: what Li and Hoiem 2016 (arXiv:1606.09282) hold small, at
    temperature 1.

    Args:
        theirs: [terms, width] states of the base.
        ours: [terms, width] states of the model.
        project: model's states -> logits.
        base_project: base's states -> logits.
    """
    import torch
    from torch.utils.checkpoint import checkpoint as again

    def part(state: Any, base: Any) -> Any:
        wanted = torch.log_softmax(base_project(base).float(), -1)
        said = torch.log_softmax(project(state).float(), -1)
        return torch.nn.functional.kl_div(said, wanted, reduction="sum", log_target=True)

    # Logits are computed again in the backward pass, so that those of one chunk are in memory.
    pairs = zip(ours.split(_CHUNK), theirs.split(_CHUNK), strict=True)
    return torch.stack([again(part, mine, base, use_reentrant=False) for mine, base in pairs]).sum()


@contextmanager
def calm(model: Any) -> Iterator[None]:
    """Without dropout; mode, gradients are as before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)
