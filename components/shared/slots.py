"""One run for each slot of a schedule, whatever the scheduler does.

Kubeflow Pipelines can start two runs for one slot (a controller that is killed between creating a run and
noting it, kubeflow/pipelines#12863). The first run to write `slots/<pipeline>/<slot>.json`, on condition that
there is none, has the slot; a stage of any other run stops before it does anything.

Which slot a run is of: a schedule passes `asked(...)`, over whose first word KFP's first version wrote the
time. Version 2 leaves it alone (kubeflow/pipelines#12494), so the slot is the last time of the schedule that
is not after `due`, which KFP's driver resolves (kubeflow/pipelines#13474): the scheduled time where it may
read the Workflow, else when that was created. With no catch-up the scheduler takes the last time before now
as well, and then creates the Workflow: only where the next time comes between, the run counts for that.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime

from components.shared import cron
from components.shared.errors import StageStopped, TuneyardError
from components.shared.store import Store

log = logging.getLogger("tuneyard.stage")

_MACRO = "[[ScheduledTime]]"
_FORMAT = "%Y%m%d%H%M%S"  # in UTC, as the macro has it
_SLOT = re.compile(r"\d{14}")


def asked(zone: str, times: str) -> str:
    """What a schedule passes as `slot` to its runs.

    Args:
        zone: IANA name of the scheduler's time zone.
        times: the schedule, a cron expression of five fields.
    """
    return f"{_MACRO} {zone} {times}"


def of_run(run: Mapping[str, str], store: Store) -> str:
    """The slot of a run: 14 digits, in UTC; '' for a run that nobody scheduled.

    Args:
        run: as `claim` has it.
        store: keeps what was found, so that all stages of a run find the same, also when it is retried.

    Raises:
        TuneyardError: what was passed as slot is none, and names no schedule.
    """
    time, _, schedule = run.get("slot", "").partition(" ")
    if not time or _SLOT.fullmatch(time):
        return time
    zone, _, times = schedule.partition(" ")
    if not zone or cron.faults_of(times):
        raise TuneyardError(
            f"run {run['id']} was given the slot {run['slot']!r}, which is no time and names no schedule",
            "make the schedule again: tuneyard schedule",
        )
    name = f"slots/{run['pipeline']}/of/{run['id']}.json"
    known = store.read_json(name)
    if known is None:
        due = _due(run.get("due", ""))
        slot = cron.last(times, cron.zone_of(zone), due).strftime(_FORMAT)
        store.write_json(name, {"slot": slot, "due": due.isoformat()}, once=True)
        known = store.read_json(name) or {"slot": slot}
    return str(known["slot"])


def _due(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    except ValueError:
        log.warning(
            "Kubeflow Pipelines did not say for when this run was scheduled (%r; 2.17 does), so its slot is "
            "the last one before now: wrong if its first pod waited longer than the schedule's interval",
            text,
        )
        return datetime.now(UTC)


def claim(run: Mapping[str, str], store: Store) -> None:
    """Make sure that this run has its slot; a run that nobody scheduled has none and needs none.

    Args:
        run: `id`, `pipeline`, `slot` (what the schedule passed; '' for none) and `due` (for when KFP says
            that the run was scheduled, or else when it was created; RFC 3339).
        store: holds the claims.

    Raises:
        StageStopped: another run has it.
        TuneyardError: it is not known which slot.
    """
    slot = of_run(run, store)
    if not slot:
        return
    name = f"slots/{run['pipeline']}/{slot}.json"
    holder = store.read_json(name)
    if holder is None:
        mine = {**run, "slot": slot}
        store.write_json(name, mine, once=True)
        holder = store.read_json(name) or mine
    if holder["id"] != run["id"]:
        raise StageStopped(
            f"run {run['id']} was started for the slot {slot} of {run['pipeline']}, "
            f"which run {holder['id']} has",
            "nothing: the scheduler started the slot twice, and the other run does the work",
        )
