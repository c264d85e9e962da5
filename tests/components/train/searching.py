"""A search in a process of its own, to be killed: `searching.py FOLDER NAME`; job.json says what."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from components.shared import jsonl
from components.shared.manifest import Manifest, describe
from components.shared.stage import Artifact, Context
from components.train.config import TrainConfig
from components.train.train import train


def main(folder, name):
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    job = json.loads((folder / "job.json").read_text())
    home, inputs = folder / name, {}
    for side in ("train", "eval"):
        (home / side).mkdir(parents=True, exist_ok=True)
        jsonl.write(home / side / "examples.jsonl", job[side])
        inputs[side] = Artifact(Manifest("dataset", describe(home / side)), home / side)
    (home / "out").mkdir(exist_ok=True)
    context = Context("run", "tiny", "train", "k" * 64, None, home / "out", home / "work")
    train(TrainConfig.model_validate(job["config"]), inputs, context)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
