"""Where a stage runs: the only file that knows images, processors and memory."""

from __future__ import annotations

from typing import Any

# (CPU cores, memory) that a stage asks a cluster for: what the sample pipelines were seen to use.
_REQUESTS = {"train": ("2", "10G"), "compress": ("2", "8G"), "evaluate": ("2", "8G")}
_SMALL = ("1", "2G")


def place(task: Any, stage: str, on_cluster: bool) -> None:
    """Give a task its resources; on one machine there is nothing to ask for.

    KFP's own cache is off: its key knows neither our code nor the bytes behind a URI; the planner decides.
    """
    task.set_caching_options(False)
    task.set_display_name(stage)
    if not on_cluster:
        return
    cores, memory = _REQUESTS.get(stage, _SMALL)
    task.set_cpu_request(cores)
    task.set_memory_request(memory)
