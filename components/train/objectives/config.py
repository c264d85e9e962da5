"""Settings of the objectives: what is optimised. `objective: sft` is short for `objective: {kind: sft}`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.shared.settings import Settings


class SftObjective(Settings):
    """Supervised fine-tuning: next-token loss on the assistant's answers alone."""

    kind: Literal["sft"]


class ClassificationObjective(Settings):
    """One label out of several for a text."""

    kind: Literal["classification"]


class PairMargin(Settings):
    """By how many nats a chosen answer shall win: the log-odds of a pair are lowered by this much.

    -log s(z - margin): a margin makes the model pull the answers of a pair further apart. Constant or by the
    scores that the pair's answers were given: the offset of ODPO (Amini et al. 2024, arXiv:2402.10571,
    section 3, with the identity for its function of the scores) and the margin of Llama 2's reward model
    (Touvron et al. 2023, arXiv:2307.09288, section 3.2.2).

    Args:
        reward_margin: of every pair.
        score_weight: nats for each point that chosen_score is above rejected_score; 0: scores are not used.
    """

    reward_margin: float = Field(0.0, ge=0)
    score_weight: float = Field(0.0, ge=0)


class DpoObjective(PairMargin):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290).

    train.label_smoothing is the rate at which labels are taken to be wrong (conservative DPO).

    Args:
        beta: reward in nats for each nat that an answer is likelier than under the base; the smaller, the
            further the model may go from its base.
        loss: `sigmoid` is that of DPO, over summed log-likelihoods; `ipo` draws the gap of mean
            log-likelihoods to 1 / (2 beta) and so cannot run away on pairs that nobody disputes (Azar et al.
            2023, arXiv:2310.12036, equation 17; by token, as its authors advise).
    """

    kind: Literal["dpo"]
    beta: float = Field(0.1, gt=0)
    loss: Literal["sigmoid", "ipo"] = "sigmoid"

    @model_validator(mode="after")
    def _one_target(self) -> DpoObjective:
        if self.loss == "ipo" and (self.reward_margin or self.score_weight):
            raise ValueError(
                f"reward_margin ({self.reward_margin:g}) and score_weight ({self.score_weight:g}) mean "
                "nothing to loss ipo, whose own margin is 1 / (2 beta); drop them, or set loss: sigmoid"
            )
        return self


class RewardObjective(PairMargin):
    """A reward model from preferences (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).

    train.label_smoothing is the rate at which labels are taken to be wrong.

    Args:
        centre_weight: of (chosen + rejected)^2 in the loss, which only knows differences: it keeps rewards
            around 0 (Eisenstein et al. 2023, arXiv:2312.09244, section 2).
    """

    kind: Literal["reward"]
    centre_weight: float = Field(0.01, ge=0)


ObjectiveConfig = Annotated[
    SftObjective | ClassificationObjective | DpoObjective | RewardObjective,
    Field(discriminator="kind"),
]
