"""The record that work of a run leaves in the store: that it began, and how it ended."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.shared import slots
from components.shared.errors import EXIT_FAILED, StageStopped, StoreError, TuneyardError
from components.shared.placing import disk_full
from components.shared.store import Store

log = logging.getLogger("tuneyard.stage")

STARTED = "\u25b8 "
FINISHED = "\u2713 "


def work_folder(stage: str, key: str) -> Path:
    """The folder of a key that outlives a killed attempt."""
    home = Path(os.environ.get("TUNEYARD_HOME", ".tuneyard")).resolve()
    return home / "work" / stage / key


def record(store: Store, run: str, stage: str, **facts: Any) -> None:
    """Write how a stage of a run went, for `submit`, `runs` and whoever looks later."""
    store.write_json(f"runs/{run}/{stage}.json", {"stage": stage, **facts})


def _record_failure(error: BaseException, store: Store, run: str, stage: str, seconds: float) -> None:
    facts = {"what": f"{type(error).__name__}: {error}", "todo": "", "exit_code": EXIT_FAILED}
    if isinstance(error, TuneyardError):
        facts = error.facts()
    status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    if isinstance(error, StageStopped):
        status = "stopped"
    try:
        record(store.impatient(), run, stage, status=status, error=facts, seconds=seconds)
    except StoreError as unheard:
        # The failure itself is what the reader needs; it goes on its way.
        log.error("%s: how it failed could not be recorded (%s)", stage, unheard.what)


@contextmanager
def recorded(run: Mapping[str, str], name: str, store: Store) -> Iterator[dict[str, Any]]:
    """Around work of a run: its lines in the log, and a record of how it went, however it ends.

    Args:
        run: as `perform` has it.
        name: of the stage, or of the part of one that is done here.
        store: for the record.

    Yields:
        What the record says at the end; `status` and `cached` are `done` and False unless they are changed.

    Raises:
        StageStopped: another run has the slot.
    """
    started = time.time()
    log.info("%s%s", STARTED, name)
    ending: dict[str, Any] = {"status": "done", "cached": False}
    try:
        # Whatever ends the work overwrites this, but for a kill.
        record(store, run["id"], name, status="running")
        slots.claim(run, store)
        yield ending
        seconds = round(time.time() - started, 3)
        record(store, run["id"], name, seconds=seconds, **ending)
        log.info("%s%s  %.1f s%s", FINISHED, name, seconds, ", done before" if ending["cached"] else "")
    except BaseException as error:
        fault = disk_full(error, work_folder(name, "")) or error
        _record_failure(fault, store, run["id"], name, round(time.time() - started, 3))
        if fault is error:
            raise
        raise fault from error
