"""Settings of the objectives: what is optimised. `objective: sft` is short for `objective: {kind: sft}`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.shared.settings import Settings
from components.train.objectives.distillation_config import (
    ClassificationDistillationObjective,
    DistillationObjective,
)
from components.train.objectives.group_config import GrpoObjective, RlooObjective
from components.train.objectives.media_config import ImageClassificationObjective, SpeechRecognitionObjective


class SftObjective(Settings):
    """Supervised fine-tuning: next-token loss on the assistant's answers alone.

    Args:
        loss_on: `all` answers of a conversation, calls of tools among them, or its `last` one.
        loss_on_reasoning: whether the `reasoning` of prompt-completion data carries loss as the answer does;
            false gives it as context.
    """

    kind: Literal["sft"]
    loss_on: Literal["all", "last"] = "all"
    loss_on_reasoning: bool = True


class LanguageModelingObjective(Settings):
    """Continued pre-training: next-token loss on every token of whole documents (arXiv:2004.10964).

    One that is longer than train.max_length is split into pieces; its loss is the mean over its tokens in all
    of them.
    """

    kind: Literal["language-modeling"]


class MaskedLanguageModelingObjective(Settings):
    """Continued pre-training of an encoder: it names hidden tokens of whole documents (arXiv:1810.04805).

    Args:
        fraction: of the tokens that are hidden, 0-1; of these 80% become the mask, 10% some other token, and
            10% stay (there, section 3.1).
    """

    kind: Literal["masked-language-modeling"]
    fraction: float = Field(0.15, gt=0, lt=1)


class Seq2SeqObjective(Settings):
    """An encoder-decoder model writes the completion of what it reads; loss on the completion."""

    kind: Literal["seq2seq"]


class ClassificationObjective(Settings):
    """One label out of several for a text.

    Args:
        class_weights: what each text's loss is multiplied by, for classes that are rare: `balanced` (all
            classes weigh alike in sum; after King and Zeng 2001), or {label: weight}, 1 where not named. They
            are scaled to 1 on average over train; null: none.
    """

    kind: Literal["classification"]
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None


class RegressionObjective(Settings):
    """A number for a text; it is learnt in deviations from train's mean, and comes out in the data's units.

    Args:
        loss: `mse`, the squared error, or `huber`, which is linear beyond `huber_delta`, so that a few wild
            scores do not decide (Huber 1964, section 3).
        huber_delta: in standard deviations of train's scores.
    """

    kind: Literal["regression"]
    loss: Literal["mse", "huber"] = "mse"
    huber_delta: float = Field(1.0, gt=0)


class TokenClassificationObjective(Settings):
    """Entities of a text, as BIO tags of its words (Ramshaw and Marcus 1995, arXiv:cmp-lg/9505040)."""

    kind: Literal["token-classification"]


class ContrastiveObjective(Settings):
    """Vectors that are near for texts that belong together: InfoNCE (arXiv:1807.03748).

    The other pairs of an optimizer update are the negatives of each: per_device_batch_size x
    gradient_accumulation_steps of them.

    Args:
        temperature: cosines are divided by it; 0.05 is that of SimCSE (Gao et al. 2021, arXiv:2104.08821).
        symmetric: also find the anchor for each positive.
    """

    kind: Literal["contrastive"]
    temperature: float = Field(0.05, gt=0)
    symmetric: bool = False


class TaskHead(Settings):
    """One task of several.

    Args:
        head: `classification` (labels are names) or `regression` (labels are numbers).
        weight: its loss is multiplied by it.
    """

    head: Literal["classification", "regression"] = "classification"
    weight: float = Field(1.0, gt=0)


class MultiTaskObjective(Settings):
    """Several classifications and regressions on one encoder.

    Args:
        tasks: name of a task in the data -> its head; one that is not named is a classification of weight 1.
        weighting: `fixed`, or `uncertainty`: weights learn beside the model (arXiv:1705.07115).
        gradients: `sum`, or `pcgrad`: what points against another task's gradient is projected away first
            (arXiv:2001.06782); it holds a gradient for each task.
        conditioning: `none`, or `name`: the encoder reads the task's name before the text.
    """

    kind: Literal["multi-task"]
    tasks: dict[str, TaskHead] = Field(default_factory=dict)
    weighting: Literal["fixed", "uncertainty"] = "fixed"
    gradients: Literal["sum", "pcgrad"] = "sum"
    conditioning: Literal["none", "name"] = "none"


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


class PpoObjective(Settings):
    """Proximal policy optimisation against a reward model (Schulman et al. 2017, arXiv:1707.06347).

    The reward of an answer comes with its last token; each token costs kl_weight log(p / p_base), so that the
    model stays near what it could say before (Ouyang et al. 2022, arXiv:2203.02155, section 3.5). A step of
    the run answers the prompts of its batch once, then makes rollout_epochs x minibatches optimizer updates.

    Args:
        reward_model: of `objective: reward`: a registered model (models:/name@champion), an s3:// prefix or a
            local folder.
        max_new_tokens: longest answer; prompt and answer together fit into train.max_length.
        kl_weight: reward that a nat of distance from the base costs.
        missing_end_penalty: taken from the reward of an answer that max_new_tokens cut.
        rollout_epochs: passes over the answers of a step.
        minibatches: optimizer updates in one such pass.
        clip: how far the ratio of new to old probability counts (epsilon of equation 7).
        value_clip: how far the value may move from what it was, for the loss.
        value_weight: of the value's squared error beside the policy's loss (c1 of equation 9).
        gamma: discount of later rewards.
        gae_lambda: of generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, equation 16).
    """

    kind: Literal["ppo"]
    reward_model: str
    max_new_tokens: int = Field(64, ge=1)
    kl_weight: float = Field(0.05, ge=0)
    missing_end_penalty: float = Field(0.0, ge=0)
    rollout_epochs: int = Field(4, ge=1)
    minibatches: int = Field(1, ge=1)
    clip: float = Field(0.2, gt=0)
    value_clip: float = Field(0.2, gt=0)
    value_weight: float = Field(0.1, ge=0)
    gamma: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)

    def external_uris(self) -> list[str]:
        """The reward model."""
        return [self.reward_model]


ObjectiveConfig = Annotated[
    SftObjective
    | LanguageModelingObjective
    | MaskedLanguageModelingObjective
    | Seq2SeqObjective
    | ClassificationObjective
    | RegressionObjective
    | TokenClassificationObjective
    | ContrastiveObjective
    | MultiTaskObjective
    | DpoObjective
    | RewardObjective
    | PpoObjective
    | GrpoObjective
    | RlooObjective
    | DistillationObjective
    | ClassificationDistillationObjective
    | ImageClassificationObjective
    | SpeechRecognitionObjective,
    Field(discriminator="kind"),
]
