"""A whole run through the endpoint: what a pod runs has run, with just the environment that a pod has."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from components.shared.commit import commit_name
from components.shared.errors import EXIT_DONE, UsageError
from components.shared.store import Store
from pipelines.cluster import endpoint as endpoints
from pipelines.cluster import schedules, submitting, versions
from pipelines.compare import compare
from pipelines.images import lock
from pipelines.spec import load
from tests.pipelines.cluster.conftest import canary

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def webhook(cluster):
    """What was posted to the address in the Secret tuneyard-notify."""
    posted = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster.cluster.secrets["tuneyard-notify"]["TUNEYARD_NOTIFY_URL"] = (
        f"http://127.0.0.1:{server.server_port}/{canary()}"
    )
    yield posted
    server.shutdown()


@pytest.fixture(scope="module")
def first(cluster, pipeline, webhook):
    return submitting.run_cluster(str(pipeline), endpoints.require(), screen=None)


def test_a_run_on_the_cluster_ends_with_a_served_champion(first, cluster):
    assert (first.status, first.exit_code, first.error) == ("done", EXIT_DONE, None)
    assert {s["name"]: s["status"] for s in first.stages} == dict.fromkeys(
        ["ingest", "validate", "split", "train", "evaluate", "register", "deploy"], "done"
    )
    assert "champion" in first.model["aliases"]
    assert first.run_id in cluster.runs and first.metrics["tuned"]["accuracy"] >= 0
    assert Store.from_environment().read_json(f"runs/{first.run_id}/run.json")["status"] == "done"


def test_the_log_of_every_stage_was_streamed(first):
    log = Path(first.log).read_text()
    assert [log.count(f"▸ {s['name']}\n") for s in first.stages] == [1] * 7
    assert [log.count(f"✓ {s['name']}  ") for s in first.stages] == [1] * 7
    assert "4/4 steps" in log and "notify: told" in log


def test_whoever_attaches_later_sees_the_same_log(first, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path))
    again = submitting.attach(first.run_id, endpoints.require(), screen=None)
    assert again.log != first.log and Path(again.log).read_text() == Path(first.log).read_text()


def test_somebody_was_told(first, webhook):
    assert [list(each) for each in webhook] == [["text"]]
    assert first.run_id in webhook[0]["text"] and "done" in webhook[0]["text"]


def test_no_secret_is_in_a_log_an_artifact_the_compiled_pipeline_or_mlflow(first, cluster, webhook):
    planted = {name: value for secret in cluster.cluster.secrets.values() for name, value in secret.items()}
    del planted["MLFLOW_TRACKING_USERNAME"], planted["AWS_ACCESS_KEY_ID"]
    planted["TUNEYARD_NOTIFY_URL"] = planted["TUNEYARD_NOTIFY_URL"].rsplit("/", 1)[1]
    assert len(planted) >= 10 and all(len(value) > 15 for value in planted.values())
    store = Store.from_environment()
    places = {f"s3:{name}": _body(store, name) for name in store.names("")}
    folders = [cluster.cluster.folder, Path(first.log).parent]
    places |= {str(p): p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file()}
    places |= {f"package {name}": repr(package).encode() for name, package in cluster.packages.items()}
    places["webhook"] = repr(webhook).encode()
    for kind in ("mlflow.db", "main.log", f"s3:logs/{first.run_id}/"):
        assert any(kind in place for place in places), kind
    leaks = [
        (name, place)
        for name, value in planted.items()
        for place, body in places.items()
        if value.encode() in body
    ]
    assert leaks == []


def _body(store, name):
    return store.client.get_object(Bucket=store.bucket, Key=store.key(name))["Body"].read()


def test_an_unchanged_submit_starts_no_run(first, cluster, pipeline):
    before = len(cluster.runs)
    again = submitting.run_cluster(str(pipeline), endpoints.require(), screen=None)
    assert len(cluster.runs) == before
    assert [s["cached"] for s in again.stages] == [True] * 7 and again.exit_code == EXIT_DONE
    assert again.model == first.model


def test_evaluate_in_slices_reports_under_the_same_key_what_it_reported_alone(first, cluster, pipeline):
    store = Store.from_environment()
    (alone,) = [stage for stage in first.stages if stage["name"] == "evaluate"]
    store.remove(commit_name("evaluate", alone["key"]))
    sliced = ["hardware.stages.evaluate.slices=3"]
    again = submitting.run_cluster(str(pipeline), endpoints.require(), sliced, screen=None)
    assert again.exit_code == EXIT_DONE, again.error
    (row,) = [stage for stage in again.stages if stage["name"] == "evaluate"]
    assert (row["key"], row["cached"]) == (alone["key"], False)
    records = store.names(f"runs/{again.run_id}/evaluate-slice-")
    assert len(records) == 3 and all(store.read_json(name)["cached"] is False for name in records)
    assert store.names(f"work/evaluate/{row['key']}/") == []
    log = Path(again.log).read_text()
    assert [log.count(f"▸ evaluate-slice-{number}-of-3") for number in (1, 2, 3)] == [1, 1, 1]
    assert "its share is done here" not in log
    measured = ("latency", "per_second", "memory", "throughput")
    for system, metrics in first.metrics.items():
        kept = {name for name in metrics if not any(word in name for word in measured)}
        assert kept and {n: again.metrics[system][n] for n in kept} == {n: metrics[n] for n in kept}


def test_a_slot_has_one_run_and_a_slot_that_changes_nothing_says_so(first, cluster, pipeline, webhook, patch):
    patch.setattr(versions, "git_commit", lambda: "0123456789ab")
    there = endpoints.require()
    schedules.put(load(str(pipeline)), "0 3 1 * *", "command", there, lock.read(), False)
    ((name, _recurring),) = cluster.recurring.items()
    slot = datetime(2026, 12, 1, 3, tzinfo=UTC)
    # KFP starts the first slot twice, and a month later comes the next.
    twice = [cluster.fire(name, slot) for _ in range(2)]
    later = cluster.fire(name, slot.replace(year=2027, month=1))
    for run in (*twice, later):
        cluster.going[run.run_id].join()
    assert sorted(cluster.going[run.run_id].state for run in twice) == ["FAILED", "SUCCEEDED"]
    assert cluster.going[later.run_id].state == "SUCCEEDED"
    told = [each["text"] for each in webhook[1:]]
    assert sum("slot 20261201030000: registered no new version" in text for text in told) == 1
    assert sum("slot 20270101030000: registered no new version" in text for text in told) == 1
    assert sum("which run" in text and "stopped at ingest" in text for text in told) == 1
    slots = schedules.slots(there, schedules.of(there)[0], Store.from_environment())
    assert sorted(each["state"] for each in slots) == ["FAILED", "SUCCEEDED", "SUCCEEDED"]
    assert {each["registered"] for each in slots} == {None}


def test_a_changed_setting_runs_only_what_it_changes_and_both_runs_can_be_compared(first, cluster, pipeline):
    changed = ["train.max_steps=5"]
    second = submitting.run_cluster(str(pipeline), endpoints.require(), changed, screen=None)
    assert second.exit_code == EXIT_DONE, second.error
    assert {s["name"]: s["cached"] for s in second.stages} == dict.fromkeys(
        ["ingest", "validate", "split"], True
    ) | dict.fromkeys(["train", "evaluate", "register", "deploy"], False)
    found = compare(first.run_id, second.run_id, Store.from_environment())
    assert found["settings"]["train.max_steps"] == [4, 5] and found["code"] == []
    assert set(found["inputs"]) >= {"evaluate.model", "register.model"}
    assert found["metrics"]["tuned.accuracy"] == [
        first.metrics["tuned"]["accuracy"],
        second.metrics["tuned"]["accuracy"],
    ]
    told = Path(second.log).read_text()
    # KFP's cache answers where a run before was given the same key; else a pod looks.
    pods = {task.name for task in cluster.going[second.run_id].tasks if task.pods}
    for stage in (each["name"] for each in second.stages):
        assert told.count(f"▸ {stage}\n") == (stage in pods)
        assert told.count(f"✓ {stage}  unchanged, done before\n") == (stage not in pods)


def test_a_training_that_will_not_fit_in_its_pod_is_refused_before_there_is_a_run(cluster, pipeline):
    runs = len(cluster.runs)
    small = ["hardware.gpus_per_node=0", "hardware.stages.train.memory_gib=0.5", "train.seed=7"]
    with pytest.raises(UsageError, match=r"train will need .* GiB of memory, it has 0.5 \(the pod of train"):
        submitting.run_cluster(str(pipeline), endpoints.require(), small, screen=None)
    assert len(cluster.runs) == runs
