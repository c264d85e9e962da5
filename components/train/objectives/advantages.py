"""The arithmetic of policy optimisation over the tokens of an answer; tensors are [tokens]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from components.train.objectives.config import PpoObjective


@dataclass(frozen=True)
class Rollout:
    """An answer that the model gave, and what it was worth then.

    Args:
        prompt: token ids.
        answer: token ids that were drawn, the end token among them where there is one.
        log_probs: of each drawn token under the model that drew it.
        values: what the value head expected before each token.
        advantages: how much better each token was than expected.
        returns: what the value should have been.
    """

    prompt: list[int]
    answer: list[int]
    log_probs: Any
    values: Any
    advantages: Any
    returns: Any

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def token_rewards(reward: float, log_probs: Any, base_log_probs: Any, kl_weight: float) -> Any:
    """-kl_weight log(p / p_base) at each token, and the answer's reward at its last (Ouyang et al. 2022)."""
    rewards = -kl_weight * (log_probs - base_log_probs)
    rewards[-1] += reward
    return rewards


def advantages(rewards: Any, values: Any, gamma: float, gae_lambda: float) -> Any:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, equation 16).

    A_t = d_t + gamma lambda A_(t+1) with d_t = r_t + gamma V_(t+1) - V_t; after the last token V is 0.
    """
    import torch

    found = torch.zeros_like(rewards)
    after, value_after = 0.0, 0.0
    for at in reversed(range(len(rewards))):
        delta = rewards[at] + gamma * value_after - values[at]
        after = delta + gamma * gae_lambda * after
        found[at], value_after = after, values[at]
    return found


def whitened(parts: Sequence[Any]) -> list[Any]:
    """All numbers of the parts with mean 0 and deviation 1: how large rewards are must not set the step."""
    import torch

    every = torch.cat(list(parts))
    scale = every.std(unbiased=False).clamp(min=1e-8)
    return [(part - every.mean()) / scale for part in parts]


def losses(
    log_probs: Any, values: Any, batch: Sequence[Rollout], settings: PpoObjective
) -> tuple[Any, Any, Any]:
    """The clipped losses of each token.

    Policy: -min(q A, clip(q, 1 - e, 1 + e) A) with q the ratio of new to old probability (Schulman et al.
    2017, equation 7). Value: half the larger of the squared errors of the value, and of the value kept within
    value_clip of the old one.

    Args:
        log_probs: [tokens of all answers] of the drawn tokens, now.
        values: [tokens of all answers] of the value head, now.
        batch: the answers, in the same order.
        settings: clip and value_clip.

    Returns:
        Policy losses, value losses, and whether each ratio was outside its clip.
    """
    import torch

    old, expected, advantage, returns = (
        torch.cat([getattr(rollout, name) for rollout in batch])
        for name in ("log_probs", "values", "advantages", "returns")
    )
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    policy = -torch.minimum(ratio * advantage, clipped * advantage)
    kept = expected + (values - expected).clamp(-settings.value_clip, settings.value_clip)
    value = 0.5 * torch.maximum((values - returns) ** 2, (kept - returns) ** 2)
    return policy, value, ratio != clipped
