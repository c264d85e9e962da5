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
    """One label out of several for a text."""

    kind: Literal["classification"]


ObjectiveConfig = Annotated[
    SftObjective
    | LanguageModelingObjective
    | MaskedLanguageModelingObjective
    | Seq2SeqObjective
    | ClassificationObjective,
    Field(discriminator="kind"),
]
