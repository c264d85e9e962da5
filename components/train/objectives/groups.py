"""Group relative policy optimisation, and REINFORCE with the others of a group as baseline."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components.shared import causal
from components.shared.causal import Encoded
from components.shared.errors import TuneyardError
from components.train.objectives.answering import GREEDY, SAMPLED, Answering, Judge, Prompt
from components.train.objectives.base import Arithmetic
from components.train.objectives.group_config import AnswerReward, GrpoObjective, RlooObjective, RuleReward

# A rule: (answer, the data's own answer) -> what it earns.
Rule = Callable[[str, str | None], float]
# Added to a deviation, so that a group whose answers earn nearly alike is not blown up; as TRL has it.
_LEAST_DEVIATION = 1e-4


@dataclass(frozen=True)
class Drawn:
    """An answer of a group, and what it was worth.

    Args:
        prompt: token ids.
        answer: token ids that were drawn, the end token among them where there is one.
        log_probs: of each drawn token under the model that drew it.
        base_log_probs: of each under the base.
        advantage: how much better the answer is than its group.
    """

    prompt: list[int]
    answer: list[int]
    log_probs: Any
    base_log_probs: Any
    advantage: float

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def rule_of(settings: RuleReward) -> Rule:
    """A rule as a function."""
    if isinstance(settings, AnswerReward):
        pattern = re.compile(settings.pattern, re.DOTALL) if settings.pattern is not None else None

        def same(answer: str, reference: str | None) -> float:
            assert reference is not None  # _rewards_of has looked
            said = _said(answer, pattern)
            return settings.weight * (said is not None and said == _said(reference, pattern))

        return same
    whole = re.compile(settings.pattern, re.DOTALL)
    return lambda answer, _: settings.weight * (whole.fullmatch(answer) is not None)


def _said(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """What a text says: all of it, or what the last match of a pattern has."""
    if pattern is None:
        return text.strip()
    matches = list(pattern.finditer(text))
    return (matches[-1].group(min(1, pattern.groups)) or "").strip() if matches else None


def relative(rewards: Sequence[float], group_size: int, scale: bool) -> list[float]:
    """Each reward above its group's mean, over its deviation where asked (arXiv:2402.03300, 4.1.2)."""
    import torch

    groups = torch.tensor(rewards, dtype=torch.float64).view(-1, group_size)
    above = groups - groups.mean(1, keepdim=True)
    if scale:
        above = above / (groups.std(1, keepdim=True) + _LEAST_DEVIATION)
    return above.flatten().tolist()


def left_out(rewards: Sequence[float], group_size: int) -> list[float]:
    """Each reward above the mean of the others in its group (RLOO of arXiv:2402.14740)."""
    import torch

    groups = torch.tensor(rewards, dtype=torch.float64).view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten().tolist()


class Grouped(Answering):
    """What both have: a group of answers to each prompt, judged by rules and a reward model."""

    measures = ("policy_loss", "clipped_fraction")
    settings: GrpoObjective | RlooObjective

    def __init__(
        self,
        folder: Path,
        precision: causal.Precision,
        settings: GrpoObjective | RlooObjective,
        judge: Judge | None,
        base_inside: bool,
    ) -> None:
        """Open the model.

        Args:
            folder: of the base model.
            precision: the weights are held in.
            settings: see GroupObjective.
            judge: the reward model; None for rules alone.
            base_inside: whether the base is the model with its adapter switched off; else a copy is kept.
        """
        super().__init__(folder, precision, settings, base_inside)
        self.settings = settings
        self.answers_each = settings.group_size
        self._judge = judge
        self._rules = [rule_of(each) for each in settings.rewards]
        self._compares = any(isinstance(each, AnswerReward) for each in settings.rewards)

    @abstractmethod
    def _advantages(self, earned: Sequence[float], apart: Sequence[float]) -> list[float]:
        """Of answers in groups, by what they earned and how many nats they are from the base."""

    def _rewards_of(
        self, prompts: Sequence[Prompt], answers: Sequence[str], ended: Sequence[bool]
    ) -> list[float]:
        if self._compares and any(prompt.reference is None for prompt in prompts):
            raise TuneyardError(
                "a prompt has no answer in the data that a reward of kind answer could compare with",
                "set ingest.format: prompt-completion",
            )
        asked = [prompt.messages for prompt in prompts]
        found = self._judge(asked, answers, ended) if self._judge else [0.0] * len(answers)
        return [
            reward + sum(rule(answer, prompt.reference) for rule in self._rules)
            for reward, answer, prompt in zip(found, answers, prompts, strict=True)
        ]

    def rehearsed(self, examples: Sequence[Prompt]) -> Sequence[Drawn]:
        """The likeliest answers to these prompts, each as good as the other.

        Advantages of a group sum to 0, and with them the loss at the start: nothing to compare with. So
        does the gradient of answers that are drawn, and what is left of it would be rounding.
        """
        found = self._rollouts(examples, nullcontext, GREEDY)
        return [replace(each, advantage=1.0) for each in found]

    def _rollouts(
        self, prompts: Sequence[Prompt], arithmetic: Arithmetic, temperature: float = SAMPLED
    ) -> list[Drawn]:
        """Drawn answers, those to one prompt beside each other."""
        import torch

        size = self.answers_each
        asked = [prompt for prompt in prompts for _ in range(size)]
        with torch.no_grad(), arithmetic():
            said = self._say(asked, temperature)
            now, base = self._in_parts(said.sequences)
        earned = self._earned(said)
        apart = [float((n - b).sum()) for n, b in zip(now, base, strict=True)]
        groups = [earned[at : at + size] for at in range(0, len(earned), size)]
        self._round = self._noted(said, now, base) | {
            # A group whose answers earn alike teaches nothing.
            "even_groups": sum(min(group) == max(group) for group in groups) / len(groups)
        }
        found = zip(said.sequences, now, base, self._advantages(earned, apart), strict=True)
        return [Drawn(each.prompt, each.answer, n, b, advantage) for each, n, b, advantage in found]

    def _in_parts(self, sequences: Sequence[Encoded]) -> tuple[list[Any], list[Any]]:
        """Log-probabilities of all answers now and under the base, as many at a time as one group has."""
        now: list[Any] = []
        base: list[Any] = []
        for at in range(0, len(sequences), self.answers_each):
            part = sequences[at : at + self.answers_each]
            now += self._log_probs(part)
            base += self._base_log_probs(part)
        return now, base


