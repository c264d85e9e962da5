"""Watching a run of the endpoint: its states, its logs as they grow, through lost connections."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from components.shared.recording import FINISHED
from pipelines.cluster.endpoint import Endpoint, EndpointError
from pipelines.placement import SLICE
from pipelines.watch import Watcher

log = logging.getLogger("tuneyard.submit")

ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
_POLL_SECONDS = 2.0
_LONGEST_WAIT_SECONDS = 30.0
_PATIENCE_SECONDS = 3600.0


@dataclass(frozen=True)
class StageState:
    """A stage of a run, as the endpoint has it.

    Args:
        state: KFP's: PENDING, RUNNING, SUCCEEDED, SKIPPED, FAILED, CANCELED...; '' before it is known.
        pods: of its attempts, oldest first; none where KFP's cache answered.
    """

    state: str
    pods: tuple[str, ...]


def stages_of(run: Any, stages: Sequence[str]) -> dict[str, StageState]:
    """The stages of a run. KFP lists drivers, executors and sub-graphs too; a stage's pods hang below it."""
    details = (run.run_details.task_details if run.run_details else None) or []
    by_id = {task.task_id: task for task in details}

    def pods(task: Any, seen: set[str]) -> Iterator[str]:
        if task.task_id in seen:
            return
        seen.add(task.task_id)
        if task.pod_name:
            yield task.pod_name
        for child in task.child_tasks or []:
            below = by_id.get(child.task_id)
            if child.pod_name:
                yield child.pod_name
            if below is not None:
                yield from pods(below, seen)

    found = {}
    for stage in stages:
        own = [task for task in details if task.display_name == stage]
        names = dict.fromkeys(name for task in own for name in pods(task, set()))
        state = str(own[-1].state) if own else ""
        if stage == SLICE:
            # As many tasks as there are slices: those that go on say that their stage does.
            state = next((str(task.state) for task in own if str(task.state) not in ENDED), state)
        found[stage] = StageState(state, tuple(name for name in names if "driver" not in name))
    return found


class Logs:
    """Passes on what the pods of a run have printed since the last look."""

    def __init__(self, endpoint: Endpoint, run: str, watcher: Watcher) -> None:
        self._endpoint = endpoint
        self._run = run
        self._watcher = watcher
        self._read: dict[str, int] = {}
        self._whole: set[str] = set()

    def look(self, states: dict[str, StageState]) -> None:
        """Read the logs of the stages that run, and once more of those that have ended."""
        for stage, now in states.items():
            for pod in now.pods:
                if pod not in self._whole:
                    self._pass_on(pod)
            if now.state in ENDED:
                if not now.pods and now.state == "SUCCEEDED" and stage not in self._whole:
                    self._watcher.write(f"{FINISHED}{stage}  unchanged, done before\n")
                    self._whole.add(stage)
                self._whole.update(now.pods)
        self._watcher.flush()

    def _pass_on(self, pod: str) -> None:
        try:
            text = self._endpoint.log(self._run, pod)
        except EndpointError as error:
            # Not started yet, or collected already: what the stages recorded is in the store all the same.
            log.debug("%s", error)
            return
        seen = self._read.get(pod, 0)
        # A line that is not finished yet waits for the next look.
        end = text.rfind("\n") + 1
        if end > seen:
            self._watcher.write(text[seen:end])
            self._read[pod] = end


def follow(endpoint: Endpoint, run_id: str, stages: Sequence[str], watcher: Watcher) -> Any:
    """Watch a run until it has ended. A lost connection is waited out: the run does not need us.

    Args:
        endpoint: where it runs.
        run_id: KFP's id of the run.
        stages: of the pipeline.
        watcher: gets the stages' lines.

    Returns:
        The run as the endpoint has it at its end.

    Raises:
        EndpointError: the endpoint refuses, or was not reached for an hour.
    """
    logs = Logs(endpoint, run_id, watcher)
    watched = [name for stage in stages for name in ((SLICE, stage) if stage == "evaluate" else (stage,))]
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
        logs.look(stages_of(run, watched))
        if str(run.state) in ENDED:
            return run
        time.sleep(_POLL_SECONDS)
