"""The loss you asked for: checked on the real model and real examples before the first step.

What is checked has broken in every well-known trainer at some time (docs/decisions/0014): gradients of
accumulated micro-batches, examples that see each other in a packed row, prompts that carry loss, templates
that change an answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from components.shared import causal, clock
from components.shared.errors import TuneyardError
from components.train import checkpoint
from components.train.objectives.base import Arithmetic, Objective
from components.train.ranks import ALONE
from components.train.update import autocast

log = logging.getLogger("tuneyard.train")

# Relative differences that rounding explains. In bfloat16 a number has three digits: the loss of fifty tokens
# through the 18 layers of Gemma 3 270M is off by 0.4%, its gradient by 4.4%, so two roundings of it are 6.2%
# apart, and more through more layers. The defects looked for cost more (of the loss, an example that sees its
# neighbour 5-40%, a mean of means or a prompt that carries loss 10-900%; of Gemma's gradient 96%).
_LOSS = {"float32": 1e-4, "bfloat16": 0.03}
_GRADIENT = {"float32": 1e-3, "bfloat16": 0.25}
_EXAMPLES = 3
_TOKENS = 256
# The padded reference holds all logits: not so many that the check needs more memory than the training.
_LOGITS = 2**25


def check(
    objective: Objective,
    encoded: Sequence[Any],
    rows: Sequence[Mapping[str, Any]],
    precision: causal.Precision,
) -> dict[str, float]:
    """Compute loss and gradient of a few examples in all the ways that must agree.

    Args:
        objective: with its model, adapter applied.
        encoded: train examples; a few of the shorter ones are taken.
        rows: the same as text, for the template.
        precision: to compute in.

    Returns:
        What was measured: relative differences by name.

    Raises:
        TuneyardError: some are larger than rounding explains; says which, and all numbers.
    """
    chosen = choose(encoded, objective.model)
    found = measure(objective, chosen, precision)
    limits = {name: objective.rounding * _limit(name, precision) for name in found}
    faults = [
        f"{_MEANING[name]}: they differ by {value:.2%}, rounding explains {limits[name]:.2%}"
        for name, value in found.items()
        if not value <= limits[name]  # NaN is no agreement
    ]
    faults += objective.template_faults(rows[:_EXAMPLES])
    if faults:
        raise TuneyardError(
            f"the loss is not the one that was asked for ({precision}, {len(chosen)} examples of "
            f"{sum(map(len, chosen))} tokens): {'; '.join(faults)}",
            f"report it with the class of the model, {type(objective.model).__name__}; nothing was trained",
        )
    log.info("train: self-check passed: %s", ", ".join(f"{n} {v:.1e}" for n, v in found.items()))
    return found


_MEANING = {
    "micro_batches_loss": "the loss of one batch, and of its examples one by one",
    "micro_batches_gradient": "the gradient of one batch, and of its examples one by one",
    "plain_loss": "our loss, and transformers' logits under PyTorch's cross-entropy, padded and masked",
    "plain_gradient": "the gradient of our loss, and of PyTorch's cross-entropy on transformers' logits",
}


def _limit(name: str, precision: causal.Precision) -> float:
    return (_GRADIENT if name.endswith("gradient") else _LOSS)[precision]


def measure(objective: Objective, chosen: Sequence[Any], precision: causal.Precision) -> dict[str, float]:
    """Relative differences, by name, of loss and gradient computed in ways that must agree."""
    arithmetic = partial(autocast, precision)
    with _calm(objective.model):
        with clock.arithmetic(), arithmetic():
            chosen = list(objective.rehearsed(chosen))
        together, gradient = _update(objective, [chosen], arithmetic)
        alone, split = _update(objective, [[e] for e in chosen], arithmetic)
        found = {
            "micro_batches_loss": _relative(alone, together),
            "micro_batches_gradient": _distance(split, gradient),
        }
        if objective.plain_loss is not None:
            with clock.arithmetic(), arithmetic(), _attention(objective.model, "eager"):
                plain, expected = _plain(objective, objective.plain_loss, chosen)
            found["plain_loss"] = _relative(plain, together)
            found["plain_gradient"] = _distance(expected, gradient)
    return found


def choose(encoded: Sequence[Any], model: Any) -> list[Any]:
    """Some of different length: up to the median's, or shorter where their tokens or logits are many."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 1)
    by_length = sorted(encoded, key=len)
    farthest = len(by_length) // 2
    while True:
        places = dict.fromkeys([0, farthest // 2, farthest])
        found = [by_length[at] for at in places]
        padded = len(found) * len(found[-1])
        few = sum(map(len, found)) <= _TOKENS and padded * vocabulary <= _LOGITS
        if few or farthest <= 1:
            return found
        farthest //= 2


@contextmanager
def _attention(model: Any, implementation: str) -> Iterator[None]:
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _calm(model: Any) -> Iterator[None]:
    """Without dropout, and leaving no trace: random state, mode and gradients are as before."""
    import torch

    training = model.training
    devices = [causal.device()] if causal.device().type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            model.train(training)
            model.zero_grad(set_to_none=True)


def _update(
    objective: Objective, micros: Sequence[Sequence[Any]], arithmetic: Arithmetic
) -> tuple[float, dict[str, Any]]:
    """Mean loss and gradient of an update, as the training makes them of these micro-batches."""
    import torch

    objective.model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # gradient surgery draws the order of its tasks
    loss = objective.gradient(micros, _terms(objective, micros), 0.0, arithmetic, ALONE)
    return loss, _gradient(objective)


def _plain(
    objective: Objective, loss: Callable[[Sequence[Any], float], Any], chosen: Sequence[Any]
) -> tuple[float, dict[str, Any]]:
    """Mean loss by the book, and its gradient."""
    objective.model.zero_grad(set_to_none=True)
    mean = loss(chosen, 0.0) / _terms(objective, [chosen])
    mean.backward()
    return float(mean.detach()), _gradient(objective)


def _terms(objective: Objective, micros: Sequence[Sequence[Any]]) -> int:
    return max(1, sum(objective.terms(e) for micro in micros for e in micro))


def _gradient(objective: Objective) -> dict[str, Any]:
    moving = checkpoint.trainable(objective.model)
    return {n: w.grad.detach().clone() for n, w in moving.items() if w.grad is not None}


def _relative(one: float, other: float) -> float:
    # The loss of what is known well is the logarithm of nearly 1, and that has no digits below 6e-8.
    return abs(one - other) / max(abs(other), 0.01)


def _distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Length of the difference of two gradients over the length of the second; infinite if others move."""
    if one.keys() != other.keys():
        return float("inf")
    apart = sum(float((one[name] - other[name]).float().pow(2).sum()) for name in other)
    whole = sum(float(gradient.float().pow(2).sum()) for gradient in other.values())
    return float((apart / max(whole, 1e-24)) ** 0.5)
