"""Settings of the objectives: what is optimised. `objective: sft` is short for `objective: {kind: sft}`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from components.shared.settings import Settings


class SftObjective(Settings):
    """Supervised fine-tuning: next-token loss on the assistant's answers alone."""

    kind: Literal["sft"]


class ClassificationObjective(Settings):
    """One label out of several for a text."""

    kind: Literal["classification"]


ObjectiveConfig = Annotated[
    SftObjective | ClassificationObjective,
    Field(discriminator="kind"),
]
