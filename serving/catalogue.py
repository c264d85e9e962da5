"""The models in service, and how one replaces another.

What should be served is written in the artifact store (components/shared/deployments.py); the server itself
has no state worth keeping. `following.py` looks there every few seconds, POST /admin/deploy at once: both
call `follow`, and nothing else changes what is in service.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from components.shared import deployments
from components.shared.deployments import DeployedVersion, Deployment
from components.shared.errors import StoreError, TuneyardError
from components.shared.store import Store
from serving import arms
from serving.arms import Arms, Entry
from serving.causal import CausalModel
from serving.classifier import Classifier
from serving.faults import Fault
from serving.identity import Identity, checked_name
from serving.loading import open_model
from serving.routing import Choice
from serving.telemetry import Telemetry

log = logging.getLogger("tuneyard.serving")

_STOP_SECONDS = 5.0


class Catalogue:
    """See the module.

    Args:
        open_store: gives the artifact store; called in the thread that loads.
    """

    def __init__(self, open_store: Callable[[], Store]) -> None:
        self._open_store = open_store
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._arms: dict[str, Arms] = {}
        self._missing: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._stopping = threading.Event()
        self._listed = False
        self._trouble = "looking for deployments"
        self.telemetry = Telemetry(self.states)

    # --- what is there --------------------------------------------------------------------------

    def get(self, name: str) -> Arms:
        """What is in service under a name.

        Raises:
            Fault: 404 for a name that nobody deployed, 503 for one that is not loaded (yet).
        """
        found = self._arms.get(name)
        if found is not None:
            return found
        shown = name[:80]
        if self._stopping.is_set() or name in self._missing or not self._listed:
            reason = self._missing.get(name) or self._trouble
            raise Fault(
                503, f"model {shown!r} is not ready: {reason}", "model", "not_ready", {"Retry-After": "2"}
            )
        known = sorted(self._arms)
        raise Fault(404, f"there is no model {shown!r} here; in service: {known}", "model", "model_not_found")

    def choose(self, name: str, choice: Choice) -> Entry:
        """The version that answers a request.

        Raises:
            Fault: 404 for a version that is not here; see get.
        """
        found = self.get(name)
        entry = found.choose(choice)
        if entry is None:
            here = [entry.identity.version for entry in found.entries]
            message = f"{name!r} has no version {choice.version[:80]!r} in service, only {here}"
            raise Fault(404, message, "model", "version_not_found")
        return entry

    def causal(self, name: str, choice: Choice) -> CausalModel:
        """A model that generates text.

        Raises:
            Fault: 400 for a classifier; see choose.
        """
        served = self.choose(name, choice).served
        if not isinstance(served, CausalModel):
            raise Fault(
                400, f"{name!r} is a classifier; POST to /v2/models/{name}/infer", "model", "wrong_task"
            )
        return served

    def classifier(self, name: str, choice: Choice) -> Classifier:
        """A model that classifies text.

        Raises:
            Fault: 400 for a causal model; see choose.
        """
        served = self.choose(name, choice).served
        if not isinstance(served, Classifier):
            message = f"{name!r} generates text; POST to /v1/chat/completions or /v1/completions"
            raise Fault(400, message, "model", "wrong_task")
        return served

    def states(self) -> list[dict[str, Any]]:
        """Every model that is or should be in service, by name."""
        with self._lock:
            here, missing, refused = dict(self._arms), dict(self._missing), dict(self._refused)
        found = [arms.state(name, each, refused.get(name, "")) for name, each in here.items()]
        found += [
            arms.absent(name, reason, name in refused) for name, reason in missing.items() if name not in here
        ]
        return sorted(found, key=lambda state: str(state["name"]))

    def not_ready(self) -> list[str]:
        """Why the server is not ready; empty when it is."""
        if self._stopping.is_set():
            return ["the server is stopping"]
        if not self._listed:
            return [self._trouble]
        states = self.states()
        if not states:
            return ["no model deployed"]
        return [f"{state['name']}: {state['reason']}" for state in states if not state["ready"]]

    def has_dead(self, name: str) -> bool:
        """Whether the worker of a version in service has ended."""
        found = self._arms.get(name)
        return found is not None and not all(entry.served.alive for entry in found.entries)

    # --- changing it ----------------------------------------------------------------------------

    def not_listed(self, trouble: str) -> None:
        """The store did not say what should be served."""
        self._trouble = trouble

    def listed(self, names: set[str]) -> None:
        """The store said for which names something should be served."""
        with self._lock:
            wanted = names - set(self._arms)
            self._missing = {name: self._missing.get(name, "loading") for name in wanted}
            self._listed, self._trouble = True, "not loaded"

    def follow_soon(self, name: str) -> Future[dict[str, Any] | None]:
        """`follow` in a thread of its own, which a stopping server does not wait for."""
        future: Future[dict[str, Any] | None] = Future()

        def run() -> None:
            try:
                future.set_result(self.follow(name))
            except BaseException as error:  # carried to whoever waits for the future
                future.set_exception(error)

        threading.Thread(target=run, name=f"follow-{name}", daemon=True).start()
        return future

    def follow(self, name: str) -> dict[str, Any] | None:
        """Do what the store says of a name. On any failure what was served before stays.

        Returns:
            The model's state, `loaded` (False when all of it was in service already) and `seconds`; None when
            nothing should be served, and nothing is any more.

        Raises:
            TuneyardError: a version cannot be served.
        """
        started = time.monotonic()
        checked_name(name)
        with self._loading:
            try:
                store = self._open_store()
                wanted = deployments.read(name, store)
                loaded = self._retire(name) if wanted is None else self._bring(wanted, store)
            except Exception as error:
                self._note_failure(name, error)
                raise
            with self._lock:
                self._refused.pop(name, None)
                self._missing.pop(name, None)
        if wanted is None:
            return None
        seconds = round(time.monotonic() - started, 3)
        return {**arms.state(name, self.get(name), ""), "loaded": loaded, "seconds": seconds}

    def close(self) -> None:
        """Take everything out of service; answers that are not complete by now end with an error."""
        self._stopping.set()
        with self._lock:
            here, self._arms = list(self._arms.values()), {}
        for entry in (entry for each in here for entry in each.entries):
            entry.served.abort(_STOP_SECONDS)

    def _note_failure(self, name: str, error: Exception) -> None:
        reason = error.what if isinstance(error, TuneyardError) else f"{type(error).__name__}: {error}"
        with self._lock:
            if name not in self._arms:
                self._missing[name] = reason
            if not isinstance(error, StoreError):
                self._refused[name] = reason

    def _retire(self, name: str) -> bool:
        with self._lock:
            found = self._arms.pop(name, None)
        for entry in found.entries if found else []:
            entry.served.close()
            log.info("%s: taken out of service", entry.identity)
        return False

    def _bring(self, wanted: Deployment, store: Store) -> bool:
        """Load what is missing and swap: never more than two versions, an unwanted canary goes first."""
        versions = [wanted, wanted.canary] if wanted.canary else [wanted]
        identities = [_identity(wanted.name, version) for version in versions]
        now = self._arms.get(wanted.name)
        if now and now.canary and now.canary.identity not in identities:
            now = replace(now, canary=None, share=None)
            self._swap(wanted.name, now)
        present = {entry.identity: entry for entry in (now.entries if now else []) if entry.served.alive}
        stable = present.get(identities[0]) or self._open(identities[0], wanted, store)
        if wanted.canary is None:
            self._swap(wanted.name, Arms(stable))
        else:
            canary = present.get(identities[1])
            if canary is None:
                self._swap(wanted.name, Arms(stable))
                canary = self._open(identities[1], wanted.canary, store)
            self._swap(wanted.name, Arms(stable, canary, wanted.canary))
        return any(identity not in present for identity in identities)

    def _open(self, identity: Identity, version: DeployedVersion, store: Store) -> Entry:
        counter = self.telemetry.tokens.labels(identity.name, identity.version)
        served, card = open_model(identity, version.manifest, store, counter.inc)
        return Entry(served, card, int(time.time()))

    def _swap(self, name: str, new: Arms) -> None:
        """Put versions in service from this moment on; those that are out of it finish what they accepted."""
        with self._lock:
            stopping, old = self._stopping.is_set(), self._arms.get(name)
            if not stopping:
                self._arms[name] = new
        kept = [] if stopping else [entry.served for entry in new.entries]
        gone = [entry for entry in [*(old.entries if old else []), *new.entries] if entry.served not in kept]
        for entry in gone:
            entry.served.close()
        if stopping:
            raise Fault(503, "the server is stopping", code="stopping")


def _identity(name: str, version: DeployedVersion) -> Identity:
    return Identity(name, str(version.version), version.digest)
