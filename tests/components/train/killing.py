"""Fits that are killed: `python killing.py JOB` reads a JSON job and forks one process for each attempt.

Importing torch and transformers takes seconds, so one process does it and forks before it computes anything.
Each attempt goes on from what the one before left, and is killed by SIGKILL after its delay, or at its n-th
write of a checkpoint; the last attempt is left alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from components.train import checkpoint
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.fit import fit
from components.train.objectives.opening import open_objective


def attempt(job: dict, folder: Path, kill: dict) -> None:
    """Fit, and perhaps be killed."""
    torch.set_num_threads(1)
    config = TrainConfig.model_validate(job["config"])
    objective = open_objective(config, job["rows"], Path(config.base_model))
    torch.manual_seed(config.seed)
    apply_adapter(objective, config)
    encoded = [objective.encode(row) for row in job["rows"]]
    if "write" in kill:
        _die_at(kill["write"])
    if "seconds" in kill:
        threading.Timer(kill["seconds"], os.kill, (os.getpid(), signal.SIGKILL)).start()
    began = time.monotonic()
    fit(objective, encoded[4:], encoded[:4], config, "float32", folder, lambda *_: None)
    (folder / "seconds.json").write_text(json.dumps(time.monotonic() - began))
    save_file(checkpoint.copy_weights(objective.model), folder / "weights.safetensors")


def _die_at(write: int) -> None:
    """Be killed at the n-th of the operations by which a checkpoint comes to the disk."""
    left = write

    def counted(real):
        def call(*args, **named):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **named)

        return call

    import safetensors.torch

    safetensors.torch.save_file = counted(safetensors.torch.save_file)
    checkpoint.json.dumps, checkpoint.os.fsync = counted(json.dumps), counted(os.fsync)
    checkpoint.os.replace, checkpoint.shutil.rmtree = counted(os.replace), counted(shutil.rmtree)


def main() -> None:
    """Run all attempts of a job and say how each ended."""
    job = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    ended = []
    for kill in [*job["kills"], {}]:
        child = os.fork()
        if child == 0:
            try:
                attempt(job, folder, kill)
                os._exit(0)
            except BaseException as error:  # said, and the parent sees it
                sys.stderr.write(f"{error!r}\n")
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        steps = sorted(int(path.name[5:]) for path in folder.glob("step-*"))
        ended.append({"status": status, "steps": steps})
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
