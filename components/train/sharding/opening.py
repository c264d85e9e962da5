"""Where the state of a fit lies: as the `hardware:` section says."""

from __future__ import annotations

from dataclasses import replace

from components.train.ranks import Ranks
from components.train.sharding.config import Sharding
from components.train.sharding.fsdp2 import Fsdp2
from components.train.sharding.whole import Whole
from components.train.sharding.zero import Zero


def open_layout(sharding: Sharding, ranks: Ranks) -> Whole:
    """The layout that settings ask for; one process holds all whatever they say."""
    if sharding.kind == "none" or ranks.count == 1:
        return Whole(ranks)
    together = replace(ranks, in_step=True)
    if sharding.kind == "fsdp2":
        return Fsdp2(together, sharding)
    return Zero(together, sharding)
