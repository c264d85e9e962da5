"""What holds a model to its base while it learns: elastic weight consolidation, and the base's predictions.

Both are penalties whose gradient is added once an update, whatever the objective. Against forgetting there is
also replay, see retention.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from components.shared import clock
from components.shared.store import Store
from components.train import checkpoint
from components.train.adapters import switch
from components.train.config import TrainConfig
from components.train.objectives.base import Objective
from components.train.ranks import Ranks
from components.train.retention import Retained, encode, read

log = logging.getLogger("tuneyard.train")

# Rows of logits in memory at a time; see shared/loss.py.
_CHUNK = 256


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
        waiting = [weight for weight in weights.values() if not weight.requires_grad]
        for weight in waiting:
            weight.requires_grad_(True)
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
        for weight in waiting:
            weight.requires_grad_(False)

    def add(self, weights: Mapping[str, Any]) -> float:
        """Add the gradient of the penalty to that of these weights; returns the penalty in nats."""
        penalty = 0.0
        for name, weight in weights.items():
            if not weight.requires_grad:
                continue  # it waits to be thawed
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
        if not switch.possible(model):
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
            with torch.no_grad(), switch.off(self._model):
                yield
        finally:
            for name, weight in self._model.named_parameters():
                if name in moved:
                    weight.data = moved[name]
            self._model.train(training)


def divergence(
    theirs: Any, ours: Any, project: Callable[[Any], Any], base_project: Callable[[Any], Any]
) -> Any:
    """KL(base || model) in nats, summed over terms (Li and Hoiem 2016, arXiv:1606.09282, at temperature 1).

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


class Consolidation:
    """The penalty of `ewc` as the loop calls it."""

    def __init__(self, ewc: Ewc, model: Any) -> None:
        self._ewc, self._model = ewc, model

    def __call__(
        self, micros: Sequence[Any], terms: int, arithmetic: Callable[[], Any], ranks: Ranks
    ) -> dict[str, float]:
        """Add its gradient in one of the processes; the sum over all of them follows."""
        penalty = self._ewc.add(checkpoint.trainable(self._model)) if ranks.writes else 0.0
        return {"ewc_penalty": ranks.sum(penalty)}


class Distillation:
    """The penalty of `distil_from_base` as the loop calls it: a weight times the mean divergence."""

    def __init__(self, objective: Objective, weight: float) -> None:
        self._objective, self._weight, self._base = objective, weight, Base(objective.model)

    def __call__(
        self, micros: Sequence[Any], terms: int, arithmetic: Callable[[], Any], ranks: Ranks
    ) -> dict[str, float]:
        """Add its gradient on this process's micro-batches of an update that has so many terms in all."""
        total = 0.0
        for micro in micros:
            with clock.arithmetic():
                with arithmetic():
                    with self._base.weights():
                        theirs, base_project = self._objective.outputs(micro)
                    ours, project = self._objective.outputs(micro)
                    apart = divergence(theirs, ours, project, base_project) / terms
                (self._weight * apart).backward()
                total += float(apart.detach())
        return {"base_divergence": ranks.sum(total)}


def begin(objective: Objective, config: TrainConfig, store: Store, arithmetic: Callable[[], Any]) -> None:
    """Read the retention set, where settings name one, and `hold` the objective to it.

    Raises:
        StageStopped: too few of its rows fit.
        TuneyardError: it is not there, or has unusable lines.
    """
    if config.retain:
        hold(objective, encode(objective, read(config, store), config), config, arithmetic)


def hold(
    objective: Objective, retained: Retained, config: TrainConfig, arithmetic: Callable[[], Any]
) -> None:
    """Give an objective, whose model has the base's weights, its retention set and what holds it to it.

    Args:
        objective: gets `retained` and `penalties`.
        retained: the set.
        config: settings.
        arithmetic: gives the context to compute in.
    """
    assert config.retain is not None
    objective.retained = retained
    with switch.off(objective.model):
        objective.prepare_retained([*retained.judged, *retained.kept], arithmetic)
    objective.penalties = []
    if config.retain.ewc:
        kept = retained.kept[: config.retain.fisher_examples]
        ewc = Ewc(objective, kept, config.retain.ewc, arithmetic)
        objective.penalties.append(Consolidation(ewc, objective.model))
    if config.retain.distil_from_base:
        objective.penalties.append(Distillation(objective, config.retain.distil_from_base))


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
