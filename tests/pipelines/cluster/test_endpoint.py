"""What submit, runs and schedules make of an endpoint: the real requests, with stages that only say hello."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime

import pytest
import yaml

from components.shared import slots
from components.shared.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, StageStopped, UsageError
from pipelines.cluster import endpoint as endpoints
from pipelines.cluster import listing, schedules, submitting, versions, watching
from pipelines.cluster.endpoint import EndpointError
from pipelines.images import lock
from pipelines.placement import PLATFORM_VARIABLES
from pipelines.spec import load
from tests.pipelines.cluster.kfp_server import Endpoint, serving

pytestmark = pytest.mark.server
STAGES = ["ingest", "validate", "split", "train", "evaluate", "register", "deploy"]


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "little.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "little_one",
                "ingest": {"source": "s3://corpora/none"},
                "train": {"objective": "classification", "base_model": "s3://models/none"},
                "register": {},
                "deploy": {},
                "hardware": {"retries": 2},
            }
        )
    )
    return str(path)


@pytest.fixture
def cluster(tmp_path, monkeypatch, images):
    """An endpoint whose pods do nothing; no store is configured."""
    endpoint = Endpoint(tmp_path, token="a-token")
    endpoint.cluster.config_maps["tuneyard-platform"] = dict.fromkeys(PLATFORM_VARIABLES, "")
    endpoint.cluster.secrets = {
        "tuneyard-s3": {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
        "tuneyard-mlflow": {"MLFLOW_TRACKING_USERNAME": "", "MLFLOW_TRACKING_PASSWORD": ""},
        "tuneyard-serving": {"TUNEYARD_SERVING_TOKEN": ""},
    }
    monkeypatch.delenv("TUNEYARD_STORE", raising=False)
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(endpoints.TOKEN_VARIABLE, "a-token")
    monkeypatch.setattr(watching, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(versions, "git_commit", lambda: "0123456789ab")
    endpoint.cluster.instead = says()
    with serving(endpoint) as url:
        monkeypatch.setenv(endpoints.URL_VARIABLE, url)
        yield endpoint


def says(failing=(), wait=None):
    """Pods that do nothing, and fail where told."""

    def start(stage, values, pod):
        if wait is not None:
            wait.wait(10)
        return 1 if stage in failing else 0

    return start


def submit(spec, overrides=()):
    return submitting.run_cluster(spec, endpoints.require(), overrides, screen=None)


def statuses(report):
    return {stage["name"]: stage["status"] for stage in report.stages}


def test_a_run_is_created_watched_and_reported(cluster, spec):
    report = submit(spec)
    assert (report.exit_code, statuses(report)) == (EXIT_DONE, dict.fromkeys(STAGES, "done"))
    run = cluster.runs[report.run_id]
    assert run.service_account == "tuneyard-runner" and run.display_name.startswith(
        "little_one 0123456789ab-"
    )
    (experiment,) = cluster.experiments.values()
    assert (experiment.display_name, run.experiment_id) == ("little_one", experiment.experiment_id)


def test_the_same_content_is_one_version_and_other_content_another(cluster, spec):
    submit(spec)
    submit(spec)
    assert len(cluster.versions) == len(cluster.pipelines) == len(cluster.experiments) == 1
    submitting.run_cluster(spec, endpoints.require(), ["train.learning_rate=1e-5"], screen=None)
    assert len(cluster.versions) == 2 and len(cluster.pipelines) == 1


def test_images_with_other_code_are_refused_before_anything_is_asked_of_the_cluster(
    cluster, spec, tmp_path, monkeypatch
):
    old = {n: lock.Image(i.name, i.digest, "0" * 64) for n, i in lock.read().items()}
    monkeypatch.setattr(lock, "PATH", tmp_path / "old.json")
    lock.write(old, tmp_path / "old.json")
    with pytest.raises(UsageError, match=r"cpu, gpu, serving: built from other code"):
        submit(spec)
    assert cluster.calls == []


def test_a_failed_stage_was_tried_as_often_as_the_file_says_and_ends_the_run(cluster, spec):
    cluster.cluster.instead = says(failing=["split"])
    report = submit(spec)
    assert (report.status, report.exit_code) == ("failed", EXIT_FAILED)
    assert statuses(report) == {"ingest": "done", "validate": "done", "split": "failed"} | dict.fromkeys(
        STAGES[3:], "not run"
    )
    assert "split failed after 3 attempts" in report.error["what"]


SLICED = ["hardware.stages.evaluate.slices=3"]


def test_slices_are_no_stages_of_the_report(cluster, spec):
    report = submit(spec, SLICED)
    assert (report.exit_code, statuses(report)) == (EXIT_DONE, dict.fromkeys(STAGES, "done"))
    shares = [task.name for task in cluster.going[report.run_id].tasks]
    assert shares.count("evaluate-slice") == 3 and shares.index("evaluate") == len(shares) - 3


def test_a_slice_that_fails_ends_the_run_before_evaluate_and_is_named(cluster, spec):
    started = []

    def start(stage, values, pod):
        started.append((stage, values.get("share")))
        return int(values.get("share") == "2 of 3")

    cluster.cluster.instead = start
    report = submit(spec, SLICED)
    assert (report.status, statuses(report)["evaluate"]) == ("failed", "not run")
    assert "evaluate-slice failed after 3 attempts" in report.error["what"]
    assert [share for stage, share in started if stage == "evaluate_slice"].count("2 of 3") == 3
    assert "evaluate" not in [stage for stage, _ in started]


def test_retry_goes_on_from_the_stage_that_failed(cluster, spec, monkeypatch):
    cluster.cluster.instead = says(failing=["split"])
    failed = submit(spec)
    cluster.cluster.instead = says()
    endpoints.require().call("Run", "run_service_retry_run", failed.run_id)
    report = submitting.attach(failed.run_id, endpoints.require(), screen=None)
    assert (report.run_id, report.exit_code) == (failed.run_id, EXIT_DONE)


def test_a_lost_connection_is_waited_out(cluster, spec, caplog):
    going = threading.Event()
    cluster.cluster.instead = says(wait=going)

    def lose():
        while not cluster.runs:
            time.sleep(0.02)
        cluster.down.set()
        time.sleep(0.5)
        going.set()
        time.sleep(0.3)
        cluster.down.clear()

    threading.Thread(target=lose, daemon=True).start()
    report = submit(spec)
    assert report.exit_code == EXIT_DONE and statuses(report) == dict.fromkeys(STAGES, "done")
    said = [record.getMessage() for record in caplog.records]
    assert sum("the run goes on without us" in text for text in said) == 1
    assert sum("connected again" in text for text in said) == 1


def test_a_terminated_run_says_so(cluster, spec):
    going = threading.Event()
    cluster.cluster.instead = says(wait=going)

    def end():
        while not cluster.runs:
            time.sleep(0.02)
        endpoints.require().call("Run", "run_service_terminate_run", next(iter(cluster.runs)))
        going.set()

    threading.Thread(target=end, daemon=True).start()
    report = submit(spec)
    assert (report.status, report.exit_code) == ("interrupted", EXIT_INTERRUPTED)
    assert "was terminated" in report.error["what"]


def test_ctrl_c_leaves_the_run_alone_and_says_how_to_come_back(cluster, spec, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(submitting, "follow", interrupted)
    report = submit(spec)
    assert report.exit_code == EXIT_INTERRUPTED and f"runs attach {report.run_id}" in report.error["todo"]
    monkeypatch.undo()


def test_whoever_attaches_sees_what_the_submitter_sees(cluster, spec):
    report = submit(spec)
    other = submitting.attach(report.run_id, endpoints.require(), screen=None)
    assert (other.pipeline, statuses(other), other.exit_code) == ("little_one", statuses(report), EXIT_DONE)


def test_runs_lists_what_the_endpoint_has_of_us_watched_or_not(cluster, spec):
    report = submit(spec)
    put(spec)
    fired = cluster.fire(next(iter(cluster.recurring)), datetime(2026, 12, 1, 3, tzinfo=UTC))
    cluster.going[fired.run_id].join()
    rows = listing.runs(endpoints.require(), 20)
    assert [(row["run_id"], row["pipeline"], row["status"]) for row in rows] == [
        (fired.run_id, "little_one", "done"),
        (report.run_id, "little_one", "done"),
    ]
    assert rows[0]["slot"].startswith("2026-12-01T03") and rows[1]["slot"] is None
    assert len(listing.runs(endpoints.require(), 1)) == 1
    for version in cluster.versions.values():
        version.description = "made by hand"
    assert listing.runs(endpoints.require(), 20) == []


def test_an_archived_experiment_is_named_before_a_run_is_refused(cluster, spec):
    submit(spec)
    next(iter(cluster.experiments.values())).storage_state = "ARCHIVED"
    with pytest.raises(UsageError, match=r"little_one at .* is archived"):
        submit(spec)


def test_a_run_that_is_not_ours_or_not_there_is_refused(cluster, spec):
    report = submit(spec)
    next(iter(cluster.versions.values())).description = "made by hand"
    with pytest.raises(UsageError, match="was not started by Tuneyard"):
        submitting.attach(report.run_id, endpoints.require(), screen=None)
    with pytest.raises(EndpointError, match="404: Run nobody not found") as missing:
        submitting.attach("nobody", endpoints.require(), screen=None)
    assert not missing.value.lost


def test_a_wrong_token_is_named_by_its_variable_and_never_shown(cluster, spec, monkeypatch):
    monkeypatch.setenv(endpoints.TOKEN_VARIABLE, "a-wrong-secret")
    report = submit(spec)
    assert report.exit_code == EXIT_FAILED
    assert endpoints.TOKEN_VARIABLE in report.error["todo"]
    assert "a-wrong-secret" not in json.dumps(report.error) + repr(endpoints.require())


def test_an_endpoint_that_is_not_there_is_named_with_what_to_look_at(spec, images, monkeypatch, tmp_path):
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path))
    monkeypatch.delenv("TUNEYARD_STORE", raising=False)
    monkeypatch.setenv(endpoints.URL_VARIABLE, "http://127.0.0.1:9")
    report = submit(spec)
    assert report.exit_code == EXIT_FAILED and "http://127.0.0.1:9 does not answer" in report.error["what"]
    monkeypatch.setenv(endpoints.URL_VARIABLE, "kfp.example")
    with pytest.raises(UsageError, match="http://"):
        endpoints.configured()
    monkeypatch.delenv(endpoints.URL_VARIABLE)
    with pytest.raises(UsageError, match=endpoints.URL_VARIABLE):
        endpoints.require()


def test_kfps_cache_answers_under_our_key_without_a_pod_and_for_no_other(cluster, spec):
    images, pipeline, there = lock.read(), load(spec), endpoints.require()

    def pods_of(keys):
        content = versions.Content(pipeline.name, STAGES, keys)
        run = submitting.start(pipeline, there, images, content, keys)
        cluster.going[run].join()
        return {task.name for task in cluster.going[run].tasks if task.pods}

    assert pods_of({"ingest": "a" * 64}) == set(STAGES)
    assert pods_of({"ingest": "a" * 64}) == set(STAGES) - {"ingest"}
    assert pods_of({"ingest": "b" * 64}) == set(STAGES)
    assert pods_of({}) == set(STAGES)


# --- schedules --------------------------------------------------------------------------------------


def put(spec, cron="0 3 1 * *", dry=False, overrides=()):
    return schedules.put(load(spec, overrides), cron, "command", endpoints.require(), lock.read(), dry)


def test_a_schedule_is_made_once_and_follows_what_is_in_git(cluster, spec):
    assert put(spec, dry=True).change == "created" and cluster.recurring == {} and cluster.versions == {}
    assert put(spec).change == "created"
    (made,) = cluster.recurring.values()
    assert (made.trigger.cron_schedule.cron, made.no_catchup, made.max_concurrency) == (
        "0 0 3 1 * *",
        True,
        "1",
    )
    assert (made.mode, made.service_account) == ("ENABLE", "tuneyard-runner")
    assert put(spec).change == "unchanged"
    assert list(cluster.recurring) == [made.recurring_run_id]
    assert put(spec, overrides=["train.epochs=2"]).change == "changed"
    assert put(spec, cron="0 4 1 * *", overrides=["train.epochs=2"]).change == "changed"
    (now,) = cluster.recurring.values()
    assert now.trigger.cron_schedule.cron == "0 0 4 1 * *"
    assert now.pipeline_version_reference.pipeline_version_id in cluster.versions


def test_what_somebody_changed_by_hand_or_doubled_is_put_right(cluster, spec):
    put(spec)
    (made,) = cluster.recurring.values()
    made.mode = "DISABLE"
    assert put(spec).change == "changed"
    (now,) = cluster.recurring.values()
    assert now.mode == "ENABLE"
    cluster.recurring["copy"] = type(now)(**{**now.to_dict(), "recurring_run_id": "copy"})
    cluster.recurring["copy"].__dict__.update({**now.__dict__, "_recurring_run_id": "copy"})
    assert put(spec).change == "changed" and len(cluster.recurring) == 1


def test_reconcile_makes_the_clusters_schedules_those_of_the_files(cluster, spec, tmp_path):
    there, images = endpoints.require(), lock.read()
    timed, plain = load(spec, ['schedule.cron="0 3 1 * *"']), load(spec)
    assert [c.change for c in schedules.reconcile({"little_one": timed}, there, images, False)] == ["created"]
    assert [c.change for c in schedules.reconcile({"little_one": timed}, there, images, False)] == [
        "unchanged"
    ]
    assert [c.change for c in schedules.reconcile({"little_one": plain}, there, images, True)] == ["removed"]
    assert len(cluster.recurring) == 1
    assert [c.change for c in schedules.reconcile({"little_one": plain}, there, images, False)] == ["removed"]
    assert cluster.recurring == {}
    put(spec)  # by hand: not in git, so not git's to remove
    assert schedules.reconcile({"little_one": plain}, there, images, False) == []
    assert [c.change for c in schedules.remove("little_one", there)] == ["removed"]
    assert (cluster.recurring, schedules.remove("little_one", there)) == ({}, [])


def test_somebody_elses_recurring_runs_are_left_alone(cluster, spec):
    put(spec)
    (made,) = cluster.recurring.values()
    made.description = "not ours"
    assert (
        schedules.of(endpoints.require()) == [] and schedules.remove("little_one", endpoints.require()) == []
    )
    assert len(cluster.recurring) == 1


def fired(cluster, slot):
    """What the stages of a run that the scheduler starts are told of it."""
    seen = {}
    cluster.cluster.instead = lambda stage, values, pod: seen.update({stage: (values["slot"], values["due"])})
    run = cluster.fire(next(iter(cluster.recurring)), slot)
    cluster.going[run.run_id].join()
    assert set(seen) == set(STAGES)
    (given,) = set(seen.values())
    return {"id": run.run_id, "pipeline": "little_one", "slot": given[0], "due": given[1]}


@pytest.mark.parametrize("expands", [False, True])
@pytest.mark.parametrize("reads_workflows", [False, True])
def test_a_minutely_schedule_fires_twice_and_each_run_has_its_slot(
    cluster, spec, store, expands, reads_workflows
):
    cluster.expands, cluster.reads_workflows = expands, reads_workflows
    put(spec, cron="* * * * *")
    minutes = [datetime(2026, 12, 1, 3, minute, tzinfo=UTC) for minute in (0, 1)]
    one, other = (fired(cluster, minute) for minute in minutes)
    assert one["slot"].startswith("20261201030000" if expands else "[[ScheduledTime]]")
    assert [slots.of_run(run, store) for run in (one, other)] == ["20261201030000", "20261201030100"]
    for run in (one, other, one):
        slots.claim(run, store)
    again = fired(cluster, minutes[0])
    with pytest.raises(StageStopped, match=f"which run {one['id']} has"):
        slots.claim(again, store)
    found = schedules.slots(endpoints.require(), schedules.of(endpoints.require())[0], None)
    assert {(slot["run_id"], slot["state"], slot["registered"]) for slot in found} == {
        (run["id"], "SUCCEEDED", None) for run in (one, other, again)
    }


def test_a_run_that_nobody_scheduled_is_given_no_slot(cluster, spec):
    seen = {}
    cluster.cluster.instead = lambda stage, values, pod: seen.update({stage: values["slot"]})
    submit(spec)
    assert seen == dict.fromkeys(STAGES, "")


def test_the_zone_of_the_scheduler_is_part_of_the_schedule(cluster, spec, store, monkeypatch):
    assert put(spec, cron="0 0,1 * * *").change == "created"
    monkeypatch.setenv(endpoints.ZONE_VARIABLE, "Asia/Shanghai")
    assert put(spec, cron="0 0,1 * * *").change == "changed"
    run = fired(cluster, datetime(2026, 11, 30, 17, tzinfo=UTC))
    assert slots.of_run(run, store) == "20261130170000"
    monkeypatch.setenv(endpoints.ZONE_VARIABLE, "Shanghai")
    with pytest.raises(UsageError, match="TUNEYARD_KFP_TIMEZONE is 'Shanghai'"):
        endpoints.configured()


def test_a_tree_that_differs_from_its_commit_is_not_scheduled(monkeypatch):
    monkeypatch.setattr(versions, "git_commit", lambda: "0123456789ab-dirty")
    with pytest.raises(UsageError, match="differs from commit 0123456789ab"):
        schedules.committed()
