"""Proximal policy optimisation of a causal language model against a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from components.shared import causal
from components.shared.causal import Encoded
from components.train.objectives import advantages
from components.train.objectives.advantages import Rollout
from components.train.objectives.answering import GREEDY, SAMPLED, Answering, Judge, Prompt
from components.train.objectives.base import Arithmetic
from components.train.objectives.config import PpoObjective


class Ppo(Answering):
    """Answers that earned more than expected become likelier."""

    measures = ("policy_loss", "value_loss", "clipped_fraction")

    def __init__(
        self,
        folder: Path,
        precision: causal.Precision,
        settings: PpoObjective,
        judge: Judge,
        base_inside: bool,
    ) -> None:
        """Open the model.

        Args:
            folder: of the base model.
            precision: the weights are held in.
            settings: see PpoObjective.
            judge: gives rewards.
            base_inside: whether the base is the model with its adapter switched off; else a copy is kept.
        """
        super().__init__(folder, precision, settings, base_inside)
        self.settings, self._judge = settings, judge

    def terms(self, encoded: Prompt | Rollout) -> int:
        """The tokens of an answer; a prompt that is judged is one."""
        return len(encoded.answer) if isinstance(encoded, Rollout) else 1

    def start(self) -> None:
        """Add the value head: the state before a token -> what will be earned from there; 0 at first."""
        import torch

        width = self.model.get_input_embeddings().embedding_dim
        head = torch.nn.Linear(width, 1, device=causal.device())
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        self.model.value_head = head

    def finish(self) -> None:
        """Take the value head off: only training needs it."""
        del self.model.value_head

    def rehearsed(self, examples: Sequence[Prompt]) -> Sequence[Rollout]:
        """The likeliest answers to these prompts, each token as good as the other.

        Whitened advantages sum to 0, and with them the loss at the start: nothing to compare with. So does
        the gradient of answers that are drawn, and what is left of it would be rounding.
        """
        return [
            replace(found, advantages=found.advantages * 0 + 1, returns=found.values + 1)
            for found in self._rollouts(examples, nullcontext, GREEDY)
        ]

    def _rewards_of(
        self, prompts: Sequence[Prompt], answers: Sequence[str], ended: Sequence[bool]
    ) -> list[float]:
        return self._judge([prompt.messages for prompt in prompts], answers, ended)

    def _rollouts(
        self, prompts: Sequence[Prompt], arithmetic: Arithmetic, temperature: float = SAMPLED
    ) -> list[Rollout]:
        """Sampled answers with their advantages, these whitened over all of them."""
        import torch

        settings = self.settings
        with torch.no_grad(), arithmetic():
            said = self._say(prompts, temperature)
            log_probs, values = self._read(said.sequences)
            base = self._base_log_probs(said.sequences)
        per_token = [
            advantages.token_rewards(reward, now, before, settings.kl_weight)
            for reward, now, before in zip(self._earned(said), log_probs, base, strict=True)
        ]
        found = [
            advantages.advantages(reward, value, settings.gamma, settings.gae_lambda)
            for reward, value in zip(per_token, values, strict=True)
        ]
        self._round = self._noted(said, log_probs, base)
        return [
            Rollout(sequence.prompt, sequence.answer, now, value, white, advantage + value)
            for sequence, now, value, white, advantage in zip(
                said.sequences, log_probs, values, advantages.whitened(found), found, strict=True
            )
        ]

    def _read(self, sequences: Sequence[Encoded]) -> tuple[list[Any], list[Any]]:
        """Log-probability of each answer token and the value before it, by answer."""
        import torch

        states, log_probs, lengths = self._states(sequences, self.model)
        with torch.autocast(states.device.type, enabled=False):
            values = self.model.value_head(states.float())[:, 0]
        return list(log_probs.split(lengths)), list(values.split(lengths))

    def _learned_loss(self, said: Sequence[Rollout]) -> Any:
        import torch

        log_probs, values = self._read([Encoded(each.prompt, each.answer) for each in said])
        policy, value, outside = advantages.losses(
            torch.cat(log_probs), torch.cat(values), said, self.settings
        )
        self.note(
            policy_loss=float(policy.detach().sum()),
            value_loss=float(value.detach().sum()),
            clipped_fraction=float(outside.sum()),
        )
        return (policy + self.settings.value_weight * value).sum()
