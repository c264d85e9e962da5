"""Settings of the objectives that compare several answers to one prompt."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from components.shared.settings import Settings


def _compiles(pattern: str | None) -> str | None:
    if pattern is not None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


class AnswerReward(Settings):
    """1 for an answer that says what the data's own answer says, else 0; needs prompt-completion data.

    Args:
        pattern: regular expression; its last match, or the first group of that, is compared, in both. An
            answer without one earns nothing. null: whole texts are compared, without blanks at their ends.
        weight: what it earns is multiplied by it.
    """

    kind: Literal["answer"]
    pattern: str | None = None
    weight: float = Field(1.0, allow_inf_nan=False)

    check_pattern = field_validator("pattern")(_compiles)


class FormatReward(Settings):
    """1 for an answer that a regular expression matches as a whole, else 0.

    Args:
        pattern: the expression; its dots match line ends too.
        weight: what it earns is multiplied by it.
    """

    kind: Literal["format"]
    pattern: str
    weight: float = Field(1.0, allow_inf_nan=False)

    check_pattern = field_validator("pattern")(_compiles)


RuleReward = Annotated[AnswerReward | FormatReward, Field(discriminator="kind")]


class GroupObjective(Settings):
    """The model draws several answers to a prompt, and learns from how they compare: no value is needed.

    A step of the run answers the prompts of its batch once, group_size times each, then makes rollout_epochs
    x minibatches optimizer updates. An answer's reward is the sum of what judges it.

    Args:
        reward_model: of `objective: reward`: a registered model (models:/name@champion), an s3:// prefix or a
            local folder; null for none.
        rewards: rules that judge an answer; see AnswerReward and FormatReward.
        group_size: answers to each prompt.
        max_new_tokens: longest answer; prompt and answer together fit into train.max_length.
        missing_end_penalty: taken from the reward of an answer that max_new_tokens cut.
        rollout_epochs: passes over the answers of a step.
        minibatches: optimizer updates in one such pass.
        clip: how far the ratio of new to old probability counts (Schulman et al. 2017, arXiv:1707.06347,
            equation 7).
    """

    reward_model: str | None = None
    rewards: list[RuleReward] = Field(default_factory=list)
    group_size: int = Field(8, ge=2)
    max_new_tokens: int = Field(64, ge=1)
    missing_end_penalty: float = Field(0.0, ge=0)
    rollout_epochs: int = Field(1, ge=1)
    minibatches: int = Field(1, ge=1)
    clip: float = Field(0.2, gt=0)

    def external_uris(self) -> list[str]:
        """The reward model."""
        return [self.reward_model] if self.reward_model else []

    @model_validator(mode="after")
    def _judged(self) -> GroupObjective:
        if not self.reward_model and not self.rewards:
            raise ValueError("nothing judges the answers: name a reward_model, or rules in rewards")
        return self


class GrpoObjective(GroupObjective):
    """Group relative policy optimisation (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, section 4.1).

    Args:
        kl_weight: of the distance from the base in the loss, p_base/p - log(p_base/p) - 1 at each token
            (there, equation 4).
        scale: an answer's advantage is its reward above its group's mean: `group`, over the group's
            deviation; `none`, as it is, since the deviation makes prompts that are nearly always, or never,
            answered well weigh most (Liu et al. 2025, arXiv:2503.20783, section 3.1).
        loss: what weighs alike: `tokens` of all answers (Yu et al. 2025, arXiv:2503.14476, section 3.3) or
            `answers`, whatever their length, as in the paper's equation 3.
    """

    kind: Literal["grpo"]
    kl_weight: float = Field(0.04, ge=0)
    scale: Literal["group", "none"] = "group"
    loss: Literal["tokens", "answers"] = "tokens"


class RlooObjective(GroupObjective):
    """REINFORCE, leave one out (Ahmadian et al. 2024, arXiv:2402.14740; Kool et al. 2019).

    An answer's advantage is its reward above the mean of the others' in its group; the whole answer is one
    action.

    Args:
        kl_weight: reward that a nat of distance from the base costs.
    """

    kind: Literal["rloo"]
    kl_weight: float = Field(0.05, ge=0)
