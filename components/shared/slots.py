"""One run for each slot of a schedule, whatever the scheduler does.

Kubeflow Pipelines can start two runs for one slot (a controller that is killed between creating a run and
noting it, kubeflow/pipelines#12863). The first run to write `slots/<pipeline>/<slot>.json`, on condition that
there is none, has the slot; a stage of any other run stops before it does anything.
"""

from __future__ import annotations

from collections.abc import Mapping

from components.shared.errors import StageStopped
from components.shared.store import Store


def claim(run: Mapping[str, str], store: Store) -> None:
    """Make sure that this run has its slot; a run that nobody scheduled has none and needs none.

    Args:
        run: `id`, `pipeline` and `slot` (the scheduled time, as the scheduler writes it; '' for none).
        store: holds the claims.

    Raises:
        StageStopped: another run has it.
    """
    if not run.get("slot"):
        return
    name = f"slots/{run['pipeline']}/{run['slot']}.json"
    holder = store.read_json(name)
    if holder is None:
        store.write_json(name, dict(run), once=True)
        holder = store.read_json(name) or dict(run)
    if holder["id"] != run["id"]:
        raise StageStopped(
            f"run {run['id']} was started for the slot {run['slot']} of {run['pipeline']}, "
            f"which run {holder['id']} has",
            "nothing: the scheduler started the slot twice, and the other run does the work",
        )
