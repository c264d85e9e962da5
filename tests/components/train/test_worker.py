"""Several processes train as one, and go on after one of them was killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from components.shared import jsonl
from components.shared.errors import EXIT_STOPPED, StageStopped, TuneyardError
from components.shared.manifest import Manifest
from components.shared.stage import Artifact, Context
from components.train import checkpoint, job, keeping, processes, train, worker
from components.train.config import TrainConfig
from components.train.data import dealt
from components.train.ranks import ALONE, Ranks
from components.train.sharding.config import HERE, Processes, Sharding
from components.train.trainjob import KEY, RESTARTABLE

ROOT = Path(__file__).resolve().parents[3]
ORIGIN = {"file": "corpus.jsonl", "line": 7, "part": "main"}


def rows(count):
    words = random.Random(0)
    return [
        {
            "id": f"{i:03}",
            "origin": ORIGIN,
            "prompt": f"question {i} " * words.randint(1, 4),
            "completion": f"合同 {i} " * words.randint(1, 9),
        }
        for i in range(count)
    ]


def settings_for(base, **changes):
    usual = {
        "objective": "sft",
        "base_model": str(base),
        "precision": "float32",
        "adapter": {"kind": "lora", "dropout": 0.0},
        "per_device_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "early_stopping": None,
        "learning_rate": 1e-3,
    }
    return TrainConfig.model_validate(usual | changes)


def torchrun(processes, *program, **environment):
    """The processes of one node, as a node of a TrainJob starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    return [*command, "--max-restarts=3", *program], {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        **RESTARTABLE,
        **environment,
    }


# --- as one ---------------------------------------------------------------------------------------


def fitted(tiny_causal, folder, processes, mistaken="no", examples=None, **changes):
    """(history of losses, weights) of each process of a fit."""
    folder.mkdir()
    # 19 examples in updates of six: the last update has one, so that one process of two has none.
    given = {
        "config": settings_for(tiny_causal, epochs=2, **changes).model_dump(mode="json"),
        "rows": examples or rows(23),
    }
    (folder / "given.json").write_text(json.dumps(given))
    program = (str(Path(__file__).with_name("two_ranks.py")), str(tiny_causal), str(folder / "given.json"))
    command, environment = torchrun(processes, *program, str(folder), mistaken, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        (json.loads((rank / "history.json").read_text()), load_file(rank / "weights.safetensors"))
        for rank in sorted(folder.glob("rank-*"))
    ]


def apart(one, other):
    """(largest difference of a loss, largest difference of a weight)."""
    (base, history), weights = one
    (other_base, other_history), other_weights = other
    losses = [abs(base - other_base)]
    for row, same in zip(history, other_history, strict=True):
        losses += [abs(row[name] - same[name]) for name in ("loss", "eval_loss") if name in row]
    return max(losses), max(float((w - other_weights[n]).abs().max()) for n, w in weights.items())


def encoder_rows(objective):
    """Pairs with hard negatives, or examples of two tasks."""
    found = []
    for row in rows(23):
        text, number = row["prompt"], int(row["id"])
        pair = {"anchor": text, "positive": f"{text} pays", **({"negative": "losses"} if number % 3 else {})}
        asked = {"task": "ab"[number % 2], "text": text, "label": "xy"[len(text) % 2]}
        found.append({"id": row["id"], "origin": ORIGIN, **(pair if objective == "contrastive" else asked)})
    return found


@pytest.mark.parametrize("objective", ["contrastive", "multi-task"])
def test_two_processes_do_what_one_does_where_examples_depend_on_each_other(
    tiny_encoder, tmp_path, objective
):
    """Negatives from the other process, and gradients that are projected after they were summed."""
    settings = {"kind": objective, **({"gradients": "pcgrad"} if objective == "multi-task" else {})}
    changes = {"objective": settings, "adapter": {"kind": "full"}, "dropout": 0.0, "learning_rate": 1e-4}
    given = {"examples": encoder_rows(objective), **changes}
    (one,) = fitted(tiny_encoder, tmp_path / "one", 1, **given)
    first, second = fitted(tiny_encoder, tmp_path / "two", 2, **given)
    # The same float32 sums in another order, over eight updates; AdamW divides a gradient by its own size,
    # so that where one is all rounding, the rounding decides which way a weight moves by the learning rate.
    loss, weight = apart(one, first)
    assert loss < 1e-4 and weight < 2e-3
    assert apart(first, second) == (0.0, 0.0)


