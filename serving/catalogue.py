"""The models in service, and how one replaces another.

What should be served is written in the artifact store (`deployments/<name>.json`, by the deploy stage); the
server itself has no state worth keeping.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from components.shared.store import Store
from serving.causal import CausalModel
from serving.classifier import Classifier
from serving.faults import Fault
from serving.identity import Identity, checked_name
from serving.loading import Served, open_model
from serving.telemetry import Telemetry

log = logging.getLogger("tuneyard.serving")

DEPLOYMENTS = "deployments/"
_RETRY_SECONDS = (1, 2, 5, 10, 30)
_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Entry:
    """A model in service, its card, and when it was put there (seconds since 1970)."""

    served: Served
    card: ModelCard
    since: int


class Catalogue:
    """See the module.

    Args:
        open_store: gives the artifact store; called in the thread that loads.
    """

    def __init__(self, open_store: Callable[[], Store]) -> None:
        self._open_store = open_store
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._missing: dict[str, str] = {}
        self._stopping = threading.Event()
        self._listed = False
        self._trouble = "looking for deployments"
        self.telemetry = Telemetry(self.states)

    # --- what is there --------------------------------------------------------------------------

    def get(self, name: str) -> Entry:
        """The model in service under a name.

        Raises:
            Fault: 404 for a name that nobody deployed, 503 for one that is not loaded (yet).
        """
        entry = self._entries.get(name)
        if entry is not None:
            return entry
        shown = name[:80]
        if self._stopping.is_set() or name in self._missing or not self._listed:
            reason = self._missing.get(name) or self._trouble
            raise Fault(
                503, f"model {shown!r} is not ready: {reason}", "model", "not_ready", {"Retry-After": "2"}
            )
        known = sorted(self._entries)
        raise Fault(404, f"there is no model {shown!r} here; in service: {known}", "model", "model_not_found")

    def causal(self, name: str) -> CausalModel:
        """A model that generates text.

        Raises:
            Fault: 400 for a classifier; see get.
        """
        served = self.get(name).served
        if not isinstance(served, CausalModel):
            raise Fault(
                400, f"{name!r} is a classifier; POST to /v2/models/{name}/infer", "model", "wrong_task"
            )
        return served

    def classifier(self, name: str) -> Classifier:
        """A model that classifies text.

        Raises:
            Fault: 400 for a causal model; see get.
        """
        served = self.get(name).served
        if not isinstance(served, Classifier):
            message = f"{name!r} generates text; POST to /v1/chat/completions or /v1/completions"
            raise Fault(400, message, "model", "wrong_task")
        return served

    def states(self) -> list[dict[str, Any]]:
        """Every model that is or should be in service, by name."""
        with self._lock:
            entries, missing = dict(self._entries), dict(self._missing)
        found = [_state(name, entry) for name, entry in entries.items()]
        found += [_absent(name, reason) for name, reason in missing.items() if name not in entries]
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

    # --- changing it ----------------------------------------------------------------------------

    def start(self) -> None:
        """Load every desired deployment, in the background, trying again until all are there."""
        threading.Thread(target=self._load_desired, name="load-desired", daemon=True).start()

    def deploy_soon(self, name: str) -> Future[dict[str, Any]]:
        """`deploy` in a thread of its own, which a stopping server does not wait for."""
        future: Future[dict[str, Any]] = Future()

        def run() -> None:
            try:
                future.set_result(self.deploy(name))
            except BaseException as error:  # carried to whoever waits for the future
                future.set_exception(error)

        threading.Thread(target=run, name=f"deploy-{name}", daemon=True).start()
        return future

    def deploy(self, name: str) -> dict[str, Any]:
        """Put the desired version of a model in service. On any failure what was served before stays.

        Returns:
            The model's state, `loaded` (False when this very version was in service already) and `seconds`.

        Raises:
            Fault: 404, there is no such deployment.
            TuneyardError: the version cannot be served.
        """
        started = time.monotonic()
        checked_name(name)
        with self._loading:
            store = self._open_store()
            document = store.read_json(f"{DEPLOYMENTS}{name}.json")
            if document is None:
                raise Fault(
                    404, f"{store.root}/{DEPLOYMENTS}{name}.json does not exist", "name", "no_deployment"
                )
            loaded = self._replace(_identity(name, document), document, store)
        seconds = round(time.monotonic() - started, 3)
        return {**_state(name, self.get(name)), "loaded": loaded, "seconds": seconds}

    def remove(self, name: str) -> None:
        """Take a model out of service in this process. Requests in flight are finished.

        Raises:
            Fault: 404, it is not in service.
        """
        with self._loading, self._lock:
            entry = self._entries.pop(name, None)
            known = self._missing.pop(name, None) is not None
        if entry is None and not known:
            raise Fault(404, f"there is no model {name[:80]!r} here", "name", "model_not_found")
        if entry is not None:
            entry.served.close()
            log.info("%s: taken out of service", entry.served.identity)

    def close(self) -> None:
        """Take everything out of service; answers that are not complete by now end with an error."""
        self._stopping.set()
        with self._lock:
            entries, self._entries = list(self._entries.values()), {}
        for entry in entries:
            entry.served.abort(_STOP_SECONDS)

    def _replace(self, identity: Identity, document: dict[str, Any], store: Store) -> bool:
        present = self._entries.get(identity.name)
        if present is not None and present.served.identity == identity and present.served.alive:
            return False
        counter = self.telemetry.tokens.labels(identity.name, identity.version)
        served, card = open_model(identity, str(document["manifest"]), store, counter.inc)
        with self._lock:
            if self._stopping.is_set():
                served.close()
                raise Fault(503, "the server is stopping", code="stopping")
            old = self._entries.get(identity.name)
            self._entries[identity.name] = Entry(served, card, int(time.time()))
            self._missing.pop(identity.name, None)
        if old is not None:
            old.served.close()
        return True

    def _load_desired(self) -> None:
        attempt = 0
        while not self._stopping.is_set():
            if self._load_missing():
                return
            self._stopping.wait(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
            attempt += 1

    def _load_missing(self) -> bool:
        """One try at everything that is desired and not there. Returns whether nothing is left to do."""
        try:
            if not self._listed:
                names = self._open_store().impatient().names(DEPLOYMENTS)
                wanted = [
                    n.removeprefix(DEPLOYMENTS).removesuffix(".json") for n in names if n.endswith(".json")
                ]
                with self._lock:
                    self._missing = {n: "loading" for n in wanted if n not in self._entries}
                self._listed, self._trouble = True, "not loaded"
        except Exception as error:  # S3 may come up later than the server
            log.warning("deployments cannot be listed: %s", error)
            self._trouble = f"deployments cannot be listed ({type(error).__name__})"
            return False
        for name in list(self._missing):
            try:
                self.deploy(name)
            except Exception as error:
                log.warning(
                    "%s cannot be loaded: %s", name, error, exc_info=not isinstance(error, TuneyardError)
                )
                reason = (
                    error.what if isinstance(error, TuneyardError) else f"{type(error).__name__}: {error}"
                )
                with self._lock:
                    if name in self._missing:
                        self._missing[name] = reason
        return not self._missing


def _identity(name: str, document: dict[str, Any]) -> Identity:
    missing = [key for key in ("version", "digest", "manifest") if not document.get(key)]
    if missing or document.get("name") != name:
        raise TuneyardError(
            f"{DEPLOYMENTS}{name}.json: name {document.get('name')!r}, without {missing}",
            "deploy the model again",
        )
    return Identity(name, str(document["version"]), str(document["digest"]))


def _state(name: str, entry: Entry) -> dict[str, Any]:
    served = entry.served
    return {
        "name": name,
        "version": served.identity.version,
        "digest": served.identity.digest,
        "task": served.task,
        "ready": served.alive,
        "reason": "" if served.alive else "its worker has ended",
        "waiting": served.waiting,
        "in_flight": served.in_flight,
        "since": entry.since,
    }


def _absent(name: str, reason: str) -> dict[str, Any]:
    nothing = {"version": "", "digest": "", "task": "", "waiting": 0, "in_flight": 0, "since": 0}
    return {"name": name, "ready": False, "reason": reason, **nothing}
