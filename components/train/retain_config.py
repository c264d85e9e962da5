"""Settings of the retention set: what must not be forgotten, and what it does not go with."""

from __future__ import annotations

from pydantic import Field

from components.shared import tasks
from components.shared.settings import Settings
from components.train.adapters.config import AdapterConfig, SoftPrompt

# Objectives that implement `outputs`: the base, without a new head, predicts the same.
_PREDICTED = ("sft",)


class Retain(Settings):
    """A set of examples that the model must not forget, and how it is held to it.

    The loss on some of them is judged beside eval. The three ways can be had together; with none of them
    forgetting is only measured.

    Args:
        source: s3:// prefix, local folder or file: JSON lines with the fields of the objective's data.
        judged_examples: how many are judged, at most half of them; they are never trained on.
        replay: fraction (0-1) of the examples of all updates that come from the set; 0 for none. A hundredth
            helps already.
        ewc: strength of elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796, lambda of
            equation 3), which holds weights that matter for the set near the base's; 0 for none. Its scale
            depends on the model: compare `ewc_penalty`, in the curves, with the loss.
        fisher_examples: how many examples tell which weights matter.
        distil_from_base: weight of the mean divergence, in nats, of the model's predictions from the base's,
            on all examples of an update (Li and Hoiem 2016, arXiv:1606.09282); 0 for none. It costs about
            as much again as the update.
    """

    source: str
    judged_examples: int = Field(32, ge=1)
    replay: float = Field(0.0, ge=0, lt=1)
    ewc: float = Field(0.0, ge=0, allow_inf_nan=False)
    fisher_examples: int = Field(64, ge=1)
    distil_from_base: float = Field(0.0, ge=0, allow_inf_nan=False)


def faults(retain: Retain, objective: str, adapter: AdapterConfig) -> list[str]:
    """What of a retention set's settings does not go with the rest, and what would.

    Args:
        retain: the settings.
        objective: its kind.
        adapter: which weights move.
    """
    found = []
    if retain.distil_from_base and objective not in _PREDICTED:
        found.append(
            f"retain.distil_from_base ({retain.distil_from_base:g}) needs a base that predicts what "
            f"{objective} trains (it goes with {', '.join(_PREDICTED)}): use retain.replay"
            + ("" if _no_fisher(objective, adapter) else " or retain.ewc")
        )
    if retain.ewc and (why := _no_fisher(objective, adapter)):
        found.append(f"retain.ewc ({retain.ewc:g}) {why}")
    return found


def _no_fisher(objective: str, adapter: AdapterConfig) -> str:
    """Why a Fisher information of the base's weights would say nothing; empty where it is one."""
    if objective in tasks.ANSWERING:
        return (
            f"asks how likely the set's own answers are, and {objective} is given prompts, whose answers are "
            "yet to be drawn: use retain.replay, and objective.kl_weight, which holds the model to its base"
        )
    if objective == "contrastive":
        return (
            "asks for the loss of each pair by itself, and that of contrastive comes from the other pairs of "
            "its update: use retain.replay"
        )
    if isinstance(adapter, SoftPrompt):
        other = " or retain.distil_from_base" if objective in _PREDICTED else ""
        return (
            f"holds weights near the base's, and those of adapter {adapter.kind} begin at random, which is "
            f"no base: use retain.replay{other}"
        )
    return ""
