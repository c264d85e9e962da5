"""A run on the real store, its stages stood in for: what runs, what is reported, and in which words."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from components.shared.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    StageStopped,
    StoreError,
    TuneyardError,
)
from components.shared.recording import record
from components.shared.stage import Result, perform
from components.shared.store import Store
from pipelines import planner, submit
from pipelines.graph import inputs_of
from pipelines.report import Report, explain, gather
from pipelines.spec import load


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "corpus.csv").write_text("prompt,completion\nq,a\n")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"")
    path = tmp_path / "five.yaml"
    path.write_text(
        f"name: five\ningest: {{source: {tmp_path / 'corpus.csv'}}}\n"
        f"train: {{objective: sft, base_model: {tmp_path / 'base'}}}\n"
    )
    return str(path)


@pytest.fixture
def home(tmp_path, store, store_env, monkeypatch):
    """The platform is up already, and no sample is wanted."""
    folder = tmp_path / "home"
    folder.mkdir()
    # As the command does; a shell starts what runs in the background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(submit.platform, "home_dir", lambda: folder)
    monkeypatch.setattr(submit.platform, "preflight", lambda *_, **__: None)
    monkeypatch.setattr(submit.platform, "up", lambda _: SimpleNamespace(serving_url="http://127.0.0.1:1"))
    monkeypatch.setattr(submit.platform, "environment", lambda _: {})
    yield folder
    signal.signal(signal.SIGINT, before)


def do(spec, run_id, store, verbs):
    """Perform these stages in their order, as KFP would: up to the first that fails or stops."""
    made = {}
    for stage, settings in load(spec).stages().items():
        if stage not in verbs:
            return
        inputs = {name: made[source] for name, source in inputs_of(stage, load(spec)).items()}
        verbs[stage].__module__ = f"components.{stage}.{stage}"
        commit = perform(verbs[stage], settings, {"id": run_id, "pipeline": "five"}, inputs)
        made |= {(stage, name): store.read_manifest(uri) for name, uri in commit["outputs"].items()}


def leaves(*outputs, **result):
    """A stage's logic that leaves a file in each output."""

    def verb(config, inputs, context):
        for name in outputs:
            (context.out / name).mkdir()
            (context.out / name / "file.txt").write_text(name)
        return Result(kinds=dict.fromkeys(outputs, "dataset"), **result)

    return verb


REFUSING = {
    "ingest": leaves("examples", "quarantine"),
    "validate": leaves("report", stop="answers: 3 of 9 are empty", stop_todo="fill them in"),
    "split": leaves("train", "eval", "test"),
}


def states(report):
    return {stage["name"]: (stage["status"], stage["cached"]) for stage in report.stages}


def test_what_a_check_refused_goes_no_further_on_the_second_submit(spec, home, store, monkeypatch):
    def graph(spec_, report, *_):
        with pytest.raises(StageStopped):
            do(spec, report.run_id, store, REFUSING)
        return "validate failed"

    monkeypatch.setattr(submit, "_run_graph", graph)
    first = submit.run_local(spec, screen=None)
    monkeypatch.setattr(submit, "_run_graph", lambda *_: pytest.fail("a stage was run on refused data"))
    again = submit.run_local(spec, screen=None)
    assert states(first)["validate"] == ("stopped", False) and states(again)["validate"] == ("stopped", True)
    assert states(first)["split"] == states(again)["split"] == ("not run", False)
    for report in (first, again):
        assert (report.status, report.exit_code) == ("stopped", EXIT_STOPPED)
        assert report.error["todo"] == "fill them in"
    assert explain(first) == explain(again) != ""


def test_what_was_done_after_a_stop_is_not_taken_for_done(spec, store):
    passing = REFUSING | {"validate": leaves("report")}
    do(spec, "run-1", store, passing)
    assert [bool(each.commit) for each in planner.plan(load(spec), store)] == [True, True, True, False, False]
    (commit,) = (name for name in store.names("stages/validate/"))
    store.write_json(commit, store.read_json(commit) | {"stop": "too many empty answers"})
    planned = planner.plan(load(spec), store)
    assert [bool(each.commit) for each in planned] == [True, True, False, False, False]
    assert planner.stopped(planned)


def test_a_store_that_fails_in_mid_run_still_leaves_a_report(spec, home, store, monkeypatch):
    def down(*_):
        raise StoreError("the S3 store failed", "tuneyard up")

    def graph(spec_, report, *_):
        do(spec, report.run_id, store, {"ingest": REFUSING["ingest"]})
        monkeypatch.setattr(Store, "read_json", down)
        return "validate failed"

    monkeypatch.setattr(submit, "_run_graph", graph)
    report = submit.run_local(spec, screen=None)
    assert (report.status, report.exit_code) == ("failed", EXIT_FAILED)
    assert report.error == {"what": "the S3 store failed", "todo": "tuneyard up", "exit_code": EXIT_FAILED}
    assert states(report) == dict.fromkeys(load(spec).stages(), ("unknown", False))
    assert json.loads(report.to_json())["run_id"] == report.run_id


def test_the_reason_of_a_stage_stands_before_what_follows_from_it(spec, home, store, monkeypatch):
    def fail(config, inputs, context):
        raise TuneyardError("row 7 is no row", "correct it")

    def graph(spec_, report, *_):
        with pytest.raises(TuneyardError):
            do(spec, report.run_id, store, {"ingest": fail})
        return "Task 'ingest' finished with status FAILURE"

    def full(*_):
        raise StoreError("no room", "free some disk")

    monkeypatch.setattr(submit, "_run_graph", graph)
    write = Store.write_json
    monkeypatch.setattr(
        Store,
        "write_json",
        lambda self, name, *rest, **how: (full if name.endswith("run.json") else write)(
            self, name, *rest, **how
        ),
    )
    report = submit.run_local(spec, screen=None)
    assert explain(report) == "ingest: row 7 is no row\n  -> correct it" and report.exit_code == EXIT_FAILED
    assert states(report)["ingest"] == ("failed", False) and states(report)["split"] == ("not run", False)


