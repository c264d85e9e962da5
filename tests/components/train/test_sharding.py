"""A training whose state lies in pieces among its processes does what one process does.

Two processes on processors, by gloo; GPUs run the same code over another transport.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.shared.errors import SpecError
from components.train.sharding.config import Sharding
from components.train.sharding.engine import settings_of
from components.train.trainjob import RESTARTABLE
from pipelines.spec import load

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("sharded_ranks.py")
# Two processes import torch, transformers and peft, and do several fits.
slow = pytest.mark.slow
deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"), reason="DeepSpeed comes with the dev and gpu extras"
)


def rows(count):
    words = random.Random(0)
    return [
        {
            "id": f"{i:03}",
            "origin": {"file": "corpus.jsonl", "line": i, "part": "main"},
            "prompt": f"question {i} " * words.randint(1, 4),
            "completion": f"合同 {i} " * words.randint(1, 9),
        }
        for i in range(count)
    ]


def case(base, name, sharding, adapter="lora", way="plain", **more):
    # 19 examples in updates of six: the last one has one example, and one process of two none.
    config = {
        "objective": "sft",
        "base_model": str(base),
        "precision": "float32",
        "adapter": {"kind": adapter, **({"dropout": 0.0} if adapter == "lora" else {})},
        "per_device_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "epochs": 2,
        "early_stopping": None,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.5,
        "weight_decay": 0.1,
        "checkpoint_steps": 2,
    }
    kind, _, offload = sharding.partition("/")
    given = {"sharding": {"kind": kind, "offload": offload or "none"}}
    return {"name": name, "way": way, "rows": rows(23), "config": config, **given, **more}


def launched(folder, base, cases, processes=2):
    """Folder with what each process of each case leaves."""
    folder.mkdir()
    (folder / "given.json").write_text(json.dumps({"cases": cases}))
    command = [sys.executable, str(PROGRAM), str(base), str(folder / "given.json"), str(folder)]
    if processes > 1:
        run = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
        command[1:1] = [*run, "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | RESTARTABLE
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def facts(folder, rank=0):
    return json.loads((folder / f"rank-{rank}" / "facts.json").read_text())


def weights(folder):
    return load_file(folder / "rank-0" / "whole.safetensors")


@pytest.fixture(scope="module")
def alone(tiny_causal, tmp_path_factory):
    cases = [case(tiny_causal, kind, "none", kind) for kind in ("lora", "full")]
    return launched(tmp_path_factory.mktemp("alone") / "out", tiny_causal, cases, processes=1)


def assert_as_one(folder, reference):
    """History and weights are those of one process: the same float32 sums in another order.

    Over seven updates losses moved by 5e-7, gradient norms by 1e-7 of their size and weights by 3e-8.
    """
    (base, found), (reference_base, expected) = facts(folder)["history"], facts(reference)["history"]
    assert base == pytest.approx(reference_base, abs=1e-5)
    assert len(found) == len(expected) == 7
    for row, same in zip(found, expected, strict=True):
        assert row.keys() >= {"loss", "grad_norm"}
        for name in {"loss", "eval_loss", "grad_norm"} & row.keys():
            assert row[name] == pytest.approx(same[name], rel=1e-5), (name, row["step"])
    # Clipping did something, or a wrong norm would not show.
    assert max(row["grad_norm"] for row in expected) > 1.0
    ours, theirs = weights(folder), weights(reference)
    assert ours.keys() == theirs.keys()
    assert max(float((weight - ours[name]).abs().max()) for name, weight in theirs.items()) < 1e-5


def assert_same(one, other):
    ours, theirs = weights(one), weights(other)
    assert all(torch.equal(weight, ours[name]) for name, weight in theirs.items())


def assert_each_holds_half(folder):
    whole = sum(weight.numel() for weight in weights(folder).values())
    assert [facts(folder, rank)["held"] for rank in (0, 1)] == [whole // 2] * 2


def assert_seen_alike(folder):
    """What the first process saves is, in its second half, what the second one holds."""
    whole = weights(folder)
    for name, part in load_file(folder / "rank-1" / "parts.safetensors").items():
        chunks = whole[name].chunk(2)
        assert torch.equal(part, chunks[1] if len(chunks) > 1 else part[:0]), name


# --- fsdp2 ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fsdp2(tiny_causal, tmp_path_factory):
    cases = [
        case(tiny_causal, "full", "fsdp2", "full"),
        case(tiny_causal, "full-cut", "fsdp2", "full", "cut-off"),
        case(tiny_causal, "lora", "fsdp2"),
        case(tiny_causal, "lora-told", "fsdp2", way="interrupted"),
        case(tiny_causal, "lora-cpu", "fsdp2/cpu"),
        case(tiny_causal, "moved", "fsdp2", "full", "cut-off", then={"kind": "none"}),
    ]
    return launched(tmp_path_factory.mktemp("fsdp2") / "out", tiny_causal, cases)


@slow
@pytest.mark.parametrize("name", ["full", "lora", "lora-cpu"])
def test_pieces_by_fsdp2_train_as_one_process_does(fsdp2, alone, name):
    assert_as_one(fsdp2 / name, alone / name.partition("-")[0])
    assert_each_holds_half(fsdp2 / name)
    assert_seen_alike(fsdp2 / name)


@slow
def test_pieces_by_fsdp2_go_on_from_a_checkpoint_as_if_nothing_had_been(fsdp2, alone):
    assert_same(fsdp2 / "full-cut", fsdp2 / "full")
    assert_same(fsdp2 / "lora-told", fsdp2 / "lora")
    # A checkpoint is whole: one of pieces is gone on from without, and the other way round.
    assert_as_one(fsdp2 / "moved", alone / "full")
    assert not list((fsdp2 / "full" / "rank-1").glob("**/step-*"))


# --- zero -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zero(tiny_causal, tmp_path_factory):
    cases = [
        case(tiny_causal, "zero1", "zero1"),
        case(tiny_causal, "zero2", "zero2/cpu", "full"),
        case(tiny_causal, "zero2-cut", "zero2/cpu", "full", "cut-off"),
        case(tiny_causal, "zero3", "zero3"),
        case(tiny_causal, "zero3-cut", "zero3", way="cut-off"),
        case(tiny_causal, "zero3-full", "zero3/cpu", "full", "interrupted"),
        case(tiny_causal, "moved", "zero3", way="cut-off", then={"kind": "fsdp2"}),
    ]
    return launched(tmp_path_factory.mktemp("zero") / "out", tiny_causal, cases)


@slow
@deepspeed
@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("zero1", "lora"),
        ("zero2", "full"),
        ("zero2-cut", "full"),
        ("zero3", "lora"),
        ("zero3-full", "full"),
        ("moved", "lora"),
    ],
)
def test_pieces_by_zero_train_as_one_process_does(zero, alone, name, like):
    assert_as_one(zero / name, alone / like)
    if name.startswith("zero3"):
        assert_each_holds_half(zero / name)


@slow
@deepspeed
def test_pieces_by_zero_go_on_from_a_checkpoint_as_if_nothing_had_been(zero):
    assert_same(zero / "zero2-cut", zero / "zero2")
    assert_same(zero / "zero3-cut", zero / "zero3")


@deepspeed
@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_deepspeed_knows_every_setting_that_it_is_given(kind, offload, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given = settings_of(Sharding(kind=kind, offload=offload), 0.5)
    read = DeepSpeedConfig(dict(given))
    assert read.zero_optimization_stage == int(kind[-1])
    assert read.gradient_clipping == 0.5
    assert not read.zero_force_ds_cpu_optimizer
    assert (read.zero_config.offload_optimizer is not None) == (offload == "cpu")
    assert (read.zero_config.offload_param is not None) == (offload == "cpu" and kind == "zero3")
    known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(given["zero_optimization"]) <= known


# --- what a pipeline file may say -----------------------------------------------------------------

FILE = """name: many
ingest: {{source: ./corpus.jsonl}}
train:
  objective: {objective}
  base_model: ./model
{train}
hardware:
  {hardware}
