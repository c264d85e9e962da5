"""Fits that are killed again and again, beside the same fits left alone; who fits is in `survivors.py`.

A process that has imported what a fit needs, which takes seconds, forks a child for each attempt. The child
says through a pipe when an update is done and when a save begins and ends; the parent waits for the moment of
the kill and sends SIGKILL. The next attempt goes on from what is on the disk, and the last is left alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

OURS, TRAINER = "ours", "trainer"
_UPDATED, _SAVING, _SAVED, _OVER, _FAILED = b"u", b"s", b"e", b"o", b"!"
_MODULES = "modules.json"


@dataclass(frozen=True)
class Kill:
    """When an attempt dies.

    Args:
        within: `save` or `update`.
        number: which save of this attempt, from 1; or after how many of its updates.
        moment: so much (0-1) of the usual time of an update, or of the shortest save, after it began. What is
            over even sooner is held at its last line until the kill comes.
    """

    within: Literal["save", "update"]
    number: int
    moment: float


@dataclass(frozen=True)
class Contender:
    """Who fits.

    Args:
        fit: (job, folder): fits in this process, going on from what is in the folder, and leaves
            `weights.safetensors` there.
        saver: object and name of the function that writes a checkpoint.
        prefix: of a checkpoint's folder; the step follows.
    """

    fit: Callable[[dict[str, Any], Path], None]
    saver: Callable[[], tuple[Any, str]]
    prefix: str


@dataclass
class Attempt:
    """How one went: what it said and when, its error, its exit status, its seconds and those of its CPU."""

    events: list[tuple[bytes, float]] = field(default_factory=list)
    error: str = ""
    status: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def count(self, event: bytes) -> int:
        """How often it said that."""
        return sum(seen == event for seen, _ in self.events)

    @property
    def within_a_save(self) -> bool:
        """Whether it ended there."""
        return self.count(_SAVING) > self.count(_SAVED)

    def spans(self) -> dict[str, float]:
        """Seconds of the usual update, from one to the next without a save, and of the shortest save."""

        def between(start: bytes, end: bytes) -> list[float]:
            pairs = zip(self.events, self.events[1:], strict=False)
            return [to - since for (a, since), (b, to) in pairs if (a, b) == (start, end)]

        return {
            "update": statistics.median(between(_UPDATED, _UPDATED)),
            "save": min(between(_SAVING, _SAVED)),
        }


def draw_kills(draw: random.Random, count: int, within_a_save: int, checkpoint_steps: int) -> list[Kill]:
    """So many kills, some of them within a save; no attempt makes more than two intervals of updates."""
    saves = [Kill("save", draw.randint(1, 2), draw.random()) for _ in range(within_a_save)]
    others = [
        Kill("update", draw.randint(1, 2 * checkpoint_steps - 1), draw.random())
        for _ in range(count - within_a_save)
    ]
    draw.shuffle(kills := saves + others)
    return kills


def _fit_and_tell(
    contender: Contender, job: dict[str, Any], folder: Path, kill: Kill | None, pipe: int
) -> None:
    """In the child: fit, and say what happens."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(1)
    seen: Counter[str] = Counter()
    owner, name = contender.saver()
    real = getattr(owner, name)

    def over(within: str, number: int) -> None:
        seen[within] += 1
        if kill and (kill.within, number) == (within, seen[within]):
            os.write(pipe, _OVER)
            signal.pause()

    def save(*given: Any, **named: Any) -> Any:
        os.write(pipe, _SAVING)
        made = real(*given, **named)
        over("save", kill.number if kill else 0)
        os.write(pipe, _SAVED)
        return made

    def updated(*_: Any) -> None:
        os.write(pipe, _UPDATED)
        over("update", kill.number + 1 if kill else 0)

    setattr(owner, name, save)
    register_optimizer_step_post_hook(updated)
    contender.fit(job, folder)
    (folder / _MODULES).write_text(json.dumps(sorted(sys.modules)))


def attempt(
    contender: Contender,
    job: dict[str, Any],
    folder: Path,
    kill: Kill | None = None,
    spans: dict[str, float] | None = None,
) -> Attempt:
    """Fit in a child, which is perhaps killed."""
    done, began = Attempt(), time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _fit_and_tell(contender, job, folder, kill, writing)
            os._exit(0)
        except BaseException as error:  # said, and the parent sees it
            lines = str(error).strip().splitlines() or [""]
            os.write(writing, _FAILED + f"{type(error).__name__}: {lines[0]}".encode())
            os._exit(1)
    os.close(writing)
    awaited = _SAVING if kill and kill.within == "save" else _UPDATED
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while event := pipe.read(1):
            if event == _FAILED:
                done.error = pipe.read().decode()
                break
            done.events.append((event, time.monotonic()))
            if kill and spans and done.count(awaited) == kill.number:
                time.sleep(kill.moment * spans[kill.within])
                os.kill(child, signal.SIGKILL)
                kill = None
    _, status, used = os.wait4(child, 0)
    done.status, done.cpu_seconds = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
    done.seconds = time.monotonic() - began
    return done


