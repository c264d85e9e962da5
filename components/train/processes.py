"""A training on the GPUs of this machine: a process for each, as a node of a TrainJob has them.

The stage writes the same order for them as for a TrainJob (job.py) and takes what they leave.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping

from components.shared.errors import TuneyardError
from components.shared.stage import Artifact, Context, Result
from components.train import job, keeping
from components.train.config import TrainConfig
from components.train.sharding.config import HERE, Processes
from components.train.trainjob import KEY, RESTARTABLE

log = logging.getLogger("tuneyard.train")

# torchrun ends its processes 30 s after it was told to end, with a checkpoint or without.
_END_SECONDS = 40


def gpus() -> int:
    """How many this machine has."""
    import torch

    return int(torch.cuda.device_count())


def asked_here() -> Processes | None:
    """The processes to train with, where there is a GPU for each; otherwise None, for this one alone."""
    text = os.environ.get(HERE)
    if not text:
        return None
    asked, have = Processes.model_validate_json(text), gpus()
    if have >= asked.count:
        return asked
    log.info(
        "train: hardware: asks for %d GPUs and this machine has %d: one process trains, and holds all",
        asked.count,
        have,
    )
    return None


def train_in_processes(
    asked: Processes, config: TrainConfig, inputs: Mapping[str, Artifact], context: Context
) -> Result:
    """Have processes of this machine do the stage's work.

    Args:
        asked: how many, and what lies in pieces.
        config: settings of the stage.
        inputs: of the stage.
        context: of the stage.

    Raises:
        StageStopped: what the training found in the data stopped the line.
        TuneyardError: it failed.
    """
    job.raise_if_idle(1, asked.count, config)
    job.order(config, inputs, context, asked.sharding)
    for document in job.DOCUMENTS:
        context.store.remove(f"{keeping.folder(context.key)}/{document}")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={asked.count}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += ["--module", "components.train.worker"]
    # In a group of its own: Ctrl-C reaches it through here, once.
    running = subprocess.Popen(
        command,
        env={**os.environ, **RESTARTABLE, KEY: context.key},
        stdout=sys.stderr,
        start_new_session=True,
    )
    try:
        status = running.wait()
    except KeyboardInterrupt:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
        raise
    error = job.failure(context)
    if error is not None:
        raise error
    if status:
        raise TuneyardError(
            f"the {asked.count} processes of the training ended with status {status}",
            "what they said last stands above; submit again to go on from the last checkpoint",
        )
    return job.collect(context)
