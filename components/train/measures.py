"""What a training measures of itself besides its loss, for little: gradients, updates, memory, the GPU.

Gradient norms come from the pass over the gradients that clipping makes anyway. How far an update moves the
weights is taken from a few thousand entries of each tensor, so that no copy of the model is kept.
"""

from __future__ import annotations

import contextlib
import math
import platform
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

# Entries looked at of each tensor: its root mean square is right to 1 / sqrt(2 n), about 1%.
_ENTRIES = 4096
# Looks in a run at what is not noted at each step.
_LOOKS = 100
_CGROUP = Path("/sys/fs/cgroup")
_WRAPPERS = {"base_model", "model", "module", "default"}
_BELOW = re.compile(r"embed|shared|wte|wpe|stem|conv")


def looks(steps: int, every: int) -> Callable[[int], bool]:
    """Which steps (from 0) are looked at closely: those before an evaluation, and about a hundred of a run.

    Args:
        steps: of the run.
        every: steps between evaluations.
    """
    seldom = math.ceil(steps / _LOOKS)
    return lambda step: step % seldom == 0 or (step + 1) % every == 0 or step + 1 == steps


@cache
def group_of(name: str) -> str:
    """The part of a model that a weight belongs to: a layer (`layers.3`), `embeddings`, `prompt` or `head`.

    Args:
        name: of the weight in the model.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    for at, part in enumerate(parts):
        if part.isdigit() and at:
            return ".".join(parts[max(0, at - 2) : at + 1])
    if any("prompt" in part for part in parts):
        return "prompt"
    return "embeddings" if any(_BELOW.search(part) for part in parts) else "head"


def clip(
    weights: Mapping[str, Any], largest: float, total: Callable[[Any], Any] | None = None
) -> dict[str, float]:
    """Clip gradients to a global norm, in place.

    Args:
        weights: name -> weight, with its gradient.
        largest: the norm they may have.
        total: sums numbers over the processes, where each holds a part of every weight.

    Returns:
        Before clipping: `grad_norm`, `grad_norm.<group>`, and `still.<group>`, the share (0-1) of the group's
        tensors without any gradient.
    """
    import torch

    having = {name: weight for name, weight in weights.items() if weight.grad is not None}
    # A weight that waits to be thawed is not among those that should move.
    norms: dict[str, float] = {name: 0.0 for name, weight in weights.items() if weight.requires_grad}
    length = 0.0
    if having:
        found = torch.stack(torch._foreach_norm([weight.grad for weight in having.values()]))
        if total:
            found = total(found.square()).sqrt()
        whole = torch.linalg.vector_norm(found)
        torch.nn.utils.clip_grads_with_norm_(list(having.values()), largest, whole)
        *each, length = torch.cat([found, whole[None]]).tolist()  # in one message from a GPU
        norms |= dict(zip(having, each, strict=True))
    squares: dict[str, list[float]] = {}
    for name, norm in norms.items():
        squares.setdefault(group_of(name), []).append(norm * norm)
    return {
        "grad_norm": length,
        **{f"grad_norm.{group}": math.sqrt(sum(of)) for group, of in squares.items()},
        **{f"still.{group}": of.count(0.0) / len(of) for group, of in squares.items()},
    }


def plain(row: Mapping[str, float]) -> dict[str, float]:
    """A row of the history without the columns of each group, which a few rows have."""
    return {name: value for name, value in row.items() if not name.startswith(("grad_norm.", "still."))}


def sample(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of some entries of each matrix, evenly spread.

    Biases and the scales of norms are left out: many start at 0, so any update is large beside them.
    """
    return {name: _some(weight).clone() for name, weight in weights.items() if weight.ndim > 1}


def moved(
    before: Mapping[str, Any], weights: Mapping[str, Any], total: Callable[[Any], Any] | None = None
) -> dict[str, float]:
    """How far an update moved the weights.

    Args:
        before: `sample` before it.
        weights: the same weights now.
        total: see `clip`.

    Returns:
        `update_ratio.<group>`: length of the update over length of the weights.
    """
    import torch

    if not before:
        return {}
    squares: dict[str, list[Any]] = {}
    for name, old in before.items():
        scale = weights[name].numel() / max(1, old.numel())  # a process may hold no row of a small matrix
        apart = (_some(weights[name]) - old).float().square().sum() * scale
        pair = torch.stack([apart, old.float().square().sum() * scale])
        squares.setdefault(group_of(name), []).append(pair)
    found = torch.stack([torch.stack(of).sum(0) for of in squares.values()])
    sums = (total(found) if total else found).tolist()
    return {
        f"update_ratio.{group}": math.sqrt(apart / whole) if whole else 0.0
        for group, (apart, whole) in zip(squares, sums, strict=True)
    }


def _some(weight: Any) -> Any:
    """Entries at a distance that is no multiple of a row's usual lengths, so that all columns come up."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _ENTRIES) | 1]


def machine() -> dict[str, float]:
    """Memory of this process, and use, memory and temperature of the GPU where there is one."""
    import psutil
    import torch

    used = psutil.Process().memory_info().rss
    found = {"memory_gib": used / 2**30, "memory_fraction": used / memory_limit()}
    if not torch.cuda.is_available():
        return found
    free, total = torch.cuda.mem_get_info()
    found |= {"gpu_memory_gib": (total - free) / 2**30, "gpu_memory_fraction": 1 - free / total}
    # NVIDIA's management library may be absent or refuse; the page says that there are no figures.
    with contextlib.suppress(ModuleNotFoundError, RuntimeError):
        found |= {"gpu_use": torch.cuda.utilization() / 100, "gpu_celsius": float(torch.cuda.temperature())}
    return found


def hardware(processes: int = 1) -> str:
    """What a training computes on, as far as its speed goes: processes, and each one's GPU or threads."""
    import torch

    if torch.cuda.is_available():
        return f"{processes} x {torch.cuda.get_device_name()}"
    cpu = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", cpu.read_text()) if cpu.is_file() else None
    return f"{processes} x {torch.get_num_threads()} threads of {named[1] if named else platform.machine()}"


@cache
def memory_limit() -> int:
    """Bytes that this process may use: the container's limit, or the machine's memory."""
    import psutil

    limit = _CGROUP / "memory.max"
    text = limit.read_text().strip() if limit.is_file() else "max"
    machine_has = int(psutil.virtual_memory().total)
    return min(machine_has, int(text)) if text.isdigit() else machine_has
