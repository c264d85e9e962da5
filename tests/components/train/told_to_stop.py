"""A training in a process of its own: prints the number of each update, until it is told to stop.

`python -m tests.components.train.told_to_stop BASE FOLDER`: checkpoints go to FOLDER.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import torch

from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.fit import fit
from components.train.objectives.sft import Sft
from tests.components.train.test_kill import rows


def main() -> None:
    """See the module."""
    # As components/shared/stage.py has it in a stage.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    base, folder = sys.argv[1:]
    config = TrainConfig(
        objective="sft",
        base_model=base,
        max_steps=5000,
        eval_steps=5000,
        checkpoint_steps=7,
        precision="float32",
    )
    torch.set_num_threads(1)
    objective = Sft(Path(base), "float32")
    apply_adapter(objective, config)
    encoded = [objective.encode(row) for row in rows(20)]

    def report(history: list[dict[str, float]], ended: bool) -> None:
        sys.stdout.write(f"{len(history)}\n")
        sys.stdout.flush()

    fit(objective, encoded, encoded[:2], config, "float32", Path(folder), report)


if __name__ == "__main__":
    main()
