"""Rules over the figures of a training that say what its machine lacks; see rules.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from components.train.rules import Finding, Row

SLOWER, SPEED_ROWS = 0.7, 20
MEMORY = 0.92
GPU_IDLE, GPU_ROWS, GPU_CELSIUS = 0.5, 10, 85.0


def slowing(history: Sequence[Row]) -> Finding | None:
    """Twenty steps with less than 0.7 of the tokens a second of the first twenty (after five to warm up)."""
    rows = [row for row in history[5:] if "step_seconds" in row]
    if len(rows) < 2 * SPEED_ROWS:
        return None
    first = _speed(rows[:SPEED_ROWS])
    for end in range(2 * SPEED_ROWS, len(rows) + 1, SPEED_ROWS):
        now = _speed(rows[end - SPEED_ROWS : end])
        if now < SLOWER * first:
            return Finding(
                "throughput falling",
                int(rows[end - SPEED_ROWS]["step"]),
                f"{now:.0f} tokens/s over {SPEED_ROWS} steps, {first:.0f} at the start",
                "see in the system metrics of the run what else the machine does, its temperature, its swap",
            )
    return None


def _speed(rows: Sequence[Row]) -> float:
    return sum(row["step_tokens"] for row in rows) / max(1e-9, sum(row["step_seconds"] for row in rows))


def short_of_memory(history: Sequence[Row]) -> Iterator[Finding]:
    """Memory of the process, or of the GPU, above 0.92 of what there is."""
    for column, whose in (("memory_fraction", "this machine's"), ("gpu_memory_fraction", "the GPU's")):
        row = next((row for row in history if row.get(column, 0) > MEMORY), None)
        if row is not None:
            yield Finding(
                f"memory near its limit ({whose})",
                int(row["step"]),
                f"{row[column]:.0%} of {whose} memory is in use",
                "halve train.per_device_batch_size and double train.gradient_accumulation_steps, which "
                "leaves the update as it is, or set train.gradient_checkpointing: true",
            )


def of_gpu(history: Sequence[Row]) -> Iterator[Finding]:
    """A GPU that waits, or that is hot enough to slow itself down."""
    seen = [row for row in history if "gpu_use" in row]
    if len(seen) >= GPU_ROWS and (use := statistics.median(r["gpu_use"] for r in seen)) < GPU_IDLE:
        what = f"the GPU was busy {use:.0%} of the time in the median of {len(seen)} looks"
        todo = "raise train.per_device_batch_size and lower train.gradient_accumulation_steps as much"
        yield Finding("GPU idle", int(seen[0]["step"]), what, todo)
    hot = next((row for row in history if row.get("gpu_celsius", 0) >= GPU_CELSIUS), None)
    if hot is not None:
        what = f"the GPU is at {hot['gpu_celsius']:.0f} degrees Celsius and will slow itself down"
        yield Finding("GPU hot", int(hot["step"]), what, "see to its cooling, or lower its power limit")
