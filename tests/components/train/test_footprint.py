"""The dry run holds what a real run holds: the same code on numbers is what it is compared with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.shared import jsonl
from components.shared.dryrun import no_weights_read, shapes_only
from components.shared.errors import StageStopped
from components.train import footprint
from components.train.adapters.applying import apply_adapter
from components.train.config import TrainConfig
from components.train.objectives.opening import open_objective
from components.train.update import gradients
from tests.live import Counted

ROOT = Path(__file__).resolve().parents[3]
ORIGIN = {"file": "corpus.jsonl", "line": 1, "part": "main"}


def prompts(count, words):
    text = " ".join(["rent"] * words)
    return [
        {"id": f"{i:03}", "origin": ORIGIN, "prompt": text, "completion": f"{text} {i}"} for i in range(count)
    ]


def labelled(count, words):
    text = " ".join(["profit"] * words)
    return [
        {"id": f"{i:03}", "origin": ORIGIN, "text": text, "label": ("up", "down")[i % 2]}
        for i in range(count)
    ]


def working_bytes(config, folder, rows, live):
    """Most bytes of an update beyond those that are there before it."""
    objective = open_objective(config, rows, Path(folder))
    apply_adapter(objective, config)
    objective.model.train()
    batch = [objective.encode(row) for row in rows[: config.per_device_batch_size]]
    for weight in objective.model.parameters():
        live.see(weight)
    before = live.peak = live.bytes
    gradients(objective, [batch, batch], config, config.precision)
    return before, live.peak - before


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_dry_update_holds_what_a_real_one_does(tiny_causal, kind, precision):
    adapter = {"kind": "lora", "dropout": 0.1} if kind == "lora" else {"kind": "full"}
    config = TrainConfig(
        objective="sft",
        base_model=str(tiny_causal),
        adapter=adapter,
        precision=precision,
        per_device_batch_size=4,
        max_length=256,
    )
    rows = prompts(4, 40)
    with shapes_only() as live, no_weights_read():
        dry = working_bytes(config, tiny_causal, rows, live)
    with Counted() as live:
        real = working_bytes(config, tiny_causal, rows, live)
    assert dry[0] == real[0]
    # A few small tensors are made where one mode or the other does not look.
    assert dry[1] == pytest.approx(real[1], rel=0.03)


def test_a_dry_encoder_holds_what_a_real_one_does(tiny_encoder):
    config = TrainConfig(
        objective="classification", base_model=str(tiny_encoder), precision="float32", per_device_batch_size=8
    )
    rows = labelled(8, 12)
    with shapes_only() as live, no_weights_read():
        dry = working_bytes(config, tiny_encoder, rows, live)
    with Counted() as live:
        real = working_bytes(config, tiny_encoder, rows, live)
    assert dry[1] == pytest.approx(real[1], rel=0.03)


def predicted(folder, rows, **settings):
    config = TrainConfig(
        objective="sft", base_model=str(folder), precision="float32", max_length=400, **settings
    )
    return footprint.predict(config, Path(folder), rows, 0)


def test_what_is_held_between_updates_is_weights_moments_and_the_best(tiny_causal):
    found = predicted(tiny_causal, prompts(8, 20), adapter="full")
    assert found.moving_weights == found.total_weights
    # Two moments and a copy beside each weight, buffers and a step count for each tensor.
    assert found.held_bytes == pytest.approx(4 * 4 * found.total_weights, rel=0.02)


def test_less_is_needed_for_what_is_said_to_need_less(tiny_causal):
    rows = prompts(16, 50)
    whole = predicted(tiny_causal, rows, adapter="full", per_device_batch_size=8).peak_bytes
    half = predicted(
        tiny_causal, rows, adapter="full", per_device_batch_size=4, gradient_accumulation_steps=2
    ).peak_bytes
    again = predicted(tiny_causal, rows, adapter="full", per_device_batch_size=8, gradient_checkpointing=True)
    assert half < 0.8 * whole
    assert again.peak_bytes < 0.8 * whole


def test_the_heaviest_micro_batch_is_the_one_with_the_longest(tiny_causal):
    rows = [*prompts(15, 5), *prompts(1, 55)]
    assert predicted(tiny_causal, rows, per_device_batch_size=1).batch_tokens > 290


@pytest.mark.parametrize("adapter", ["qlora", "pfeiffer", "prefix", {"kind": "last_layers", "layers": 1}])
def test_every_kind_of_adapter_can_be_predicted(tiny_causal, adapter):
    found = predicted(tiny_causal, prompts(4, 10), adapter=adapter)
    assert 0 < found.moving_weights < found.total_weights
    assert found.peak_bytes > found.held_bytes


# Trains a model of 40 million weights in a process of its own: half a minute of CPU.
@pytest.mark.slow
def test_peak_memory_of_a_process_is_predicted_within_a_tenth(tmp_path, tiny_tokenizer):
    from tests.tiny import tiny_gemma

    base = tmp_path / "base"
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    kinds = {"layer_types": ["full_attention"] * 8, "head_dim": 64, "max_position_embeddings": 2048}
    model = tiny_gemma(16000, bos_token_id=1, eos_token_id=2, **sizes, **kinds)
    assert 35e6 < sum(weight.numel() for weight in model.parameters()) < 45e6
    model.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    rows = prompts(24, 80)
    config = TrainConfig(
        objective="sft",
        base_model=str(base),
        adapter="full",
        per_device_batch_size=6,
        max_length=512,
        max_steps=3,
        eval_steps=2,
        checkpoint_steps=2,
    )
    (tmp_path / "train.json").write_text(config.model_dump_json())
    jsonl.write(tmp_path / "train.jsonl", rows)
    jsonl.write(tmp_path / "eval.jsonl", rows[:8])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fitting", "train", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    measured = json.loads(done.stdout.splitlines()[-1])["peak_gib"] * 2**30
    file_bytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    said = footprint.predict(config, base, rows, file_bytes)
    assert said.process_bytes == pytest.approx(measured, rel=0.10)


def test_a_text_that_the_base_has_no_positions_for_stops_the_dry_run(tiny_encoder):
    config = TrainConfig(objective="classification", base_model=str(tiny_encoder), max_length=512)
    with pytest.raises(StageStopped, match="302 tokens, the base model reads 128"):
        footprint.predict(config, Path(tiny_encoder), [*labelled(6, 12), *labelled(2, 300)], 0)