"""


def read(tmp_path, hardware, objective="sft", train=""):
    path = tmp_path / "many.yaml"
    path.write_text(FILE.format(hardware=hardware, objective=objective, train=train))
    return load(str(path))


def test_the_hardware_section_says_how_a_training_is_cut_up(tmp_path):
    spec = read(tmp_path, "{nodes: 2, gpus_per_node: 8, sharding: zero3, offload: cpu}")
    assert spec.hardware.sharded() == Sharding(kind="zero3", offload="cpu")
    assert spec.hardware.processes == 16
    assert not read(tmp_path, "{gpus_per_node: 2}").hardware.sharded().weights


@pytest.mark.parametrize(
    ("hardware", "objective", "train", "said"),
    [
        ("{gpus_per_node: 2, offload: cpu}", "sft", "", "line 8: hardware.offload: there are no pieces"),
        ("{sharding: fsdp2}", "sft", "", "line 8: hardware.sharding: fsdp2 cuts a training up among GPUs"),
        (
            "{gpus_per_node: 2, sharding: zero2}",
            "dpo",
            "",
            "dpo computes on whole weights; zero2 goes with sft",
        ),
        ("{gpus_per_node: 2, sharding: fsdp2}", "contrastive", "", "contrastive computes on whole weights"),
        ("{gpus_per_node: 2, sharding: fsdp2}", "sft", "  adapter: qlora", "adapter qlora cannot be cut up"),
        (
            "{gpus_per_node: 2, sharding: fsdp2}",
            "sft",
            "  adapter: {kind: lora, dora: true}",
            "line 6: train.adapter.dora: its magnitudes read whole weights",
        ),
        (
            "{gpus_per_node: 2, sharding: zero3}",
            "sft",
            "  learning_rate: auto",
            "line 6: train.learning_rate: auto tries rates on whole weights",
        ),
        (
            "{gpus_per_node: 2, sharding: zero3}",
            "sft",
            "  retain: {source: ./kept, ewc: 1.0}",
            "line 6: train.retain.ewc: it holds the base's weights whole",
        ),
        ("{gpus_per_node: 2, sharding: fsdp}", "sft", "", "line 8: hardware.sharding"),
    ],
)
def test_what_cannot_be_cut_up_is_refused_when_the_file_is_read(tmp_path, hardware, objective, train, said):
    with pytest.raises(SpecError) as refused:
        read(tmp_path, hardware, objective, train)
    assert said in str(refused.value)


def test_all_that_cannot_be_cut_up_is_said_at_once(tmp_path):
    with pytest.raises(SpecError) as refused:
        read(tmp_path, "{sharding: zero1}", "ppo", "  adapter: {kind: progressive, every_steps: 2}")
    assert str(refused.value).count("hardware.sharding:") == 3
