"""Watching a run of the endpoint: its states, its logs as they grow, through lost connections."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from components.shared import logparts
from components.shared.errors import StoreError
from components.shared.logparts import Part
from components.shared.recording import FINISHED
from components.shared.store import Store
from pipelines.cluster.endpoint import Endpoint, EndpointError
from pipelines.watch import Watcher

log = logging.getLogger("tuneyard.submit")

ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
_POLL_SECONDS = 2.0
_LONGEST_WAIT_SECONDS = 30.0
_PATIENCE_SECONDS = 3600.0
# Parts of two nodes can come in another order than their names: by so much clocks may differ.
_DISORDER_SECONDS = 300.0
_READERS = 8


def states_of(run: Any, stages: Sequence[str]) -> dict[str, str]:
    """KFP's state of each stage of a run: PENDING, RUNNING, SUCCEEDED, SKIPPED...; '' before it is known.

    Its tasks are the nodes of Argo's graph. A stage is the one of its own name, above a node `executor`; what
    hangs below it is told by ids that no task of the answer has (kubeflow/pipelines#14007).
    """
    details = (run.run_details.task_details if run.run_details else None) or []
    known = {task.display_name: str(task.state) for task in details}
    return {stage: known.get(stage, "") for stage in stages}


class Logs:
    """Passes on what the stages of a run have left of their logs since the last look."""

    def __init__(self, store: Store, run: str, watcher: Watcher) -> None:
        self._store = store.impatient()
        self._run = run
        self._watcher = watcher
        self._passed: set[str] = set()
        self._since = ""
        self._attempts: dict[str, list[str]] = {}
        self._last: tuple[str, str] | None = None
        self._told: set[str] = set()
        self._lost = False

    def look(self, states: Mapping[str, str], ended: bool = False) -> None:
        """Pass on what is new; at the end of the run also what came late."""
        try:
            found = logparts.parts(self._store, self._run, "" if ended else self._since)
            new = [part for part in found if part.name not in self._passed]
            with ThreadPoolExecutor(_READERS) as pool:
                for part, text in zip(new, pool.map(partial(logparts.read, self._store), new), strict=True):
                    self._pass_on(part, text)
            for stage, state in states.items():
                if state == "SUCCEEDED" and stage not in self._told:
                    self._tell_done(stage)
        except StoreError as error:
            if not self._lost:
                then = f"tuneyard runs attach {self._run} shows them" if ended else "they are shown"
                log.warning("%s\nno logs; %s again when the store answers", error.what, then)
            self._lost = True
        else:
            self._lost = False
        self._watcher.flush()

    def _pass_on(self, part: Part, text: str) -> None:
        attempts = self._attempts.setdefault(part.stage, [])
        if part.attempt not in attempts:
            attempts.append(part.attempt)
        number = attempts.index(part.attempt) + 1
        # A stage begins with a line of its own; tried again, or interrupted by another, it needs one more.
        if self._last != (part.stage, part.attempt) and (part.number > 1 or number > 1):
            self._watcher.write(f"-- {part.stage}{f', attempt {number}' if number > 1 else ''}\n")
        self._last = part.stage, part.attempt
        self._watcher.write(text)
        self._passed.add(part.name)
        self._since = max(self._since, logparts.before(self._run, part, _DISORDER_SECONDS))

    def _tell_done(self, stage: str) -> None:
        # A stage that had a pod left a record, and said itself how it went.
        if self._store.read_json(f"runs/{self._run}/{stage}.json") is None:
            self._watcher.write(f"{FINISHED}{stage}  unchanged, done before\n")
        self._told.add(stage)


def follow(
    endpoint: Endpoint, run_id: str, stages: Sequence[str], watcher: Watcher, store: Store | None
) -> Any:
    """Watch a run until it has ended. A lost connection is waited out: the run does not need us.

    Args:
        endpoint: where it runs.
        run_id: KFP's id of the run.
        stages: of the pipeline.
        watcher: gets the stages' lines.
        store: where the stages leave them; None shows none.

    Returns:
        The run as the endpoint has it at its end.

    Raises:
        EndpointError: the endpoint refuses, or was not reached for an hour.
    """
    logs = Logs(store, run_id, watcher) if store else None
    wait, lost_at = _POLL_SECONDS, 0.0
    while True:
        try:
            run = endpoint.call("Run", "run_service_get_run", run_id)
        except EndpointError as error:
            now = time.monotonic()
            if not error.lost or (lost_at and now - lost_at > _PATIENCE_SECONDS):
                raise
            if not lost_at:
                lost_at = now
                log.warning("%s\nthe run goes on without us; trying again", error.what)
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
            continue
        if lost_at:
            log.warning("connected again after %.0f s", time.monotonic() - lost_at)
        wait, lost_at = _POLL_SECONDS, 0.0
        ended = str(run.state) in ENDED
        if logs:
            logs.look(states_of(run, stages), ended)
        if ended:
            return run
        time.sleep(_POLL_SECONDS)
