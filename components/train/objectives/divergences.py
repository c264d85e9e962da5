"""How far a student's predictions are from its teacher's, in nats; logits are [n, choices]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from components.train.objectives.distillation_config import Divergence

# Rows of logits at a time: 64 of Gemma 3's 262,144 words are 67 MB in float32, and several such live at once.
# A product of so many rows already takes longer than reading its weights.
_ROWS = 64


def nats(teacher: Any, student: Any, temperature: float, kind: Divergence) -> Any:
    """Divergence of each row at a temperature, times its square; differentiable in `student`.

    forward: KL(teacher || student); reverse: KL(student || teacher); jensen-shannon: the mean of both KLs to
    the even mixture (Agarwal et al. 2023, arXiv:2306.13649, equation 1 with beta 1/2).
    """
    import torch

    wanted = torch.log_softmax(teacher.float() / temperature, -1)
    said = torch.log_softmax(student.float() / temperature, -1)
    if kind == "forward":
        found = _kl(wanted, said)
    elif kind == "reverse":
        found = _kl(said, wanted)
    else:
        mixed = torch.logaddexp(wanted, said) - math.log(2)
        found = (_kl(wanted, mixed) + _kl(said, mixed)) / 2
    return temperature**2 * found


def _kl(of: Any, to: Any) -> Any:
    """Sum of p (log p - log q), from logarithms."""
    return (of.exp() * (of - to)).sum(-1)


def _nats_and_slope(teacher: Any, student: Any, temperature: float, kind: Divergence) -> tuple[Any, Any]:
    """`nats`, and its gradient over the student's logits, in closed form.

    With q the teacher's and p the student's probabilities, m their mean: forward T (p - q); reverse and
    jensen-shannon T p (g - sum p g) with g = log p - log q, and (log p - log m) / 2.
    """
    import torch

    wanted = torch.log_softmax(teacher / temperature, -1)
    said = torch.log_softmax(student / temperature, -1)
    likely = said.exp()
    if kind == "forward":
        found = _kl(wanted, said)
        slope = likely.sub_(wanted.exp_())
    else:
        if kind == "reverse":
            apart = said.sub_(wanted)
            found = (likely * apart).sum(-1)
        else:
            mixed = torch.logaddexp(wanted, said).sub_(math.log(2))
            found = (_kl(wanted, mixed) + _kl(said, mixed)) / 2
            apart = said.sub_(mixed).div_(2)
        slope = apart.sub_((likely * apart).sum(-1, keepdim=True)).mul_(likely)
    return temperature**2 * found, slope.mul_(temperature)


@dataclass(frozen=True)
class Head:
    """What makes logits of last hidden states: a projection (a Linear), and a soft cap (0: none)."""

    linear: Any
    cap: float

    def logits(self, states: Any) -> Any:
        """States [n, width] -> logits [n, vocabulary], in float32."""
        import torch

        weight, bias = self.linear.weight, self.linear.bias
        found = torch.nn.functional.linear(states.to(weight.dtype), weight, bias).float()
        return torch.tanh(found / self.cap) * self.cap if self.cap else found


def summed(
    states: Any,
    head: Head,
    targets: Any,
    theirs: Any,
    their_head: Head,
    vocabulary: int,
    measure: tuple[float, float, Divergence],
) -> tuple[Any, Any, Any]:
    """hard_weight x cross-entropy + (1 - hard_weight) x divergence, summed over tokens.

    Logits are made for some rows at a time and never kept (see shared/loss.py): the gradient of the states
    and of the head, where it moves, is computed beside the loss.

    Args:
        states: the student's [n, width]; differentiable in them and in the head's weight and bias.
        head: the student's.
        targets: [n] token ids, of the hard loss.
        theirs: the teacher's states [n, its width].
        their_head: the teacher's.
        vocabulary: tokens that both know; their heads may have further rows, which pad them.
        measure: hard_weight, temperature and kind of divergence.

    Returns:
        The loss, and the sums of cross-entropy and divergence alone, without gradient.
    """
    linear = head.linear
    given = head, targets, theirs, their_head, vocabulary, measure
    return _function().apply(states, linear.weight, linear.bias, given)


@cache
def _function() -> Any:
    import torch

    class Summed(torch.autograd.Function):
        """Computes the gradients in the forward pass, rows by rows, and hands them out in the backward."""

        @staticmethod
        def forward(ctx: Any, states: Any, weight: Any, bias: Any, given: Any) -> Any:
            head, targets, theirs, their_head, *rest = given
            sums = states.new_zeros(2, dtype=torch.float32)
            moves = [*ctx.needs_input_grad[:3]]
            grads = [
                torch.zeros_like(x) if y else None for x, y in zip((states, weight, bias), moves, strict=True)
            ]
            for start in range(0, len(targets), _ROWS):
                at = slice(start, start + _ROWS)
                logits, wanted = head.logits(states[at]), their_head.logits(theirs[at])
                slope = _rows(logits, wanted, targets[at], sums, head.cap, *rest)
                slope = slope.to(weight.dtype)
                if grads[0] is not None:
                    grads[0][at] = torch.mm(slope, weight)
                if grads[1] is not None:
                    grads[1] += torch.mm(slope.T, states[at].to(weight.dtype))
                if grads[2] is not None:
                    grads[2] += slope.sum(0)
            ctx.gradients = grads
            hard, soft = sums.unbind()
            hard_weight = rest[1][0]
            total = hard_weight * hard + (1 - hard_weight) * soft
            ctx.mark_non_differentiable(hard, soft)
            return total, hard, soft

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (*(g * grads[0].to(g.dtype) if g is not None else None for g in ctx.gradients), None)

    return Summed


def _rows(
    logits: Any,
    wanted: Any,
    targets: Any,
    sums: Any,
    cap: float,
    vocabulary: int,
    measure: tuple[float, float, Divergence],
) -> Any:
    """Add the sums of these rows to `sums`; returns the gradient of the loss over the head's own product."""
    import torch

    hard_weight, temperature, kind = measure
    said = torch.log_softmax(logits, -1)
    sums[0] -= said.gather(1, targets[:, None]).sum()
    soft, slope = _nats_and_slope(wanted[:, :vocabulary], logits[:, :vocabulary], temperature, kind)
    sums[1] += soft.sum()
    whole = said.exp_()
    whole.scatter_add_(1, targets[:, None], torch.full_like(targets[:, None], -1, dtype=whole.dtype))
    whole.mul_(hard_weight)
    whole[:, :vocabulary].add_(slope, alpha=1 - hard_weight)
    return whole.mul_(1 - (logits / cap) ** 2) if cap else whole
