"""The line on a real cluster, end to end: what holds on loopback, and what only a cluster can show."""

from __future__ import annotations

import os
import threading
import time
from datetime import UTC, datetime

import pytest

from components.shared import logparts
from components.shared.errors import EXIT_DONE, EXIT_INTERRUPTED
from components.shared.store import Store
from k8s.pod_security import faults
from pipelines.cluster import schedules, submitting, versions
from pipelines.cluster.watching import ENDED
from pipelines.images import lock
from pipelines.spec import load

STAGES = ["ingest", "validate", "split", "train", "evaluate", "register", "deploy"]


@pytest.fixture(scope="module")
def first(cluster, pipeline):
    return submitting.run_cluster(str(pipeline), cluster[0], screen=None)


def test_a_run_ends_with_a_served_champion(first):
    assert first.exit_code == EXIT_DONE, first.error
    assert {s["name"]: s["status"] for s in first.stages} == dict.fromkeys(STAGES, "done")
    assert "champion" in first.model["aliases"]


def test_the_logs_of_the_stages_were_streamed(first):
    with open(first.log) as log:
        text = log.read()
    assert [f"▸ {stage}\n" in text for stage in STAGES] == [True] * len(STAGES)
    assert [f"✓ {stage}  " in text for stage in STAGES] == [True] * len(STAGES)


def test_the_lines_of_a_stage_come_while_it_runs(first, cluster, pipeline):
    content = versions.content_of(cluster[0], cluster[0].call("Run", "run_service_get_run", first.run_id))
    run = submitting.start(
        load(str(pipeline), ["train.max_steps=300"]), cluster[0], lock.read(), content, caches={}
    )
    store, seen, until = Store.from_environment(), "", time.monotonic() + 900
    try:
        while "▸ train" not in seen and time.monotonic() < until:
            time.sleep(5)
            seen = "".join(logparts.read(store, part) for part in logparts.parts(store, run))
        state = str(cluster[0].call("Run", "run_service_get_run", run).state)
    finally:
        cluster[0].call("Run", "run_service_terminate_run", run)
    assert "▸ train" in seen and state == "RUNNING"


def test_an_unchanged_submit_starts_no_run(first, cluster, pipeline):
    def runs():
        return len(cluster[0].every("Run", "run_service_list_runs", "runs", experiment_id=experiment))

    experiment = cluster[0].call("Run", "run_service_get_run", first.run_id).experiment_id
    before = runs()
    again = submitting.run_cluster(str(pipeline), cluster[0], screen=None)
    assert again.exit_code == EXIT_DONE and runs() == before
    assert [stage["cached"] for stage in again.stages] == [True] * len(STAGES)


def test_the_pods_were_what_the_restricted_level_allows_and_ran_our_images(first, kubectl):
    pods = kubectl("get", "pods", "-l", "app.kubernetes.io/part-of=tuneyard")["items"]
    ours = [pod for pod in pods if pod["metadata"]["labels"].get("app.kubernetes.io/component") in STAGES]
    assert ours
    images = {image.reference for image in lock.read().values()}
    for pod in ours:
        assert faults(pod["spec"]) == [], pod["metadata"]["name"]
        assert images & {container["image"] for container in pod["spec"]["containers"]}


def test_no_secret_is_in_a_log(first):
    store = Store.from_environment()
    with open(first.log) as log:
        text = log.read()
    text += "".join(logparts.read(store, part) for part in logparts.parts(store, first.run_id))
    secrets = [
        os.environ[name] for name in ("AWS_SECRET_ACCESS_KEY", "TUNEYARD_KFP_TOKEN") if os.environ.get(name)
    ]
    assert secrets and not [secret for secret in secrets if secret in text]


def test_a_terminated_run_ends_and_goes_on_with_the_next_submit(first, cluster, pipeline):
    ids = []

    def end():
        while not ids:
            time.sleep(0.2)
        time.sleep(20)
        cluster[0].call("Run", "run_service_terminate_run", ids[0])

    real = submitting.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submitting, "start", lambda *given: ids.append(real(*given)) or ids[0])
        threading.Thread(target=end, daemon=True).start()
        report = submitting.run_cluster(str(pipeline), cluster[0], ["train.max_steps=5000"], screen=None)
    assert report.exit_code == EXIT_INTERRUPTED


def test_a_schedule_is_made_kept_and_removed(cluster, pipeline):
    spec = load(str(pipeline))

    def put():
        return schedules.put(spec, "0 3 1 1 *", "command", cluster[0], lock.read(), False).change

    try:
        assert [put(), put()] == ["created", "unchanged"]
    finally:
        removed = schedules.remove(spec.name, cluster[0])
    assert [each.change for each in removed] == ["removed"]


def test_a_minutely_schedule_starts_two_runs_that_each_have_a_slot(first, cluster, pipeline):
    spec, there, store = load(str(pipeline)), cluster[0], Store.from_environment()
    schedules.put(spec, "* * * * *", "command", there, lock.read(), False)
    (recurring,) = schedules.of(there, spec.name)
    try:
        slots, until = [], time.monotonic() + 1200
        while time.monotonic() < until:
            slots = [s for s in schedules.slots(there, recurring, store, 20) if s["state"] in ENDED]
            if len(slots) >= 2:
                break
            time.sleep(10)
    finally:
        schedules.remove(spec.name, there)
    assert [slot["state"] for slot in slots] == ["SUCCEEDED"] * len(slots) and len(slots) >= 2
    claims = {}
    for name in store.names(f"slots/{spec.name}/2"):
        claims[store.read_json(name)["id"]] = name.rsplit("/", 1)[1].removesuffix(".json")
    for slot in slots:
        # KFP's own word for the slot, where it keeps one.
        said = datetime.fromisoformat(slot["scheduled_at"]) if slot["scheduled_at"] else None
        claimed = datetime.strptime(claims[slot["run_id"]], "%Y%m%d%H%M%S").replace(tzinfo=UTC)
        assert claimed.second == 0 and (said is None or said.year == 1970 or said == claimed)
