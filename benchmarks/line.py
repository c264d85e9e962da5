"""A whole pipeline from a set-up checkout: wall time, memory, what the model gained, an unchanged submit.

The peers are those of the report: the untuned base, TF-IDF with logistic regression and, for the int8
encoder, float32 PyTorch in the same process. Memory is the sum over every process of the run, platform and
server included, by resident set (shared pages count once for each, so it is an upper bound).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from pipelines.embedded import platform
from pipelines.samples import fetch
from pipelines.spec import load


def _memory_gib(home: Path) -> float:
    total = 0
    for process in psutil.process_iter(["environ", "memory_info"]):
        if (process.info["environ"] or {}).get("TUNEYARD_HOME") == str(home) and process.info["memory_info"]:
            total += process.info["memory_info"].rss
    return total / 2**30


def _timed_submit(pipeline: str, home: Path) -> tuple[dict[str, Any], float, float]:
    """(report, wall seconds, peak GiB) of one submit."""
    peak = 0.0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(1.0):
            peak = max(peak, _memory_gib(home))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    command = [sys.executable, "-m", "pipelines.cli", "submit", pipeline, "--json"]
    environment = os.environ | {"TUNEYARD_HOME": str(home)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    return json.loads(done.stdout), seconds, peak


def run(pipeline: str) -> dict[str, Any]:
    """Submit a pipeline twice in a home of its own, its samples fetched beforehand."""
    spec = load(pipeline)
    with tempfile.TemporaryDirectory(prefix="tuneyard-bench-") as folder:
        home = Path(folder)
        os.environ["TUNEYARD_HOME"] = str(home)
        os.environ.update(platform.environment(platform.up(home)))
        try:
            fetch.ensure([*spec.ingest.external_uris(), *spec.train.external_uris()], home)
            report, seconds, peak = _timed_submit(pipeline, home)
            again, again_seconds, _ = _timed_submit(pipeline, home)
        finally:
            platform.down(home)
    figures: dict[str, Any] = {
        "cores": os.cpu_count(),
        "status": report["status"],
        "wall_seconds": round(seconds, 1),
        "peak_memory_gib": round(peak, 2),
        "unchanged_submit_seconds": round(again_seconds, 1),
        "unchanged_submit_all_cached": all(stage["cached"] for stage in again["stages"]),
    }
    figures |= {f"{stage['name']}_seconds": stage["seconds"] for stage in report["stages"]}
    in_stages = sum(stage["seconds"] for stage in report["stages"])
    arithmetic = sum(stage.get("arithmetic_seconds", 0.0) for stage in report["stages"])
    figures["not_arithmetic_share"] = round(1 - arithmetic / seconds, 3)
    figures |= {
        f"{stage['name']}_arithmetic_seconds": stage["arithmetic_seconds"]
        for stage in report["stages"]
        if stage.get("arithmetic_seconds")
    }
    figures["between_stages_seconds"] = round(seconds - in_stages, 1)
    for system, values in report["metrics"].items():
        figures |= {f"{system}.{name}": value for name, value in values.items()}
    return figures
