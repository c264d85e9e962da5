"""The time of a training is told by one like it that ran: its own records, and what they are taken for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from components.shared import jsonl
from components.shared.manifest import Manifest, describe
from components.shared.stage import Artifact, Context
from components.shared.store import Listed
from components.train import measures
from components.train import train as stage
from components.train.config import TrainConfig
from pipelines import duration, pace, sizing
from pipelines.pace import Pace

ORIGIN = {"file": "corpus.jsonl", "line": 1, "part": "main"}


def curve(steps, seconds=2.0, judging=0.0, every=10**6, saving=0.0, save_steps=10**6):
    """Updates of 100 tokens; the first takes three times as long; evaluations and checkpoints lie between."""
    rows, now = [], 1000.0
    for step in range(1, steps + 1):
        own = seconds * (3 if step == 1 else 1)
        now += own
        rows.append({"step": step, "step_tokens": 100, "step_seconds": own, "time": now})
        if step % every == 0:
            rows[-1]["eval_loss"] = 1.0
            now += judging
        now += saving if step % save_steps == 0 else 0.0
    return rows


def test_a_curve_tells_updates_evaluations_and_checkpoints_apart():
    rows = curve(40, judging=7.0, every=10, saving=3.0, save_steps=8)
    found = pace.of_curve(rows, 8)
    assert found.tokens_per_second == pytest.approx(50)  # without the first update
    assert (found.evaluation_seconds, found.checkpoint_seconds) == pytest.approx((7.0, 3.0))
    # Where every checkpoint follows an evaluation, both are known together.
    found = pace.of_curve(curve(40, judging=7.0, every=10, saving=3.0, save_steps=10), 10)
    assert (found.evaluation_seconds, found.checkpoint_seconds) == pytest.approx((10.0, 0.0))
    # An attempt that was cut off leaves a gap of a night: the middle one of them all is taken.
    rows = curve(40, judging=7.0, every=10)
    later = [{**row, "time": row["time"] + (30_000 if row["step"] > 20 else 0)} for row in rows]
    assert pace.of_curve(later, 10**6).evaluation_seconds == pytest.approx(7.0)
    assert pace.of_curve(rows[:1], 10**6).tokens_per_second == pytest.approx(100 / 6)


class Kept:
    """A store of commits and artifacts in a folder."""

    def __init__(self, folder):
        self.folder, self.documents, self.trees = folder, {}, {}

    def impatient(self):
        return self

    def listing(self, prefix):
        return [
            Listed(name, 1, float(age)) for age, name in enumerate(self.documents) if name.startswith(prefix)
        ]

    def read_json(self, name):
        return json.loads(json.dumps(self.documents[name]))

    def read_manifest(self, uri):
        self.asked = self.trees[uri]
        return Manifest("report", describe(self.asked))

    def get_tree(self, manifest, folder):
        folder.mkdir()
        for entry in manifest.files:
            (folder / entry.path).write_bytes((self.asked / entry.path).read_bytes())
        return folder

    def keep(self, name, config, hardware, seconds, **curves):
        """A commit of train, older than those before it."""
        tree = self.folder / name
        tree.mkdir()
        for curve_name, rows in curves.items():
            jsonl.write(tree / f"{curve_name}.jsonl", [{"step": 0, "eval_loss": 2.0}, *rows])
        self.trees[f"ledger of {name}"] = tree
        self.documents[f"stages/train/{name}.json"] = {
            "run": name,
            "seconds": seconds,
            "made_by": {"settings": config.model_dump(mode="json")},
            "summary": {"hardware": hardware} if hardware else {},
            "outputs": {"ledger": f"ledger of {name}"},
        }


def settings(**changes):
    return TrainConfig(
        **({"objective": "sft", "base_model": "base", "max_steps": 40, "eval_steps": 10} | changes)
    )


def test_the_newest_training_like_it_tells_its_pace_and_what_was_fixed(tmp_path):
    store = Kept(tmp_path)
    rows = curve(40, judging=7.0, every=10)
    asked = settings(max_steps=400)
    store.keep("elsewhere", settings(), "1 x other", 200.0, history=curve(40, 1.0))
    store.keep("unknown", settings(), "", 200.0, history=curve(40, 1.0))
    store.keep("full", settings(adapter="full"), "1 x this", 200.0, history=curve(40, 1.0))
    store.keep("exact", settings(precision="float32"), "1 x this", 200.0, history=curve(40, 1.0))
    store.keep("other base", settings(base_model="b"), "1 x this", 200.0, history=curve(40, 1.0))
    assert pace.newest([asked], "1 x this", store) == [None]
    # Updates 80 s of 200 with the excess of the first, 5 evaluations 35 s.
    store.keep("newer", settings(max_length=128), "1 x this", 200.0, history=rows)
    store.keep("older", settings(), "1 x this", 500.0, history=curve(40, 1.0))
    (found,) = pace.newest([asked], "1 x this", store)
    assert found == Pace("newer", 50.0, 7.0, 0.0, pytest.approx(200 - 80 - 35), ("max_length 128",))
    # By the name of a GPU, whatever its maker adds to it.
    store.keep("cluster", settings(base_model="c"), "1 x NVIDIA H100 80GB HBM3", 9.0, history=rows)
    assert pace.newest([settings(base_model="c")], "h100", store)[0].run == "cluster"


def test_phases_are_each_told_by_a_phase_like_them(tmp_path):
    store = Kept(tmp_path)
    both = settings(first={"source": "s", "max_steps": 20})
    parts = [both.first_phase(), both.model_copy(update={"first": None})]
    store.keep("task alone", settings(), "1 x this", 100.0, history=curve(40))
    assert [each and each.run for each in pace.newest(parts, "1 x this", store)] == [None, "task alone"]
    store.keep("both", both, "1 x this", 300.0, history=curve(40), first_history=curve(20, 5.0))
    first, second = pace.newest(parts, "1 x this", store)
    assert (first.run, first.tokens_per_second, second.run) == ("both", 20.0, "task alone")
    assert first.start_seconds == pytest.approx(300 - 80 - 4 - 100 - 10 + 4 + 10)


def needs(pieces=1.0, first=None):
    sizes = {"tokens_per_example": 50.0, "loss_share": 0.5, "body_weights": 1000, "total_weights": 1400}
    return SimpleNamespace(**sizes, pieces=pieces, first=first)


def test_seconds_are_those_that_were_measured_and_the_fixed_parts_are_apart():
    config = settings(max_steps=30, per_device_batch_size=4, checkpoint_steps=10)
    parts = duration.parts_of(config, needs(), 1000, 0)
    measured = Pace("run-1", 100.0, 7.0, 3.0, 20.0, ("max_length 128",))
    found = duration.run(parts, [measured], "", 3.6, peak=lambda: pytest.fail("nothing is assumed"))
    # 30 updates of 4 examples of 50 tokens; judged before, after 10, 20 and 30; saved after 10 and 20.
    assert (found["update_seconds"], found["evaluation_seconds"], found["checkpoint_seconds"]) == (60, 28, 6)
    assert found["start_seconds"] == 20 and found["seconds"] == 114 and found["dollars"] == 0.11
    assert found["seconds_from"] == "measured in run-1"
    assert found["seconds_notes"] == ["run-1 had max_length 128"]
    assert "efficiency" not in found and "phases" not in found


def test_seconds_that_were_not_measured_say_so_and_what_is_not_in_them():
    config = settings(max_steps=30, per_device_batch_size=4)
    found = duration.run(duration.parts_of(config, needs(), 1000, 0), [None], "", None, peak=lambda: 1e6)
    assert found["seconds_from"] == "arithmetic" and found["seconds_notes"] == [duration.ROUGH]
    assert "start_seconds" not in found and found["peak_gflop_per_second"] == 0
    flop = sizing.work(config, 1000, 50.0, 0.5, 1000, 400).flop
    assert found["seconds"] == pytest.approx(flop / 1e6 / sizing.CPU_EFFICIENCY, abs=0.1)
    answering = settings(objective={"kind": "ppo", "reward_model": "r"}, adapter="full")
    found = duration.run(duration.parts_of(answering, needs(), 1000, 0), [None], "h100", None)
    assert any("answers that the model draws" in note for note in found["seconds_notes"])


def test_two_phases_are_summed_and_told_apart():
    config = settings(max_steps=30, per_device_batch_size=4, first={"source": "s", "epochs": 2})
    parts = duration.parts_of(config, needs(first=needs(pieces=3.0)), 1000, 10)
    # Documents in three pieces each, twice: 60 in batches of 4.
    found = duration.run(parts, [Pace("a", 50.0, 0, 0, 9.0), Pace("a", 100.0, 0, 0, 9.0)], "", None)
    assert {name: phase["steps"] for name, phase in found["phases"].items()} == {"first": 15, "second": 30}
    assert found["steps"] == 45 and found["tokens"] == 60 * 50 + 30 * 4 * 50
    assert found["seconds"] == 60 + 60 + 9  # one run: it started once
    mixed = duration.run(parts, [None, Pace("a", 100.0, 0, 0, 9.0)], "h100", None)
    assert mixed["seconds_from"] == "arithmetic; measured in a"
    assert mixed["phases"]["second"]["seconds_from"] == "measured in a"


def test_what_the_stage_leaves_is_what_is_looked_for(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = {"up": "profit rose sharply", "down": "losses widened again"}
    inputs = {}
    for side, count in (("train", 16), ("eval", 4)):
        (tmp_path / side).mkdir()
        rows = [
            {"id": f"{i:03}", "origin": ORIGIN, "text": f"{text} in quarter {i}", "label": label}
            for i in range(count // 2)
            for label, text in words.items()
        ]
        jsonl.write(tmp_path / side / "examples.jsonl", rows)
        inputs[side] = Artifact(SimpleNamespace(digest=side), tmp_path / side)
    config = settings(objective="classification", base_model=str(tiny_encoder), max_steps=6, eval_steps=2)
    context = Context("run", "tiny", "train", "k" * 64, None, tmp_path / "out", tmp_path / "work")
    context.out.mkdir()
    result = stage.train(config, inputs, context)
    store = Kept(tmp_path / "kept")
    store.folder.mkdir()
    store.keep("run", config, result.summary["hardware"], 60.0)
    store.trees["ledger of run"] = context.out / "ledger"
    (found,) = pace.newest([config], measures.hardware(), store)
    history = list(jsonl.read(context.out / "ledger" / "history.jsonl"))[2:]
    rate = sum(row["step_tokens"] for row in history) / sum(row["step_seconds"] for row in history)
    assert found.tokens_per_second == pytest.approx(rate)
    assert 50 < found.start_seconds < 60  # all of it but for a second of updates