class Grpo(Grouped):
    """Group relative policy optimisation: see GrpoObjective."""

    settings: GrpoObjective

    def terms(self, encoded: Prompt | Drawn) -> int:
        """The tokens of an answer, or one where answers weigh alike; a prompt that is judged is one."""
        tokens = isinstance(encoded, Drawn) and self.settings.loss == "tokens"
        return len(encoded.answer) if tokens and isinstance(encoded, Drawn) else 1

    def _advantages(self, earned: Sequence[float], apart: Sequence[float]) -> list[float]:
        return relative(earned, self.answers_each, self.settings.scale == "group")

    def _learned_loss(self, said: Sequence[Drawn]) -> Any:
        """-min(q A, clip(q) A) + kl_weight (p_base/p - log(p_base/p) - 1) of each token (equations 3, 4)."""
        import torch

        settings = self.settings
        lengths = torch.tensor([len(each.answer) for each in said])
        now = torch.cat(self._log_probs([Encoded(each.prompt, each.answer) for each in said]))
        old, base = (torch.cat([getattr(each, n) for each in said]) for n in ("log_probs", "base_log_probs"))
        advantage = now.new_tensor([each.advantage for each in said]).repeat_interleave(
            lengths.to(now.device)
        )
        ratio = (now - old).exp()
        clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
        policy = -torch.minimum(ratio * advantage, clipped * advantage)
        distance = (base - now).exp() - (base - now) - 1
        weights = torch.ones_like(now)
        if settings.loss == "answers":
            weights = (1 / lengths.to(now)).repeat_interleave(lengths.to(now.device))
        self.note(
            policy_loss=float((weights * policy).detach().sum()),
            clipped_fraction=float((weights * (ratio != clipped)).sum()),
        )
        return (weights * (policy + settings.kl_weight * distance)).sum()


class Rloo(Grouped):
    """REINFORCE, leave one out: see RlooObjective."""

    settings: RlooObjective

    def terms(self, encoded: Prompt | Drawn) -> int:
        """One answer."""
        return 1

    def _advantages(self, earned: Sequence[float], apart: Sequence[float]) -> list[float]:
        kept = [reward - self.settings.kl_weight * nats for reward, nats in zip(earned, apart, strict=True)]
        return left_out(kept, self.answers_each)

    def _learned_loss(self, said: Sequence[Drawn]) -> Any:
        """-min(q A, clip(q) A) with q the ratio of a whole answer's new to its old probability."""
        import torch

        now = self._log_probs([Encoded(each.prompt, each.answer) for each in said])
        ratio = torch.stack([(n - each.log_probs).sum() for n, each in zip(now, said, strict=True)]).exp()
        clipped = ratio.clamp(1 - self.settings.clip, 1 + self.settings.clip)
        advantage = ratio.new_tensor([each.advantage for each in said])
        policy = -torch.minimum(ratio * advantage, clipped * advantage)
        self.note(policy_loss=float(policy.detach().sum()), clipped_fraction=float((ratio != clipped).sum()))
        return policy.sum()
