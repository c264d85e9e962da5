"""Settings of sharding: what of a training lies in pieces among its processes, and who does it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from components.shared.settings import Settings

Kind = Literal["none", "fsdp2", "zero1", "zero2", "zero3"]
Offload = Literal["none", "cpu"]

# Environment variable of a train stage on one machine with a `Processes` as JSON.
HERE = "TUNEYARD_TRAIN_PROCESSES"
# Objectives whose loss is a sum of forward passes that are alike in every process. The others read the whole
# base beforehand (dpo, ppo), other processes' examples (contrastive) or gradients (multi-task).
OBJECTIVES = (
    "sft",
    "language-modeling",
    "masked-language-modeling",
    "seq2seq",
    "classification",
    "regression",
    "token-classification",
    "reward",
)
# Adapters whose weights all are ordinary ones in the layers, and move from the first update to the last.
ADAPTERS = ("full", "lora", "last_layers")


class Sharding(Settings):
    """How the state of a training is cut up among its processes, as accelerate names it.

    Args:
        kind: `none`: every process holds all, gradients are summed. `fsdp2`: weights, gradients and optimizer
            state in pieces, by PyTorch's `fully_shard`. `zero1`: the optimizer's state (DeepSpeed); `zero2`:
            and gradients; `zero3`: and weights (Rajbhandari et al. 2020, arXiv:1910.02054, section 5).
        offload: `cpu`: what lies in pieces is kept in the memory of the host, and the update is computed
            there; of `zero1` and `zero2` the optimizer's state and gradients, of the others the weights too.
    """

    kind: Kind = "none"
    offload: Offload = "none"

    @property
    def weights(self) -> bool:
        """Whether the weights are in pieces, so that no GPU need hold the whole model."""
        return self.kind in ("fsdp2", "zero3")


WHOLE = Sharding()


class Processes(Settings):
    """What a pipeline file asks of one machine.

    Args:
        count: one for each GPU.
        sharding: what lies in pieces among them.
    """

    count: int
    sharding: Sharding = WHOLE


def misfits(
    hardware: Mapping[str, Any], train: Mapping[str, Any], objective: str, adapter: str
) -> Iterator[tuple[tuple[str, ...], str]]:
    """(key path, what is wrong) for what a pipeline file asks of sharding and cannot have.

    Args:
        hardware: the section as the file has it.
        train: the section as the file has it.
        objective: its kind.
        adapter: its kind.
    """
    kind, offload = hardware.get("sharding", "none"), hardware.get("offload", "none")
    if offload == "cpu" and kind == "none":
        yield ("hardware", "offload"), "there are no pieces to offload: set hardware.sharding, or drop it"
    if kind not in get_args(Kind) or kind == "none":
        return
    at = ("hardware", "sharding")
    processes = [hardware.get("nodes", 1), hardware.get("gpus_per_node", 1)]
    if all(isinstance(n, int) for n in processes) and processes[0] * processes[1] < 2:
        yield at, f"{kind} cuts a training up among GPUs: ask for two or more (gpus_per_node), or drop it"
    if objective and objective not in OBJECTIVES:
        what = f"{objective} computes on whole weights; {kind} goes with {', '.join(OBJECTIVES)}"
        yield at, f"{what}: set sharding: none"
    if adapter and adapter not in ADAPTERS:
        yield at, f"adapter {adapter} cannot be cut up; {kind} goes with {', '.join(ADAPTERS)}"
    own = train.get("adapter")
    if isinstance(own, Mapping) and own.get("dora"):
        yield (
            ("train", "adapter", "dora"),
            f"its magnitudes read whole weights, which {kind} cuts up; drop one",
        )
    if train.get("first"):
        yield (
            ("train", "first"),
            f"its phase hands over whole weights, which {kind} cuts up: make it a pipeline of its own",
        )
    if train.get("learning_rate") == "auto":
        yield (
            ("train", "learning_rate"),
            f"auto tries rates on whole weights, which {kind} cuts up: set a number",
        )
    retain = train.get("retain")
    for name in ("ewc", "distil_from_base"):
        if isinstance(retain, Mapping) and retain.get(name):
            todo = "use retain.replay, or sharding: none"
            yield (
                ("train", "retain", name),
                f"it holds the base's weights whole, which {kind} cuts up: {todo}",
            )