def test_a_failure_before_the_stages_is_reported_and_listed(spec, home, store, monkeypatch):
    def refuse(*_):
        raise TuneyardError("the registry cannot be reached", "check the network")

    monkeypatch.setattr(submit.fetch, "ensure", refuse)
    report = submit.run_local(spec, screen=None)
    assert (report.pipeline, report.status, report.stages) == ("five", "failed", [])
    assert report.error["what"] == "the registry cannot be reached"
    assert store.read_json(f"runs/{report.run_id}/run.json")["status"] == "failed"
    monkeypatch.setattr(submit.platform, "preflight", refuse)
    assert submit.run_local(spec, screen=None).error == report.error


def test_a_stage_that_was_killed_is_said_to_be(spec, home, store, monkeypatch):
    def die(config, inputs, context):
        os.kill(os.getpid(), signal.SIGKILL)

    def graph(spec_, report, *_):
        verbs = REFUSING | {"validate": leaves("report"), "train": die}
        child = multiprocessing.get_context("fork").Process(
            target=do, args=(spec, report.run_id, Store.from_environment(), verbs)
        )
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        return "Task 'train' finished with status FAILURE"

    monkeypatch.setattr(submit, "_run_graph", graph)
    report = submit.run_local(spec, screen=None)
    assert states(report)["train"] == ("failed", False) and states(report)["evaluate"] == ("not run", False)
    assert (report.status, report.exit_code, report.error["stage"]) == ("failed", EXIT_FAILED, "train")
    assert explain(report).startswith("train was killed (out of memory?)")
    assert "it goes on from its last checkpoint" in report.error["todo"]


def test_a_slice_that_did_not_end_well_is_why_evaluate_did_not_begin(store):
    def report_of(run, **facts):
        record(store, run, "evaluate-slice-1-of-2", status="done", seconds=1.0)
        record(store, run, "evaluate-slice-2-of-2", **facts)
        report = Report(run, "p")
        gather(report, ["evaluate"], {}, store, "")
        return report

    error = {"what": "the base has changed", "todo": "train again", "exit_code": EXIT_FAILED}
    failed = report_of("run-1", status="failed", error=error)
    assert (failed.stages[0]["status"], failed.error) == ("failed", error | {"stage": "evaluate"})
    killed = report_of("run-2", status="running")
    assert explain(killed).startswith("evaluate: evaluate-slice-2-of-2 was killed (out of memory?)")
    assert report_of("run-3", status="done").stages[0]["status"] == "not run"


def test_an_interrupted_run_is_reported_and_listed(spec, home, store, monkeypatch):
    def graph(spec_, report, *_):
        do(spec, report.run_id, store, {"ingest": REFUSING["ingest"]})
        record(store, report.run_id, "validate", status="running")
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(submit, "_run_graph", graph)
    report = submit.run_local(spec, screen=None)
    assert (report.status, report.exit_code) == ("interrupted", EXIT_INTERRUPTED)
    assert states(report)["ingest"] == ("done", False)
    assert states(report)["validate"] == ("interrupted", False)
    assert explain(report).startswith("validate: interrupted\n  -> submit again")
    kept = store.read_json(f"runs/{report.run_id}/run.json")
    assert (kept["status"], kept["exit_code"], kept["seconds"] >= 0) == ("interrupted", 130, True)


def test_an_interruption_before_the_stages_is_reported(spec, home, store, monkeypatch):
    monkeypatch.setattr(submit.fetch, "ensure", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    report = submit.run_local(spec, screen=None)
    assert (report.status, report.exit_code, report.stages) == ("interrupted", EXIT_INTERRUPTED, [])
    assert store.read_json(f"runs/{report.run_id}/run.json")["status"] == "interrupted"


def test_the_end_of_a_local_run_is_told_as_that_of_a_cluster_run_is(spec, home, store, monkeypatch):
    told = []
    monkeypatch.setattr(submit.notify, "_post", lambda url, text: told.append(text))
    monkeypatch.setenv(submit.notify.URL_VARIABLE, "http://127.0.0.1:1/hook")

    def graph(spec_, report, *_):
        with pytest.raises(StageStopped):
            do(spec, report.run_id, store, REFUSING)
        return "validate failed"

    monkeypatch.setattr(submit, "_run_graph", graph)
    submit.run_local(spec, screen=None)
    assert told == []
    report = submit.run_local(spec, ["notify={}"], screen=None)
    assert len(told) == 1 and report.run_id in told[0] and "3 of 9 are empty" in told[0]
    submit.run_local(spec, ["notify.on=[failed]"], screen=None)
    assert len(told) == 1


def test_a_signal_to_submit_alone_stops_the_stage_too():
    program = (
        "import subprocess, sys, time\n"
        "from pipelines import submit\n"
        "submit.interruptible()\n"
        "stage = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(stage.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    # A session of its own has no terminal, so nobody typed Ctrl-C and sent it to both.
    command = [sys.executable, "-c", program]
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
            stage = psutil.Process(int(process.stdout.readline()))
            process.send_signal(number)
            assert psutil.wait_procs([stage], timeout=30)[1] == []
