"""Settings of the objectives: what is optimised. `objective: sft` is short for `objective: {kind: sft}`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from components.shared.settings import Settings


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


ObjectiveConfig = Annotated[
    SftObjective
    | LanguageModelingObjective
    | MaskedLanguageModelingObjective
    | Seq2SeqObjective
    | ClassificationObjective
    | RegressionObjective
    | TokenClassificationObjective
    | ContrastiveObjective
    | MultiTaskObjective,
    Field(discriminator="kind"),
]
