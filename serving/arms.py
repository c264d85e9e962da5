"""The versions of one model in service, and what is told of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from components.shared.deployments import Canary
from components.shared.modelcard import ModelCard
from serving.identity import Identity
from serving.loading import Served
from serving.routing import Choice, position


@dataclass(frozen=True)
class Entry:
    """A version in memory, its card, and when it was put there (seconds since 1970)."""

    served: Served
    card: ModelCard
    since: int

    @property
    def identity(self) -> Identity:
        """Whose answers these are."""
        return self.served.identity


@dataclass(frozen=True)
class Arms:
    """What is in service under one name.

    Args:
        stable: answers what the canary does not.
        canary: None most of the time.
        share: what was said of the canary when it came; None without one.
    """

    stable: Entry
    canary: Entry | None = None
    share: Canary | None = None

    @property
    def entries(self) -> list[Entry]:
        """All of them."""
        return [self.stable] if self.canary is None else [self.stable, self.canary]

    @property
    def weight(self) -> float:
        """The canary's share of the requests now."""
        return self.share.weight_now() if self.share and self.canary and self.canary.served.alive else 0.0

    def choose(self, choice: Choice) -> Entry | None:
        """Who answers; None when the version that was asked for is not here."""
        if choice.version:
            return next((e for e in self.entries if e.identity.version == choice.version), None)
        if self.canary and position(self.canary.identity.digest, choice.conversation) < self.weight:
            return self.canary
        return self.stable


def state(name: str, arms: Arms, refused: str) -> dict[str, Any]:
    """What is told of a model in service.

    Args:
        name: of the model.
        arms: its versions.
        refused: why what should be in service is not; empty when it is.
    """
    served = arms.stable.served
    return {
        **_facts(arms.stable),
        "name": name,
        "ready": served.alive,
        "reason": "" if served.alive else "its worker has ended",
        "refused": refused,
        "since": arms.stable.since,
        "canary": None if arms.canary is None else {**_facts(arms.canary), "weight": arms.weight},
    }


def absent(name: str, reason: str, refused: bool) -> dict[str, Any]:
    """What is told of a model that should be in service and is not."""
    nothing = {"version": "", "digest": "", "task": "", "waiting": 0, "in_flight": 0, "since": 0, "drift": {}}
    told = {"name": name, "ready": False, "reason": reason, "refused": reason if refused else ""}
    return {**nothing, **told, "canary": None}


def _facts(entry: Entry) -> dict[str, Any]:
    served = entry.served
    return {
        "version": served.identity.version,
        "digest": served.identity.digest,
        "task": served.task,
        "ready": served.alive,
        "waiting": served.waiting,
        "in_flight": served.in_flight,
        "drift": served.inputs.readings(),
    }