@pytest.mark.slow  # three processes that import torch and transformers
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_processes_do_what_one_does(tiny_causal, tmp_path, kind):
    adapter = {"kind": kind, **({"dropout": 0.0} if kind == "lora" else {})}
    (one,) = fitted(tiny_causal, tmp_path / "one", 1, adapter=adapter)
    first, second = fitted(tiny_causal, tmp_path / "two", 2, adapter=adapter)
    # The same float32 sums in another order, over eight updates.
    assert max(apart(one, first)) < 1e-5
    assert apart(first, second) == (0, 0)
    assert not list((tmp_path / "two" / "rank-1").glob("step-*"))


@pytest.mark.slow  # as above
def test_the_mean_of_the_processes_means_is_told_from_it(tiny_causal, tmp_path):
    (one,) = fitted(tiny_causal, tmp_path / "one", 1)
    mistaken, _ = fitted(tiny_causal, tmp_path / "two", 2, "mean-of-means")
    assert min(apart(one, mistaken)) > 1e-4


@given(
    st.lists(st.lists(st.text(max_size=9), min_size=1, max_size=4), min_size=1, max_size=5), st.integers(1, 7)
)
def test_each_example_of_an_update_goes_to_one_process(batches, count):
    config = SimpleNamespace(per_device_batch_size=4)
    parts = [dealt(batches, Ranks(rank, count), config) for rank in range(count)]
    dealt_out = [example for part in parts for micro in part for example in micro]
    assert sorted(dealt_out) == sorted(example for micro in batches for example in micro)
    assert all(len(micro) <= 4 for part in parts for micro in part)
    sizes = [sum(map(len, part)) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert dealt(batches, ALONE, config) == batches


# --- killed ---------------------------------------------------------------------------------------


@pytest.fixture
def ordered(tiny_causal, store, tmp_path):
    """Makes an order in the store, as the stage does: `ordered(key, **settings)`."""
    inputs: dict[str, Artifact] = {}
    for side, found in (("train", rows(40)), ("eval", rows(4))):
        (tmp_path / side).mkdir()
        jsonl.write(tmp_path / side / "examples.jsonl", found)
        inputs[side] = Artifact(store.put_tree(tmp_path / side, "dataset"), tmp_path / side)

    def make(key, sharding="none", **changes):
        context = Context("run", "tiny", "train", key, store, tmp_path / key[:4], tmp_path / key[:4])
        job.order(settings_for(tiny_causal, **changes), inputs, context, Sharding(kind=sharding))
        return context

    make.inputs = inputs
    return make


def started(key, home):
    command, environment = torchrun(2, "--module", "components.train.worker")
    environment |= {KEY: key, "TUNEYARD_HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (home.parent / f"{home.name}.log").open("w") as said:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=said, stderr=said)


def model_of(store, key, folder):
    """The weights of a result."""
    found = store.read_json(f"{keeping.folder(key)}/result.json")
    store.get_tree(Manifest.from_json(found["manifest"], "result"), folder)
    return load_file(folder / "model" / "adapter_model.safetensors"), found


def kill_rank(torchrun_process, rank):
    for child in psutil.Process(torchrun_process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            child.send_signal(signal.SIGKILL)
            return
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.parametrize(
    ("rank", "sharding"), [(0, "none"), (1, "none"), pytest.param(1, "fsdp2", marks=pytest.mark.slow)]
)
def test_a_killed_process_is_replaced_and_the_weights_are_those_of_an_undisturbed_run(
    ordered, store, tmp_path, rank, sharding
):
    settings = {"max_steps": 120, "checkpoint_steps": 10, "eval_steps": 40}
    whole, cut = "a" * 64, "b" * 64
    for key in (whole, cut):
        ordered(key, sharding, **settings)
        process = started(key, tmp_path / key[:4])
        if key == cut:
            while len(checkpoint.uploaded(store, keeping.folder(key))) < 2:
                assert process.poll() is None, (tmp_path / f"{key[:4]}.log").read_text()[-3000:]
                time.sleep(0.02)
            kill_rank(process, rank)
        assert process.wait(120) == 0, (tmp_path / f"{key[:4]}.log").read_text()[-3000:]
    assert "resuming after step" in (tmp_path / f"{cut[:4]}.log").read_text()
    expected, of_whole = model_of(store, whole, tmp_path / "w")
    found, of_cut = model_of(store, cut, tmp_path / "c")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert of_cut["metrics"]["eval_loss"] == of_whole["metrics"]["eval_loss"]
    assert of_cut["summary"]["steps"] == 120
    # Three are kept, as of a training on one machine.
    assert checkpoint.uploaded(store, keeping.folder(cut)) == [110, 100, 90]


@pytest.mark.slow  # as above
def test_the_gpus_of_one_machine_are_a_process_each(ordered, store, tmp_path, tiny_causal, monkeypatch):
    context = ordered("e" * 64)
    config = settings_for(tiny_causal, max_steps=6, checkpoint_steps=2)
    monkeypatch.setenv(HERE, Processes(count=2, sharding=Sharding(kind="fsdp2")).model_dump_json())
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(processes, "gpus", lambda: 2)
    result = train.train(config, ordered.inputs, context)
    assert result.summary["steps"] == 6
    found = load_file(context.out / "model" / "adapter_model.safetensors")
    # Saved whole: B of a layer has a row for each output, and the rank is its width.
    assert {tuple(w.shape) for n, w in found.items() if "v_proj.lora_B" in n} == {(16, 16)}
    assert checkpoint.uploaded(store, keeping.folder(context.key)) == []
    assert list(tmp_path.rglob("rank-1"))
    monkeypatch.setattr(processes, "gpus", lambda: 1)
    assert processes.asked_here() is None


# --- checkpoints in the store ---------------------------------------------------------------------


def test_only_a_whole_checkpoint_of_the_store_is_gone_on_from(store, tmp_path):
    prefix = "work/train/k"
    for step in (10, 20, 30):
        path = tmp_path / f"step-{step}"
        path.mkdir()
        (path / "weights.safetensors").write_bytes(b"w%d" % step)
        files = {"weights.safetensors": checkpoint.digest.of_file(path / "weights.safetensors")}
        (path / "state.json").write_text(json.dumps({"step": step, "state": {}, "files": files}))
        checkpoint.upload(store, prefix, path, 2)
    assert checkpoint.uploaded(store, prefix) == [30, 20]
    assert not [name for name in store.names(prefix) if "step-10" in name]
    # One whose writer was killed before its state came.
    store.client.put_object(
        Bucket=store.bucket, Key=store.key(f"{prefix}/step-40/weights.safetensors"), Body=b"x"
    )
    assert checkpoint.uploaded(store, prefix) == [30, 20]
    store.client.put_object(
        Bucket=store.bucket, Key=store.key(f"{prefix}/step-30/weights.safetensors"), Body=b"x"
    )
    assert not checkpoint.fetch(store, prefix, 30, tmp_path / "there")
    assert checkpoint.fetch(store, prefix, 20, tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["step-20"]


# --- what will not work ---------------------------------------------------------------------------


def test_what_no_attempt_would_change_is_told_to_the_stage(ordered, store, tmp_path, monkeypatch):
    key = "c" * 64
    context = ordered(key, max_length=8, over_length="error")
    monkeypatch.setenv(KEY, key)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert worker.main() == EXIT_STOPPED
    with pytest.raises(StageStopped, match=r"longer than train\.max_length"):
        job._raise_if_failed(SimpleNamespace(delete=lambda name: None), "job", context)


def test_an_image_of_other_code_does_not_train(ordered, store):
    key = "d" * 64
    ordered(key)
    name = f"{keeping.folder(key)}/order.json"
    store.write_json(name, store.read_json(name) | {"code": "0" * 64})
    with pytest.raises(TuneyardError, match="the stage has code 000000000000 and this image"):
        worker.work(key, ALONE, store)
    store.remove(name)
    with pytest.raises(TuneyardError, match=r"there is no work/train/d+/order.json"):
        worker.work(key, ALONE, store)
