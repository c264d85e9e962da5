"""What a system costs: memory while it works, and how long a caller waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_SAMPLE_SECONDS = 0.05


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Watch this process's resident memory; after the block, `gib` of the dict is its peak.

    Sampled, because the kernel's own high-water mark covers the whole life of a process, and several
    systems are measured in one.
    """
    import psutil

    process = psutil.Process()
    found = {"gib": process.memory_info().rss / 2**30}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            found["gib"] = max(found["gib"], process.memory_info().rss / 2**30)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
        found["gib"] = max(found["gib"], process.memory_info().rss / 2**30)


def latencies(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile, in milliseconds."""
    import numpy as np

    p50, p95 = np.percentile(seconds, [50, 95])
    return {"latency_p50_ms": float(p50) * 1000, "latency_p95_ms": float(p95) * 1000}
