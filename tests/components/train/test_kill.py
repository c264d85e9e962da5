"""`kill -9` at twenty points, five of them within a save: the weights are those of a run left alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.kill import SETTINGS
from benchmarks.killing import OURS, TRAINER, Contender, Kill, ask, contend, draw_kills
from components.train import checkpoint

ROOT = Path(__file__).resolve().parents[3]


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


@pytest.mark.slow
def test_twenty_kills_change_no_bit(tiny_causal, tmp_path):
    draw = random.Random(time.time_ns())
    kills = draw_kills(draw, 20, 5, SETTINGS["checkpoint_steps"])
    config = SETTINGS | {"base_model": str(tiny_causal)}
    found = ask(OURS, {"config": config, "rows": rows(40), "folder": str(tmp_path / "ours")}, kills, 500)
    assert found["kills"] == 20 and found["kills_within_a_save"] >= 5
    assert found["resumes_that_failed"] == 0
    assert found["left_alone_twice_is_bit_identical"] and found["bit_identical"], kills


@pytest.mark.slow
def test_the_trainer_dies_by_the_same_list(tiny_causal, tmp_path):
    config = SETTINGS | {"base_model": str(tiny_causal), "max_steps": 16}
    given = {"config": config, "rows": rows(20), "folder": str(tmp_path / "trainer")}
    found = ask(TRAINER, given, [Kill("save", 2, 0.2), Kill("update", 3, 0.9)], 500)
    assert found["kills"] == 2 and found["updates"] == 16
    assert found["kills_within_a_save"] >= 1
    assert found["left_alone_twice_is_bit_identical"]
    # What it stopped at was deleted, and it ended all the same.
    assert sum(found["errors"].values()) == found["resumes_that_failed"] <= 2


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_of_every_update_within_ten_seconds(tiny_causal, tmp_path):
    """At a moment nobody chose, most likely within an update or a save: those take nearly all of the time."""
    command = [sys.executable, "-m", "tests.components.train.told_to_stop", str(tiny_causal), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        done = 0
        while done < 10:
            line = process.stdout.readline()
            assert line, process.wait()
            done = int(line)
        time.sleep(random.Random(time.time_ns()).random())
        process.terminate()
        began = time.monotonic()
        done = max([done, *map(int, process.stdout.read().split())])
        process.wait()
    assert time.monotonic() - began < 10
    assert process.returncode != 0
    found = checkpoint.newest(tmp_path)
    assert found and done <= found[1]["step"] <= done + 1 and found[0].name == f"step-{found[1]['step']}"


class Plain:
    """A checkpoint that is written where it stays, in two parts, between which one may die."""

    @staticmethod
    def save(folder, step, state):
        (folder / f"step-{step}").mkdir(exist_ok=True)
        (folder / f"step-{step}" / "state.json").write_text("{")
        # Long where one does die: the machine may be busy.
        time.sleep(1.0 if (folder.name, step) == ("killed", 10) else 0.02)
        (folder / f"step-{step}" / "state.json").write_text(json.dumps(state))


def forty_updates(job, folder):
    """Of one weight, with momentum; what `job` says is forgotten is not resumed."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    found = max(folder.glob("step-*"), key=lambda path: int(path.name[5:]), default=None)
    start = int(found.name[5:]) if found else 0
    momentum = None
    if found:
        state = json.loads((found / "state.json").read_text())
        weight.data.fill_(state["weight"])
        momentum = torch.tensor([state["momentum"]])
        optimizer.state[weight]["momentum_buffer"] = momentum * (not job["forgets"])
    for step in range(start + 1, 41):
        if (folder.name, step) == ("killed", job["faulty"]):
            raise ValueError("a fault of the fit")
        weight.grad = torch.tensor([float(step % 7)])
        optimizer.step()
        time.sleep(0.002)
        if step % 5 == 0:
            momentum = optimizer.state[weight]["momentum_buffer"]
            Plain.save(folder, step, {"weight": weight.item(), "momentum": momentum.item()})
    save_file({"weight": weight.detach()}, folder / "weights.safetensors")


PLAIN = Contender(forty_updates, lambda: (Plain, "save"), "step-")


@pytest.fixture(scope="module", autouse=True)
def imported():
    """The first optimizer of a process imports for seconds, which no child should do again."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def job(folder, kills, **changes):
    kills = [vars(kill) for kill in kills]
    return {"folder": str(folder), "kills": kills, "forgets": False, "faulty": 0, **changes}


def test_a_kill_within_a_save_is_one_and_what_it_breaks_is_counted(tmp_path):
    kills = [Kill("update", 7, 0.5), Kill("save", 1, 10), Kill("update", 2, 0.0)]
    found = contend(PLAIN, job(tmp_path, kills))
    assert found["kills"] == 3 and found["updates"] == 40
    assert found["kills_within_a_save"] - found["of_these_at_its_last_line"] == 1
    # The half-written second checkpoint cannot be read; without it the fit goes on from the first.
    assert found["resumes_that_failed"] == 1 and found["errors"] == {
        "JSONDecodeError: Expecting property name enclosed in double quotes: line N column N (char N)": 1
    }
    # Two or three after the first checkpoint, five up to the broken one, two or three after the first again.
    assert 9 <= found["updates_done_again"] <= 11
    assert found["left_alone_twice_is_bit_identical"] and found["bit_identical"]
    assert found["largest_difference_of_a_weight"] == 0


def test_a_resume_that_is_none_shows(tmp_path):
    found = contend(PLAIN, job(tmp_path, [Kill("update", 7, 0.5)], forgets=True))
    assert found["left_alone_twice_is_bit_identical"] and not found["bit_identical"]
    assert found["largest_difference_of_a_weight"] > 0.1


def test_no_checkpoint_is_deleted_for_a_fault_of_the_fit(tmp_path):
    with pytest.raises(RuntimeError, match="no checkpoint's fault: ValueError: a fault of the fit"):
        contend(PLAIN, job(tmp_path, [], faulty=12))
    assert sorted(path.name for path in (tmp_path / "killed").glob("step-*")) == ["step-10", "step-5"]


def test_the_list_leaves_each_attempt_something_to_kill():
    every = SETTINGS["checkpoint_steps"]
    for seed in range(50):
        kills = draw_kills(random.Random(seed), 20, 5, every)
        assert len(kills) == 20 and sum(kill.within == "save" for kill in kills) == 5
        most = [kill.number * every if kill.within == "save" else kill.number + 1 for kill in kills]
        assert sum(most) < SETTINGS["max_steps"]
