from __future__ import annotations

import subprocess
import sys
import time

import boto3
import pytest

from components.shared import mlflow_database, tracking
from components.shared.errors import TuneyardError
from tests.rivals import FORK, rivals


def test_without_a_tracking_uri_nothing_happens_and_mlflow_is_not_imported():
    code = (
        "import sys\n"
        "from components.shared import tracking as t\n"
        "run = t.start_run('e', 'n', {'a': 1}, {})\n"
        "t.log_metrics(run, {'loss': 1.0}); t.log_history(run, [{'step': 1, 'loss': 1.0}])\n"
        "t.log_artifact_text(run, 'a.txt', 'x'); t.end_run(run, 'FINISHED')\n"
        "with t.system_metrics(run): pass\n"
        "assert run == '' and 'mlflow' not in sys.modules, run\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": "/usr/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_run_keeps_settings_curves_and_texts(mlflow_store, monkeypatch):
    # MLflow uses boto3's default session, which here may be of before the environment was set.
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    long = "é" * 7000  # MLflow's limit is 6000 characters
    params = {"train": {"learning_rate": 2e-4, "adapter": {"kind": "lora"}}, "names": long, "none": {}}
    run = tracking.start_run("sft legal/1", "first", params, {"digest.train": "abc"})
    # 700 rows of 2 numbers: more than the 1000 of one log_batch.
    tracking.log_history(
        run, [{"step": s, "loss": 1 / s, "lr": 0.1, "note": "x", "eval": None} for s in range(1, 701)]
    )
    tracking.log_metrics(run, {"final": 0.5}, step=700)
    tracking.log_artifact_text(run, "curve.csv", "step,loss\n")
    tracking.end_run(run, "FINISHED")

    client = mlflow_database.client()
    found = client.get_run(run)
    assert found.info.status == "FINISHED"
    assert found.data.params["train.learning_rate"] == "0.0002"
    assert found.data.params["train.adapter.kind"] == "lora"
    assert found.data.params["names"] == long[:6000]
    assert found.data.tags["digest.train"] == "abc"
    history = client.get_metric_history(run, "loss")
    assert sorted((m.step, m.value) for m in history) == [(s, 1 / s) for s in range(1, 701)]
    assert len(client.get_metric_history(run, "lr")) == 700
    assert "note" not in found.data.metrics and "eval" not in found.data.metrics
    assert found.info.artifact_uri.startswith("s3://mlflow/sft%20legal/1/")
    key = found.info.artifact_uri.removeprefix("s3://mlflow/")

    def read(name):
        return mlflow_store.client.get_object(Bucket="mlflow", Key=f"{key}/{name}")["Body"].read().decode()

    assert read("curve.csv") == "step,loss\n"
    assert read("long_params/names.txt") == long


def test_processes_that_start_at_once_share_one_experiment(mlflow_store):
    assert rivals(tracking.start_run, [("same", f"run {i}", {"i": i}, {}) for i in range(4)]) == [0] * 4
    client = mlflow_database.client()
    experiment = client.get_experiment_by_name("same")
    assert sorted(r.data.params["i"] for r in client.search_runs([experiment.experiment_id])) == list("0123")


@pytest.mark.slow  # MLflow's migrations of a database, and processes that import MLflow
def test_processes_that_meet_an_empty_database_all_get_it(tmp_path, monkeypatch):
    """Without the lock they run MLflow's migrations over each other: 7 of 8 failed."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'new.db'}")
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path))
    assert rivals(mlflow_database.client, [()] * 3) == [0] * 3


def test_system_metrics_are_logged_while_the_work_goes_on(mlflow_store, monkeypatch):
    monkeypatch.setattr(tracking, "_SYSTEM_METRICS_SECONDS", 0.1)
    run = tracking.start_run("e", "n", {}, {})
    with tracking.system_metrics(run):
        time.sleep(0.8)
    metrics = mlflow_database.client().get_run(run).data.metrics
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert 0 < metrics["system/system_memory_usage_percentage"] <= 100


def test_a_failing_work_ends_the_monitor_and_passes_on(mlflow_store):
    run = tracking.start_run("e", "n", {}, {})
    with pytest.raises(ZeroDivisionError), tracking.system_metrics(run):
        _ = 1 / 0


def test_a_file_that_is_no_database_is_named(tmp_path, monkeypatch):
    (tmp_path / "mlflow.db").write_text("hello " * 1000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path))
    with pytest.raises(TuneyardError, match=r"mlflow.db.*not a database"):
        mlflow_database.client()


def test_an_artifact_root_is_required_beside_sqlite(mlflow_store, monkeypatch):
    monkeypatch.delenv("TUNEYARD_MLFLOW_ARTIFACTS")
    with pytest.raises(TuneyardError, match="TUNEYARD_MLFLOW_ARTIFACTS is not set"):
        tracking.start_run("e", "n", {}, {})


def test_an_artifact_store_that_is_down_is_one_clear_error(mlflow_store, monkeypatch):
    run = tracking.start_run("elsewhere", "n", {}, {})
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(TuneyardError, match=r"a.txt of MLflow run .* cannot be written"):
        tracking.log_artifact_text(run, "a.txt", "x")


def test_the_password_in_a_tracking_uri_is_not_shown():
    shown = mlflow_database._shown("postgresql://me:secret@db:5432/mlflow")
    assert "secret" not in shown and "db:5432" in shown


def test_a_lock_is_held_by_one_process_and_dies_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path))
    held = FORK.Event()

    def hold():
        with mlflow_database.locked("x"):
            held.set()
            time.sleep(60)

    holder = FORK.Process(target=hold, daemon=True)
    holder.start()
    assert held.wait(10)
    monkeypatch.setattr(mlflow_database, "_LOCK_SECONDS", 0.1)
    with pytest.raises(TuneyardError, match=f"held by process {holder.pid}"), mlflow_database.locked("x"):
        pass
    holder.kill()
    holder.join()
    with mlflow_database.locked("x"):
        assert (tmp_path / "locks" / "x.lock").read_text() != str(holder.pid)
