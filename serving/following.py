"""Following the store: what is written in `deployments/` is what this replica serves, seconds later."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from components.shared import deployments
from components.shared.errors import TuneyardError
from components.shared.store import Store
from serving.catalogue import Catalogue

log = logging.getLogger("tuneyard.serving")

# One request to the store each time, whatever is deployed: at 3 s about 0.9 million a month and replica.
FOLLOW_SECONDS = 3.0
_RETRY_SECONDS = (1, 5, 10, 30, 60)


@dataclass
class Try:
    """What became of a document: its tag, failures so far, and when to try again (never, when it worked)."""

    tag: str
    failures: int = 0
    again: float = float("inf")


class Follower:
    """Brings a catalogue to what the store says, and keeps it there.

    Args:
        catalogue: of this replica.
        open_store: gives the artifact store; called in the follower's thread.
    """

    def __init__(self, catalogue: Catalogue, open_store: Callable[[], Store]) -> None:
        self._catalogue, self._open_store = catalogue, open_store
        self._tries: dict[str, Try] = {}
        self._stopping = threading.Event()

    def start(self) -> None:
        """Follow in a thread of its own."""
        threading.Thread(target=self._run, name="follow", daemon=True).start()

    def stop(self) -> None:
        """Change nothing any more."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.look()
            # Not all replicas at the same moment.
            self._stopping.wait(FOLLOW_SECONDS * random.uniform(0.8, 1.2))

    def look(self) -> None:
        """Look once, and bring what differs."""
        try:
            tags = deployments.listed(self._open_store().impatient())
        except Exception as error:  # the store may come up later than the server, or be away for a while
            log.warning("deployments cannot be listed: %s", error)
            self._catalogue.not_listed(f"deployments cannot be listed ({type(error).__name__})")
            return
        self._catalogue.listed(set(tags))
        # Also what is gone from the store.
        for name in sorted(set(tags) | set(self._tries)):
            if self._stopping.is_set():
                return
            if self._due(name, tags.get(name, "")):
                self._bring(name, tags.get(name, ""))

    def _due(self, name: str, tag: str) -> bool:
        tried = self._tries.get(name)
        if tried is None or tried.tag != tag or time.monotonic() >= tried.again:
            return True
        return self._catalogue.has_dead(name)

    def _bring(self, name: str, tag: str) -> None:
        before = self._tries.get(name)
        failures = before.failures if before is not None and before.tag == tag else 0
        try:
            self._catalogue.follow(name)
        except Exception as error:
            known = isinstance(error, TuneyardError)
            log.warning("%s cannot be put in service: %s", name, error, exc_info=not known)
            wait = _RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)]
            self._tries[name] = Try(tag, failures + 1, time.monotonic() + wait)
        else:
            if tag:
                self._tries[name] = Try(tag)
            else:
                self._tries.pop(name, None)
