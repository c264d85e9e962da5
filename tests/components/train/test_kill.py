"""`kill -9` at twenty points, five of them within a save: the weights are those of a run left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[3]
WITHIN_A_SAVE = 5
KILLS = 20


def rows(count):
    draw = random.Random(0)
    return [
        {
            "id": f"{i:03}",
            "origin": {"file": "corpus.jsonl", "line": i, "part": "main"},
            "prompt": f"question {i} " * draw.randint(1, 4),
            "completion": f"合同 {i} " * draw.randint(1, 9),
        }
        for i in range(count)
    ]


def run(job, path):
    path.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killing.py")), str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder = Path(job["folder"])
    return json.loads((folder / "ended.json").read_text()), load_file(folder / "weights.safetensors")


def job(tiny_causal, folder, kills, **changes):
    config = {
        "objective": "sft",
        "base_model": str(tiny_causal),
        "precision": "float32",
        "adapter": {"kind": "lora", "rank": 4, "dropout": 0.2},
        "per_device_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 240,
        "eval_steps": 16,
        "checkpoint_steps": 5,
        "early_stopping": None,
        "learning_rate": 3e-3,
        "dropout": 0.1,
        **changes,
    }
    return {"config": config, "rows": rows(40), "folder": str(folder), "kills": kills}


@pytest.mark.slow
def test_twenty_kills_change_no_bit(tiny_causal, tmp_path):
    (whole,), expected = run(job(tiny_causal, tmp_path / "whole", []), tmp_path / "whole.json")
    assert whole["status"] == 0
    seconds = json.loads((tmp_path / "whole" / "seconds.json").read_text())
    draw = random.Random(time.time_ns())
    # Together they are less than the whole run, so that each finds something left to kill.
    kills = [{"seconds": draw.uniform(0.002, 0.06) * seconds} for _ in range(KILLS - WITHIN_A_SAVE)]
    # A save is some thirteen of these operations; the first of an attempt are those of its first save.
    kills += [{"write": write} for write in draw.sample(range(1, 13), WITHIN_A_SAVE)]
    draw.shuffle(kills)
    ended, found = run(job(tiny_causal, tmp_path / "cut", kills), tmp_path / "cut.json")
    assert [one["status"] for one in ended] == [-signal.SIGKILL] * KILLS + [0]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