def _newest(contender: Contender, folder: Path) -> Path | None:
    names = [(path.name.removeprefix(contender.prefix), path) for path in folder.glob(f"{contender.prefix}*")]
    return max(((int(step), path) for step, path in names if step.isdigit()), default=(0, None))[1]


def survive(
    contender: Contender, job: dict[str, Any], folder: Path, kills: Sequence[Kill], spans: dict[str, float]
) -> tuple[list[Attempt], Counter[str]]:
    """Fit under these kills, and then to the end.

    An attempt that fails before its first update could not go on from the newest checkpoint: that is deleted,
    as its user would, and the same kill tried again.

    Returns:
        All attempts, and the errors of those that failed.
    """
    attempts: list[Attempt] = []
    errors: Counter[str] = Counter()
    waiting: list[Kill | None] = [*kills, None]
    while waiting:
        kill = waiting[0]
        attempts.append(made := attempt(contender, job, folder, kill, spans))
        if made.error:
            newest = _newest(contender, folder)
            if newest is None or made.count(_UPDATED):
                raise RuntimeError(f"this is no checkpoint's fault: {made.error}")
            errors[re.sub(r"\d+", "N", made.error.replace(f"{folder}/", ""))] += 1
            shutil.rmtree(newest)
            continue
        if made.status != (-signal.SIGKILL if kill else 0):
            raise RuntimeError(f"an attempt ended with {made.status} under {kill}")
        waiting.pop(0)
    return attempts, errors


def _left_alone(contender: Contender, job: dict[str, Any], folder: Path) -> Attempt:
    made = attempt(contender, job, folder)
    if made.status:
        raise RuntimeError(f"a run that was left alone failed: {made.error}")
    return made


def _import(names: Sequence[str]) -> None:
    """Have what the first child had at its end, so that no later attempt is charged for an import."""
    for name in names:
        with contextlib.suppress(Exception):  # some are made by others, and cannot be imported by name
            importlib.import_module(name)


def contend(contender: Contender, job: dict[str, Any]) -> dict[str, Any]:
    """Two runs that are left alone, then one that is not, and how they differ."""
    from safetensors.torch import load_file

    folders = [Path(job["folder"]) / name for name in ("alone", "again", "killed")]
    for folder in folders:
        folder.mkdir(parents=True)
    _left_alone(contender, job, folders[0])
    _import(json.loads((folders[0] / _MODULES).read_text()))
    alone = _left_alone(contender, job, folders[1])
    kills = [Kill(**kill) for kill in job["kills"]]
    spans = alone.spans()
    attempts, errors = survive(contender, job, folders[2], kills, spans)
    killed = [one for one in attempts if one.status == -signal.SIGKILL]
    whole, again, cut = (load_file(folder / "weights.safetensors") for folder in folders)
    return {
        "kills": len(killed),
        "kills_within_a_save": sum(one.within_a_save for one in killed),
        "of_these_at_its_last_line": sum(one.within_a_save and one.count(_OVER) for one in killed),
        "resumes_that_failed": sum(errors.values()),
        "errors": dict(errors),
        "updates": alone.count(_UPDATED),
        "updates_done_again": sum(one.count(_UPDATED) for one in attempts) - alone.count(_UPDATED),
        "left_alone_twice_is_bit_identical": _difference(whole, again) == 0,
        "bit_identical": _difference(whole, cut) == 0,
        "largest_difference_of_a_weight": _difference(whole, cut),
        "largest_weight": max(float(weight.abs().max()) for weight in whole.values()),
        "usual_update_seconds": round(spans["update"], 4),
        "shortest_save_seconds": round(spans["save"], 4),
        "seconds_left_alone": round(alone.seconds, 2),
        "seconds_more": round(sum(one.seconds for one in attempts) - alone.seconds, 2),
        "cpu_seconds_left_alone": round(alone.cpu_seconds, 2),
        "cpu_seconds_more": round(sum(one.cpu_seconds for one in attempts) - alone.cpu_seconds, 2),
    }


def _difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest of any number in either; 0 where all bits are equal, infinite where there are others."""
    import torch

    if one.keys() != other.keys():
        return float("inf")
    if all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one):
        return 0.0
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def ask(name: str, job: dict[str, Any], kills: Sequence[Kill], seconds: float) -> dict[str, Any]:
    """`contend` in a process of its own, which has so many seconds.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    folder = Path(job["folder"])
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job | {"kills": [asdict(kill) for kill in kills]}))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.survivors", name, str(folder / "job.json")],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads((folder / "ended.json").read_text()))
