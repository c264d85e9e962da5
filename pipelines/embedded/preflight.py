"""What a run needs of this machine, seen before anything starts."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import psutil

from components.shared.errors import TuneyardError
from pipelines.embedded.seaweed import weed_executable

log = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")
# What the pipelines that ship need at their peak, some air included; the README names the same two.
DISK_GIB = 8
MEMORY_GIB = 8


def preflight(home: Path, disk_gib: float = DISK_GIB, memory_gib: float = MEMORY_GIB) -> None:
    """Check that this machine can hold a run.

    Args:
        home: whose disk is looked at; it need not exist yet.
        disk_gib: free disk wanted.
        memory_gib: available memory wanted.

    Raises:
        TuneyardError: too little of either, or no `weed` program; all faults at once, each with its numbers.
    """
    faults = []
    folder = next(each for each in (home, *home.parents) if each.exists())
    free = shutil.disk_usage(folder).free / 2**30
    if free < disk_gib:
        faults.append(
            f"{disk_gib:.1f} GiB of free disk are wanted under {folder}, there are {free:.1f}: "
            "free some, or set TUNEYARD_HOME to a folder on a larger disk"
        )
    available = available_memory_gib()
    if available < memory_gib:
        faults.append(
            f"{memory_gib:.1f} GiB of available memory are wanted, there are {available:.1f}: "
            "close other programs, or raise this container's limit"
        )
    weed = weed_executable()
    if not os.access(weed, os.X_OK):
        faults.append(f"the S3 server {weed} is missing or cannot be run: `make setup` installs it")
    if faults:
        raise TuneyardError("this machine is not ready:\n" + "\n".join(f"  {fault}" for fault in faults))


def available_memory_gib() -> float:
    """Memory that can be used without swapping, in GiB, within the limit of the container if there is one."""
    available = psutil.virtual_memory().available
    limit = CGROUP / "memory.max"
    # Without cgroup v2, and where the limit is the word "max", there is none but the machine's.
    if limit.is_file() and limit.read_text().strip() != "max":
        try:
            used = int((CGROUP / "memory.current").read_text())
            figures = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
            # The page cache counts as used there, and is given back on demand.
            cache = int(figures["inactive_file"]) + int(figures["active_file"])
            available = min(available, int(limit.read_text()) - used + cache)
        except (OSError, ValueError, KeyError) as error:
            log.warning(
                "the memory limit of this container cannot be read (%s: %s); going by the machine's",
                type(error).__name__,
                error,
            )
    return available / 2**30
