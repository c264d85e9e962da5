"""A search: the best trial's model goes on, nothing is made twice, what fails says why."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from components.shared import jsonl
from components.shared.errors import TuneyardError
from components.shared.manifest import Manifest, describe
from components.shared.modelcard import ModelCard
from components.shared.stage import Artifact, Context
from components.train import train as stage
from components.train.config import TrainConfig
from components.train.objectives.sft import Sft
from components.train.search import search as searching
from components.train.search import worker
from components.train.search.config import SearchConfig
from components.train.search.space import with_settings
from components.train.search.study import Study, best

ROOT = Path(__file__).resolve().parents[3]
ORIGIN = {"file": "corpus.jsonl", "line": 1, "part": "main"}
RATES = {"learning_rate": [1e-5, 2e-2], "adapter.rank": [2, 4]}


class Here:
    """A crew of one that makes its trials in this process."""

    def __init__(self, folder, size):
        assert size == 1
        self.size, self.folder = size, folder
        self.said, self.answers, self.made = queue.Queue(), queue.Queue(), []

    def tell(self, slot, **message):
        if "end" in message:
            self.answers.put(message)
            return
        job = json.loads((self.folder / "job.json").read_text())
        if "tokens" in message:
            worker.make_tokens(job, self.folder)
            self.said.put({"tokens": True})
            return
        self.made.append(message["number"])
        asked = job, self.folder, message["number"], message["chosen"]
        self.thread = threading.Thread(target=worker.make_trial, args=(*asked, self.say, self.answers.get))
        self.thread.start()

    def say(self, **said):
        self.said.put(said)

    def heard(self):
        yield 0, self.said.get(timeout=60)

    def last_words(self, slot):
        return "its last words"

    def stop(self):
        pass


def rows(count):
    texts = [f"question {i} " * (1 + i % 3) for i in range(count)]
    return [
        {"id": f"{i:03}", "origin": ORIGIN, "prompt": text, "completion": f"合同 {i} " * (1 + i % 4)}
        for i, text in enumerate(texts)
    ]


def config_for(model, search, **changes):
    given = {"objective": "sft", "base_model": str(model), "precision": "float32", "max_steps": 8}
    given |= {"eval_steps": 2, "per_device_batch_size": 4, "checkpoint_steps": 2, "search": search}
    return TrainConfig(**(given | changes))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the stage: `run(config)` -> (result, folder of its outputs), its crew in `run.crews`."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def do(config, name="a", crew=Here, store=None):
        inputs = {}
        for side, part in (("train", rows(16)[:12]), ("eval", rows(16)[12:])):
            (tmp_path / side).mkdir(exist_ok=True)
            jsonl.write(tmp_path / side / "examples.jsonl", part)
            inputs[side] = Artifact(Manifest("dataset", describe(tmp_path / side)), tmp_path / side)
        home = tmp_path / name
        out = home / f"out-{len(do.crews)}"
        out.mkdir(parents=True)

        def started(*given):
            do.crews.append(crew(*given))
            return do.crews[-1]

        monkeypatch.setattr(searching, "Crew", started)
        context = Context("run", "tiny", "train", "k" * 64, store, out, home / "work")
        return stage.train(config, inputs, context), out

    do.crews = []
    return do


def weights(out):
    return load_file(out / "model" / "adapter_model.safetensors")


def tried(out):
    return list(jsonl.read(out / "ledger" / "trials.jsonl"))


def test_what_goes_on_is_the_training_of_the_best_settings_bit_for_bit(tiny_causal, run):
    config = config_for(tiny_causal, {"space": RATES, "trials": 4, "pruner": None})
    result, out = run(config)
    trials = tried(out)
    # A space of four combinations: none is tried twice.
    assert len({json.dumps(t["settings"], sort_keys=True) for t in trials}) == 4
    lowest = min(trials, key=lambda t: t["eval_loss"])
    assert [t["trial"] for t in trials if t["chosen"]] == [lowest["trial"]]
    assert lowest["settings"]["learning_rate"] == 2e-2  # at the other nothing is learnt in eight steps
    chosen = result.summary["search"]["chosen"]
    assert chosen == lowest["settings"] == ModelCard.read(out / "model").chosen
    assert result.metrics["eval_loss"] == lowest["eval_loss"] and result.metrics["search_steps"] == 32
    alone, its = run(with_settings(config, chosen), "alone")
    assert ModelCard.read(its / "model").chosen == {}
    assert alone.metrics["eval_loss"] == result.metrics["eval_loss"]
    ours, theirs = weights(out), weights(its)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    page = result.page.read_text()
    assert all(f"trial {n}</b>" in page for n in range(4)) and "<b style='font" not in page
    assert f"Trial {lowest['trial']} of 4 was chosen" in page
    # Of the others nothing is left on the disk.
    assert len(list((out.parent / "work" / "search" / "trials").iterdir())) == 1


def test_examples_are_encoded_once(tiny_causal, run, monkeypatch, tmp_path):
    kept, calls = SimpleNamespace(cache=tmp_path / "cache"), []
    monkeypatch.setattr(worker.Store, "from_environment", lambda: kept)
    real = Sft.encode_all

    def counted(self, examples):
        calls.extend(row["id"] for row in examples)
        return real(self, examples)

    monkeypatch.setattr(Sft, "encode_all", counted)
    asked = {"space": RATES, "trials": 3, "pruner": None}
    run(config_for(tiny_causal, asked, max_steps=2, eval_steps=1), store=kept)
    assert sorted(calls) == [f"{number:03}" for number in range(16)]


def test_what_falls_behind_is_ended_and_costs_fewer_steps(tiny_causal, run):
    # The first proposals of this seed begin with the high rate.
    asked = {"space": RATES, "trials": 4, "pruner": {"min_steps": 2, "reduction_factor": 2}}
    result, out = run(config_for(tiny_causal, asked))
    trials = tried(out)
    pruned = [t for t in trials if t["state"] == "pruned"]
    assert pruned and all(t["steps"] in (2, 4) for t in pruned)
    assert result.metrics["search_steps"] == sum(t["steps"] for t in trials) < 4 * 8
    assert "pruned" in result.page.read_text()


def test_a_trial_that_fails_says_why_and_the_others_go_on(tiny_causal, run, caplog):
    asked = {"space": {"learning_rate": [1e30, 2e-2]}, "trials": 2, "pruner": None}
    result, out = run(config_for(tiny_causal, asked))
    failed = [t for t in tried(out) if t["state"] == "failed"]
    assert [t["settings"]["learning_rate"] for t in failed] == [1e30]
    assert "loss is nan" in failed[0]["reason"] and failed[0]["reason"] in result.page.read_text()
    assert result.summary["search"]["trials"] == {"complete": 1, "failed": 1}
    assert result.summary["search"]["chosen"] == {"learning_rate": 2e-2}


def test_where_all_fail_the_error_has_the_reasons(tiny_causal, run):
    asked = {"space": {"learning_rate": [1e30, 1e31]}, "trials": 2}
    with pytest.raises(TuneyardError, match=r"all 2 trials failed.*loss is nan.*\n.*narrow"):
        run(config_for(tiny_causal, asked))


class Cut(Here):
    """Is killed with the third trial at step 4, in the midst of a record."""

    def heard(self):
        found = self.said.get(timeout=60)
        if len(self.made) == 3 and found.get("judged") == 4:
            self.answers.put({})  # no answer: the trial's thread ends as its process would
            self.thread.join()
            with (self.folder / "journal.log").open("a") as journal:
                journal.write('{"op_code":4,"wor')
            (self.folder / "journal.log.lock").touch()
            raise MemoryError
        yield 0, found


def test_cut_off_it_goes_on_without_making_a_trial_again(tiny_causal, run, caplog):
    asked = {"space": RATES | {"label_smoothing": {"low": 0, "high": 0.2}}, "trials": 5, "pruner": None}
    config = config_for(tiny_causal, asked)
    whole, out = run(config)
    with pytest.raises(MemoryError):
        run(config, "cut", Cut)
    caplog.set_level("INFO", logger="tuneyard.train")
    again, resumed = run(config, "cut")
    assert run.crews[-2].made == [0, 1, 2] and run.crews[-1].made == [2, 3, 4]
    assert "2 trials are done, 1 were cut off" in caplog.text and "resuming after step 2" in caplog.text
    assert tried(resumed) == tried(out)  # the same proposals, the same losses
    assert again.summary["search"]["trial"] == whole.summary["search"]["trial"]
    one, other = weights(out), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_search_of_other_settings_or_data_is_refused(tmp_path):
    search = SearchConfig(space=RATES, trials=2)
    Study(tmp_path, search, set(), "a" * 64).close()
    Study(tmp_path, search, set(), "a" * 64).close()
    with pytest.raises(TuneyardError, match=r"other settings or data \(aaaaaaaaaaaa, now bbbb"):
        Study(tmp_path, search, set(), "b" * 64)


def test_two_processes_never_run_one_search(tmp_path):
    search = SearchConfig(space=RATES, trials=2)
    first = Study(tmp_path, search, set(), "a")
    with pytest.raises(TuneyardError, match="another process runs the search"):
        Study(tmp_path, search, set(), "a")
    first.close()


class Dying(Here):
    """A process that vanishes with trial 0 as often as `deaths` says."""

    deaths = 1

    def tell(self, slot, **message):
        if message.get("number") == 0 and self.made.count(0) < self.deaths:
            self.made.append(0)
            self.said.put({"gone": "its process ended with signal 9"})
            return
        super().tell(slot, **message)


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_process_that_vanishes_is_replaced_once(tiny_causal, run, monkeypatch, deaths):
    monkeypatch.setattr(Dying, "deaths", deaths)
    asked = {"space": {"adapter.rank": [2, 4]}, "trials": 2, "pruner": None}
    _, out = run(config_for(tiny_causal, asked, max_steps=2, eval_steps=1), crew=Dying)
    assert [t["state"] for t in tried(out)] == (["complete"] * 2 if deaths == 1 else ["failed", "complete"])
    assert deaths == 1 or "signal 9" in tried(out)[0]["reason"]


def test_all_trials_are_judged_on_the_same_examples(tiny_causal, run):
    longest = 3 * 16 + 40
    asked = {"space": {"max_length": [24, longest]}, "trials": 2, "pruner": None}
    counted = []

    class Counting(Here):
        def heard(self):
            found = self.said.get(timeout=60)
            if found.get("ended") == "complete":
                counted.append(found["result"]["summary"]["examples"])
            yield 0, found

    run(config_for(tiny_causal, asked, max_steps=2, eval_steps=1, max_over_length=1.0), crew=Counting)
    assert counted[0]["train"] != counted[1]["train"] and counted[0]["eval"] == counted[1]["eval"]


def test_whole_numbers_stay_whole_and_logarithms_are_drawn_evenly(tmp_path):
    space = {"adapter.rank": {"low": 2, "high": 64}, "learning_rate": {"low": "1e-6", "high": 1, "log": True}}
    search = SearchConfig(space=space, trials=12)
    study = Study(tmp_path, search, {"adapter.rank"}, "a")
    for number in range(12):
        trial = study.propose()
        assert trial.number == number and type(trial.chosen["adapter.rank"]) is int
        study.end(trial, "complete", 1, loss=abs(trial.chosen["adapter.rank"] - 9))
    assert study.propose() is None
    rates = [t.chosen["learning_rate"] for t in study.trials()]
    assert sum(rate < 1e-3 for rate in rates) in range(2, 11)  # half of the decades, chance included
    assert best(study.trials()).loss == min(t.loss for t in study.trials())
    study.close()


def test_where_none_was_complete_the_best_of_the_pruned_is_trained_to_its_end(tiny_causal, run, monkeypatch):
    monkeypatch.setattr(Study, "saw", lambda self, trial, step, loss: trial.handle.report(loss, step) or True)
    asked = {"space": {"adapter.rank": [2, 4]}, "trials": 2, "pruner": {"min_steps": 2}}
    result, out = run(config_for(tiny_causal, asked))
    assert [(t["state"], t["steps"]) for t in tried(out)] == [("pruned", 2)] * 2
    assert result.summary["steps"] == 8 and ModelCard.read(out / "model").chosen


def test_runs_of_trials_are_nested_in_that_of_the_search_with_their_curves(tiny_causal, run, mlflow_store):
    from components.shared.mlflow_database import client

    asked = {"space": {"learning_rate": [1e-5, 2e-2, 1e30]}, "trials": 3, "pruner": {"min_steps": 2}}
    result, out = run(config_for(tiny_causal, asked), store=mlflow_store)
    found = result.summary["search"]
    mlflow = client()
    runs = mlflow.search_runs([mlflow.get_experiment_by_name("tiny").experiment_id])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert [r.info.run_id for r in parents] == [found["mlflow_run"]] and len(runs) == 4
    assert parents[0].data.metrics["eval_loss"] == found["eval_loss"]
    assert parents[0].data.params["search.trials"] == "3"
    children = {r.info.run_name: r for r in runs if r not in parents}
    assert set(children) == {f"run-trial-{n}" for n in range(3)}
    assert {r.data.tags["mlflow.parentRunId"] for r in children.values()} == {found["mlflow_run"]}
    best_run = children[f"run-trial-{found['trial']}"]
    assert ModelCard.read(out / "model").mlflow_run == best_run.info.run_id
    assert best_run.data.params["learning_rate"] == "0.02"
    curve = mlflow.get_metric_history(best_run.info.run_id, "eval_loss")
    assert {point.step for point in curve} == {0, 2, 4, 6, 8}
    ended = {t["trial"]: t["state"] for t in tried(out)}
    status = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
    assert {n: children[f"run-trial-{n}"].info.status for n in ended} == {
        n: status[state] for n, state in ended.items()
    }


def test_in_a_pod_a_search_goes_on_although_its_disk_is_gone(tiny_causal, run, store, tmp_path, monkeypatch):
    monkeypatch.setenv("KFP_POD_NAME", "a-pod")
    asked = {"space": RATES | {"label_smoothing": {"low": 0, "high": 0.2}}, "trials": 4, "pruner": None}
    config = config_for(tiny_causal, asked)
    with pytest.raises(MemoryError):
        run(config, "lost", Cut, store)
    shutil.rmtree(tmp_path / "lost")
    result, out = run(config, "again", store=store)
    # Two were complete and in the store; the one that was cut off begins anew.
    assert run.crews[-1].made == [2, 3] and [t["state"] for t in tried(out)] == ["complete"] * 4
    lowest = min(tried(out), key=lambda t: t["eval_loss"])
    assert result.metrics["eval_loss"] == lowest["eval_loss"] and weights(out)
    assert store.names("work/train/") == [f"work/train/{'k' * 64}/trial-search.json"]


@pytest.mark.slow  # starts four processes, each of which imports PyTorch
def test_killed_with_its_processes_it_ends_as_if_it_had_not_been(tiny_causal, tmp_path):
    asked = {"space": RATES | {"label_smoothing": {"low": 0, "high": 0.2}}, "trials": 4, "parallel": 1}
    config = config_for(tiny_causal, asked | {"pruner": {"min_steps": 20, "reduction_factor": 2}})
    config = config.model_copy(update={"max_steps": 60, "eval_steps": 10, "checkpoint_steps": 5})
    job = {"config": config.model_dump(mode="json"), "train": rows(16)[:12], "eval": rows(16)[12:]}
    (tmp_path / "job.json").write_text(json.dumps(job))

    def begin(name):
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("searching.py")), str(tmp_path), name],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": ""},
            stderr=subprocess.PIPE,
            text=True,
        )

    killed = begin("killed")
    for line in killed.stderr:
        if line.startswith("train: trial 2"):
            break
    trials = tmp_path / "killed" / "work" / "search" / "trials"
    while not list(trials.glob("*/checkpoints/step-*")):  # into the trial: those of the others are gone
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    again, whole = begin("killed"), begin("whole")
    said = again.communicate(timeout=200)[1]
    assert whole.communicate(timeout=200)[1] is not None and again.returncode == whole.returncode == 0, said
    assert "train: the search goes on; 2 trials are done, 1 were cut off" in said
    assert "trial 0:" not in said and "trial 1:" not in said
    one, other = (tmp_path / name / "out" for name in ("killed", "whole"))
    assert tried(one) == tried(other)
    ours, theirs = weights(one), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
