"""Who relies on an artifact says so before looking for it, so that `tuneyard gc` never takes it away.

Two rules, each of a write and then a look, so that at least one side sees the other (S3 reads what was
written): whoever is about to rely on a manifest's objects writes `uses/<digest>.json`, then looks for
`gc/sweep.json`, and while there is one waits; a sweep writes `gc/sweep.json`, then looks for the uses. A use
is thus seen by the sweep, or begins when the sweep has ended and the objects are there or are not.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from components.shared.errors import TuneyardError
from components.shared.manifest import Manifest

if TYPE_CHECKING:
    from components.shared.store import Store

log = logging.getLogger("tuneyard.store")

USES = "uses/"
SWEEP = "gc/sweep.json"
# A sweep writes its document again each minute at least; one that is older was killed.
SWEEP_ENDED_SECONDS = 600.0
_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 3600.0


def note(manifest: Manifest, store: Store) -> None:
    """Say that somebody relies on an artifact from now on, and wait for the end of a sweep that may not know.

    Raises:
        TuneyardError: a sweep has gone on for an hour.
    """
    files = sorted({entry.sha256 for entry in manifest.files})
    store.write_json(f"{USES}{manifest.digest}.json", {"manifest": manifest.digest, "objects": files})
    began = time.monotonic()
    while (age := store.age(SWEEP)) is not None and age < SWEEP_ENDED_SECONDS:
        if began + _LONGEST_WAIT_SECONDS < time.monotonic():
            raise TuneyardError(
                f"{store.root}/{SWEEP}: `tuneyard gc` has been removing things for an hour",
                "end it where it runs, or see what it does; then submit again",
            )
        log.info("waiting for `tuneyard gc` to end")
        time.sleep(_WAIT_SECONDS)
