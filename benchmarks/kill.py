"""`kill -9` at 20 points of a training, five of them within a save: ours beside transformers.Trainer.

A random Gemma 3 of two layers learns Python's reference manual by LoRA, packed, with dropout, 240 updates and
a checkpoint every five. One list of kills for both: after so many updates of an attempt and some part of the
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
from benchmarks.killing import OURS, TRAINER, Kill, ask, draw_kills

_KILLS, _WITHIN_A_SAVE, _SEED = 20, 5, 0
_ROWS = 40
_SECONDS = 1800
SETTINGS: dict[str, Any] = {
    "objective": "sft",
    "precision": "float32",
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.2},
    "per_device_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 240,
    "eval_steps": 16,
    "checkpoint_steps": 5,
    "keep_checkpoints": 3,
    "early_stopping": None,
    "learning_rate": 3e-3,
    "dropout": 0.1,
}


def _rows(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Pages of the manual: their first line asks, and some of what follows answers."""
    draw = random.Random(_SEED)
    return [
        {
            "id": f"{number:03}",
            "origin": {"file": "manual", "line": number, "part": "main"},
            "prompt": text.strip().splitlines()[0][:60],
            "completion": text.strip()[60 : 60 + draw.randint(20, 240)],
        }
        for number, text in enumerate(text for text in texts if len(text) > 400)
    ][:_ROWS]


def measure(
    base: Path, rows: Sequence[dict[str, Any]], kills: Sequence[Kill], folder: Path, **changes: Any
) -> dict[str, Any]:
    """Both contenders under the same kills.

    Args:
        base: folder of the model.
        rows: examples; the first four are judged while fitting.
        kills: when attempts die.
        folder: to work in.
        changes: of SETTINGS.
    """
    config = SETTINGS | {"base_model": str(base)} | changes
    figures: dict[str, Any] = {}
    for name in (OURS, TRAINER):
        print(f"  {name}", file=sys.stderr, flush=True)
        job = {"config": config, "rows": list(rows), "folder": str(folder / name)}
        found = ask(name, job, kills, _SECONDS)
        figures |= {f"{name}.{key}": value for key, value in found.items()}
    return figures


def run() -> dict[str, Any]:
    """Kill both by the same list."""
    with tempfile.TemporaryDirectory(prefix="tuneyard-bench-") as folder:
        (model := Path(folder) / "model").mkdir()
        rows = _rows(search.base_model(model))
        draw = random.Random(_SEED)
        kills = draw_kills(draw, _KILLS, _WITHIN_A_SAVE, SETTINGS["checkpoint_steps"])
        return measure(model, rows, kills, Path(folder))
