"""`kill -9` at 20 points of a training, five of them within a save: ours beside transformers.Trainer.

A random Gemma 3 of two layers learns Python's reference manual by LoRA, packed, with dropout, 180 updates and
a checkpoint every four. One list of kills for both: after so many updates of an attempt and some part of the
next, or within its first or second save, at a moment that is drawn from the time a save takes. See
benchmarks/killing.py for how they die and benchmarks/survivors.py for what they run.

The Trainer is resumed as a user would, from `get_last_checkpoint`. Where it stops at a checkpoint that the
kill left half written, that folder is deleted by hand and it goes on from the one before; each time counts.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import search
from benchmarks.killing import OURS, TRAINER, ask, draw_kills

_KILLS, _WITHIN_A_SAVE, _SEED = 20, 5, 0
_ROWS = 40
_SECONDS = 1800
SETTINGS: dict[str, Any] = {
    "objective": "sft",
    "precision": "float32",
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.2},
    "per_device_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 180,
    "eval_steps": 16,
    "checkpoint_steps": 4,
    "keep_checkpoints": 3,
    "early_stopping": None,
    "learning_rate": 3e-3,
    "dropout": 0.1,
}


def _rows(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Pages of the manual: their first line asks, the beginning of the rest answers."""
    draw = random.Random(_SEED)
    pages = [text.strip().partition("\n") for text in texts if len(text) > 400][:_ROWS]
    return [
        {
            "id": f"{number:03}",
            "origin": {"file": "manual", "line": number, "part": "main"},
            "prompt": head[:60],
            "completion": rest.strip()[: draw.randint(20, 240)],
        }
        for number, (head, _, rest) in enumerate(pages)
    ]


def run() -> dict[str, Any]:
    """Kill both by the same list."""
    draw = random.Random(_SEED)
    kills = draw_kills(draw, _KILLS, _WITHIN_A_SAVE, SETTINGS["checkpoint_steps"])
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tuneyard-bench-") as folder:
        (model := Path(folder) / "model").mkdir()
        rows = _rows(search.base_model(model))
        for name in (OURS, TRAINER):
            print(f"  {name}", file=sys.stderr, flush=True)
            config = SETTINGS | {"base_model": str(model)}
            job = {"config": config, "rows": rows, "folder": str(Path(folder) / name)}
            found = ask(name, job, kills, _SECONDS)
            figures |= {f"{name}.{key}": value for key, value in found.items()}
    return figures
