"""The real line on real data and models, with few steps: one home, the pipelines one after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.e2e

# Statutes only: half the corpus, and short answers. Gates are off because four steps teach nothing.
LEGAL = [
    "ingest.source=s3://corpora/legal/statute",
    "split.ratios=[0.9, 0.05, 0.05]",
    "train.max_steps=3",
    "train.eval_examples=4",
    "evaluate.max_generated=2",
    "evaluate.max_new_tokens=12",
    "evaluate.gates=null",
]
FINANCE = ["train.max_steps=30", "train.eval_examples=50", "evaluate.gates=null"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("line")
    yield folder
    tuneyard(folder, "down")
    left = [
        p.pid
        for p in psutil.process_iter(["environ"])
        if (p.info["environ"] or {}).get("TUNEYARD_HOME") == str(folder)
    ]
    assert not left, f"down left processes {left}"


def shell_of(home):
    """The environment of a user with this home: in this process are another platform, and one thread."""
    ours = ("TUNEYARD_", "AWS_", "MLFLOW_", "OMP_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {"TUNEYARD_HOME": str(home)}


def tuneyard(home, *arguments, code=0, seconds=900):
    """Run the command as a user would. Returns its standard output."""
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    done = subprocess.run(command, env=shell_of(home), capture_output=True, text=True, timeout=seconds)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout if code == 0 or "--json" in arguments else done.stderr


def submit(home, pipeline, settings, code=0):
    overrides = [part for setting in settings for part in ("--set", setting)]
    return json.loads(tuneyard(home, "submit", pipeline, "--json", *overrides, code=code))


@pytest.fixture(scope="module")
def legal(home):
    return submit(home, "sft_legal", LEGAL)


@pytest.mark.parametrize("pipeline", ["sft_legal", "classify_finance", "dpo_general"])
def test_a_pipeline_file_as_it_is_gets_through_its_data_checks(home, pipeline):
    """All that it reads, where other tests read some of it: as far as train, which these settings stop."""
    done = submit(home, pipeline, ["train.max_length=8", "train.over_length=error"], code=3)
    found = {stage["name"]: stage["status"] for stage in done["stages"]}
    assert [found[name] for name in ("ingest", "validate", "split", "train")] == ["done"] * 3 + ["stopped"]


@pytest.fixture(scope="module")
def finance(home):
    return submit(home, "classify_finance", FINANCE)


def test_the_legal_line_ends_with_a_served_champion(home, legal):
    stages = ["ingest", "validate", "split", "train", "compress", "evaluate", "register", "deploy"]
    assert [(s["name"], s["status"], s["cached"]) for s in legal["stages"]] == [
        (s, "done", False) for s in stages
    ]
    assert legal["status"] == "done" and legal["verdict"]["passed"]
    assert legal["metrics"]["tuned"]["loss"] < legal["metrics"]["base"]["loss"]
    assert legal["model"]["aliases"] == ["candidate", "champion"] and len(legal["model"]["sha256"]) == 64
    body = {"model": "sft_legal", "messages": [{"role": "user", "content": "什么是合同？"}], "max_tokens": 8}
    request = urllib.request.Request(
        f"{legal['endpoint']}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    assert (
        answer["choices"][0]["message"]["content"]
        and answer["system_fingerprint"][:8] in legal["model"]["sha256"]
    )


def test_an_unchanged_submit_runs_nothing(home, legal):
    again = submit(home, "sft_legal", LEGAL)
    assert all(stage["cached"] and stage["seconds"] == 0 for stage in again["stages"])
    assert (again["model"], again["metrics"]) == (legal["model"], legal["metrics"])


def test_a_changed_gate_runs_from_evaluate_on_and_stops_the_line(home, legal):
    failed = submit(home, "sft_legal", [*LEGAL[:-1], "evaluate.gates={loss: {max: 0.01}}"], code=3)
    by_name = {stage["name"]: stage for stage in failed["stages"]}
    assert [by_name[s]["cached"] for s in ("ingest", "validate", "split", "train", "compress")] == [True] * 5
    assert by_name["evaluate"]["status"] == "stopped" and by_name["register"]["status"] == "not run"
    assert (
        failed["status"] == "stopped"
        and not failed["verdict"]["passed"]
        and "loss" in failed["error"]["what"]
    )


def test_the_finance_line_serves_int8_beside_it(home, legal, finance):
    assert finance["status"] == "done"
    tuned, shipped = finance["metrics"]["tuned"], finance["metrics"]["compressed"]
    # After thirty updates many texts lie near a border, where int8 noise decides: 1.6 points were seen.
    assert abs(tuned["accuracy"] - shipped["accuracy"]) <= 0.05
    assert 0.9 < finance["metrics"]["tfidf_logreg"]["accuracy"] < 1
    answer = tuneyard(home, "ask", "classify_finance", "oil prices rose as opec cut crude output")
    assert "(" in answer
    assert tuneyard(home, "ask", "sft_legal", "什么是合同？", "--max-tokens", "4")


def test_runs_lists_them_and_rollback_needs_a_champion_before(home, legal, finance):
    names = [run["pipeline"] for run in json.loads(tuneyard(home, "runs", "--json"))]
    assert names[0] == "classify_finance" and "sft_legal" in names
    assert "no earlier champion" in tuneyard(home, "rollback", "classify_finance", code=2)


def test_a_wrong_file_says_everything_at_once(home, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(
        "name: wrong\ningest: {sorce: x}\ntrain: {objective: sft, base_model: x, epochs: lots}\n"
    )
    said = tuneyard(home, "submit", str(wrong), code=2)
    assert (
        "line 2: ingest.sorce: no such setting; did you mean source?" in said
        and "line 3: train.epochs" in said
    )


@pytest.fixture
def five(tmp_path, tiny_causal):
    """A pipeline file of five lines, with its corpus."""
    corpus = tmp_path / "corpus.csv"
    rows = "".join(f"question {i},answer number {i * 7}\n" for i in range(120))
    corpus.write_text("q,a\n" + rows)
    spec = tmp_path / "five.yaml"
    spec.write_text(
        f"name: five\ningest: {{source: {corpus}, columns: {{q: prompt, a: completion}}}}\n"
        f"train:\n  objective: sft\n  base_model: {tiny_causal}\n"
    )
    return str(spec)


def cut_off(home, spec, settings, cut):
    """Submit, cut it off once training has saved a new checkpoint, and give back exit code and report."""
    steps = "work/train/*/checkpoints/step-*"
    before = set(home.glob(steps))
    command = [sys.executable, "-m", "pipelines.cli", "submit", spec, "--json"]
    command += [part for setting in settings for part in ("--set", setting)]
    process = subprocess.Popen(command, env=shell_of(home), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert until(lambda: set(home.glob(steps)) - before or process.poll() is not None)
    assert process.poll() is None
    stage = psutil.Process(process.pid).children(recursive=True)
    cut(process)
    out, _ = process.communicate(timeout=120)
    assert psutil.wait_procs(stage, timeout=60)[1] == []  # nothing trains on behind the user's back
    return process.returncode, json.loads(out)


def until(reached, seconds=240):
    end = time.monotonic() + seconds
    while not (found := reached()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def kill_the_stage(process):
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()


def test_a_killed_stage_and_ctrl_c_lose_no_more_than_a_step(home, five):
    settings = ["train.max_steps=400", "train.checkpoint_steps=1", "evaluate.max_generated=1"]
    code, report = cut_off(home, five, settings, kill_the_stage)
    assert code == 1 and "train was killed" in report["error"]["what"]
    code, report = cut_off(home, five, settings, lambda process: process.send_signal(signal.SIGINT))
    assert code == 130 and report["status"] == "interrupted"
    by_name = {stage["name"]: stage["status"] for stage in report["stages"]}
    assert [by_name[stage] for stage in ("ingest", "split", "train")] == ["done", "done", "interrupted"]
    report = submit(home, five, settings)
    assert report["status"] == "done" and [s["cached"] for s in report["stages"]][:3] == [True] * 3
    assert "train: resuming after step" in Path(report["log"]).read_text()


def test_five_lines_are_enough(home, five):
    report = submit(home, five, ["train.max_steps=2"])
    assert report["status"] == "done" and report["model"] is None and report["endpoint"] is None
    assert [stage["name"] for stage in report["stages"]] == [
        "ingest",
        "validate",
        "split",
        "train",
        "evaluate",
    ]
