"""A process that makes one trial after the other: `python -m components.train.search.worker FOLDER SLOT`.

It is told what to do on standard input and answers on standard output, one JSON object a line; whatever else
writes to standard output writes to its log. When whoever started it is gone, so is it, at once: what goes on
from its checkpoints must be alone with them.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from components.shared import digest
from components.shared.errors import TuneyardError
from components.shared.manifest import Manifest
from components.shared.stage import Artifact, Context, Result
from components.shared.store import Store
from components.train.config import TrainConfig
from components.train.search.guide import Guide, Pruned
from components.train.search.space import with_settings

log = logging.getLogger("tuneyard.train")

_TELL_SECONDS = 1.0

Say = Callable[..., None]
Hear = Callable[[], dict[str, Any]]


def folder_of(search: Path, config: TrainConfig) -> Path:
    """Where a trial of these settings is made: the same ones go on there, others never do."""
    return search / "trials" / digest.of_value(config.model_dump(mode="json"))[:16]


def make_tokens(job: Mapping[str, Any], folder: Path) -> None:
    """Encode the examples, which the trials then find kept; what is wrong with them is said before any."""
    from components.train.beginning import examples, opened

    config, context, inputs = _job(job, folder)
    opened(config, examples(inputs), context)


def make_trial(
    job: Mapping[str, Any], folder: Path, number: int, chosen: Mapping[str, Any], say: Say, hear: Hear
) -> None:
    """Make one trial, and say how it went.

    Args:
        job: what search.py wrote: settings, inputs, run.
        folder: of the search.
        number: of the trial.
        chosen: its settings.
        say: tells whoever listens.
        hear: waits for an answer.
    """
    from components.train.train import train_here

    steps = [0]
    try:
        config, context, inputs = _job(job, folder)
        mine = with_settings(config, chosen)
        home = folder_of(folder, mine)
        if (home / "result.json").exists():  # made by an attempt that was killed before it could say so
            say(ended="complete", **json.loads((home / "result.json").read_text()))
            return
        there = Context(
            context.run, context.pipeline, "train", context.key, context.store, home / "out", home
        )
        shutil.rmtree(there.out, ignore_errors=True)
        there.out.mkdir(parents=True)
        guide = _guide(job, number, chosen, partial(_watch, say, hear, steps, {}))
        result = train_here(mine, inputs, there, guide=guide)
    except Pruned:
        shutil.rmtree(home / "out")
        say(ended="pruned", steps=steps[0])
    except Exception as error:
        # Whatever it is, it is this trial's: the others go on, and the search tells the reason.
        log.exception("trial %d failed", number)
        what = error.what if isinstance(error, TuneyardError) else f"{type(error).__name__}: {error}"
        say(ended="failed", steps=steps[0], reason=what.splitlines()[0])
    else:
        say(ended="complete", **_kept(result, steps[0], home))
    gc.collect()  # the model, before the next one comes


def _guide(
    job: Mapping[str, Any], number: int, chosen: Mapping[str, Any], watch: Callable[..., None]
) -> Guide:
    parent = job["mlflow_run"]
    tags = {"mlflow.parentRunId": parent} if parent else {}
    return Guide(dict(chosen), f"-trial-{number}", tags, int(job["longest_judged"]), watch)


def _kept(result: Result, steps: int, home: Path) -> dict[str, Any]:
    """What a complete trial says, once it is on disk."""
    facts = {name: value for name, value in asdict(result).items() if name != "page"}
    found = {"steps": steps, "loss": result.metrics["eval_loss"], "result": facts}
    aside = home / ".result.json"
    aside.write_text(json.dumps(found))
    os.replace(aside, home / "result.json")
    return found


def _watch(
    say: Say,
    hear: Hear,
    steps: list[int],
    told: dict[str, float],
    history: Sequence[Mapping[str, float]],
) -> None:
    """Tell how a trial stands: each evaluation, which is answered, and now and then its step."""
    if not history:
        return
    row = history[-1]
    steps[0] = int(row["step"])
    for past in history[int(told.get("judged", 0)) :]:
        if "eval_loss" in past:
            say(judged=int(past["step"]), loss=past["eval_loss"])
            told["judged"] = past["step"]
            if hear()["end"]:
                raise Pruned
    now = time.monotonic()
    if now - told.get("at", 0.0) > _TELL_SECONDS:
        told["at"] = now
        say(at=steps[0])


def _job(job: Mapping[str, Any], folder: Path) -> tuple[TrainConfig, Context, dict[str, Artifact]]:
    """Settings of the stage, its context, and its inputs."""
    store: Any = Store.from_environment() if job["store"] else None
    context = Context(job["run"], job["pipeline"], "train", job["key"], store, folder / "out", folder)
    inputs = {
        name: Artifact(Manifest.from_json(given["manifest"], name), Path(given["path"]))
        for name, given in job["inputs"].items()
    }
    return TrainConfig.model_validate(job["config"]), context, inputs


def _converse() -> tuple[Say, Hear]:
    """Take standard output and input for what this process says and hears."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    heard: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            heard.put(json.loads(line))
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    return say, heard.get


def main() -> int:
    """Do what is asked until there is nothing more. Returns the exit status."""
    folder, slot = Path(sys.argv[1]), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("tuneyard").setLevel(logging.INFO)
    say, hear = _converse()
    job = json.loads((folder / "job.json").read_text())
    _take_gpu(slot)
    try:
        while True:
            asked = hear()
            if "tokens" in asked:
                try:
                    make_tokens(job, folder)
                except TuneyardError as error:
                    say(refused=error.facts())
                else:
                    say(tokens=True)
                continue
            make_trial(job, folder, asked["number"], asked["chosen"], say, hear)
    except KeyboardInterrupt:
        return 130


def _take_gpu(slot: int) -> None:
    """One GPU for each process, in turn where there are fewer."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(slot % torch.cuda.device_count())


if __name__ == "__main__":
    sys.exit(main())
