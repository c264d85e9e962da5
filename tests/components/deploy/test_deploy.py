"""The deploy stage in front of a real model server, a real S3 server and a real registry."""

from __future__ import annotations

import json
import socket
import time

import httpx
import pytest

from components.deploy import deploy as stage
from components.deploy.config import DeployConfig
from components.deploy.server import Answer, ModelServer
from components.shared import registry
from components.shared.errors import TuneyardError
from components.shared.stage import Artifact, Context

TOKEN = "a-token-of-the-tests"
LABELS = ["down", "up"]


def put(store, url, seconds=60):
    return stage.put_in_service("news", store, url, TOKEN, seconds)


def answering(url):
    """Version that answers now, as a client sees it."""
    return ModelServer(url, TOKEN, 10).ask("news", "classification").version


def test_the_champion_is_put_in_service_and_answers(mlflow_store, server_url, promoted):
    first = promoted(1)
    deployment = put(mlflow_store, server_url)
    assert (deployment.version, deployment.digest) == (first.version, first.digest)
    assert (deployment.changed, deployment.previous_version) == (True, None)
    assert deployment.answer in LABELS
    assert deployment.endpoint == f"{server_url}/v2/models/news/infer"
    assert httpx.get(f"{server_url}/readyz", trust_env=False).status_code == 200

    again = put(mlflow_store, server_url)
    assert (again.changed, again.load_seconds, again.version) == (False, 0.0, first.version)

    second = promoted(2)
    replaced = put(mlflow_store, server_url)
    assert (replaced.changed, replaced.previous_version) == (True, first.version)
    assert answering(server_url) == str(second.version)
    desired = mlflow_store.read_json("deployments/news.json")
    assert (desired["version"], desired["previous"]["version"]) == (second.version, first.version)
    assert "previous" not in desired["previous"]
    assert desired["card"]["labels"] == LABELS


def test_missing_files_are_named_and_nothing_changes(mlflow_store, server_url, promoted):
    version = promoted(1)
    manifest = mlflow_store.read_manifest(version.manifest_uri)
    gone = next(e for e in manifest.files if e.path == "model.onnx")
    key = mlflow_store.key(f"objects/{gone.sha256[:2]}/{gone.sha256}")
    mlflow_store.client.delete_object(Bucket=mlflow_store.bucket, Key=key)
    with pytest.raises(TuneyardError, match=r"missing or cut in the store: \['model.onnx'\]"):
        put(mlflow_store, server_url)
    assert mlflow_store.read_json("deployments/news.json") is None


def test_a_model_that_the_server_refuses_leaves_everything_as_it_was(
    mlflow_store, server_url, promoted, model_folder
):
    first = promoted(1)
    put(mlflow_store, server_url)
    before = mlflow_store.read_json("deployments/news.json")
    folder = model_folder(2)
    (folder / "notes.pkl").write_bytes(b"\x80\x04.")
    manifest = mlflow_store.put_tree(folder, "model")
    bad = registry.register_version("news", mlflow_store.manifest_uri(manifest), "", {"metrics": "{}"})
    registry.client().set_registered_model_alias("news", registry.CHAMPION, str(bad.version))
    with pytest.raises(TuneyardError, match=r"notes.pkl"):
        put(mlflow_store, server_url)
    assert mlflow_store.read_json("deployments/news.json") == before
    assert answering(server_url) == str(first.version)


def test_a_wrong_answer_takes_the_server_back(mlflow_store, server_url, promoted, monkeypatch):
    first = promoted(1)
    put(mlflow_store, server_url)
    promoted(2)
    real = ModelServer.ask

    def elsewhere(self, *asked):
        answer = real(self, *asked)
        return Answer(answer.text, "99", answer.digest)

    with monkeypatch.context() as patch:
        patch.setattr(ModelServer, "ask", elsewhere)
        with pytest.raises(TuneyardError, match=r"version 99 .* answered instead of version 2"):
            put(mlflow_store, server_url)
    assert mlflow_store.read_json("deployments/news.json")["version"] == first.version
    assert answering(server_url) == str(first.version)


def test_a_first_deployment_that_fails_leaves_no_model_behind(
    mlflow_store, server_url, promoted, monkeypatch
):
    promoted(1)
    with monkeypatch.context() as patch:
        patch.setattr(ModelServer, "ask", lambda self, *asked: Answer("", "99", ""))
        with pytest.raises(TuneyardError, match="version 99"):
            put(mlflow_store, server_url)
    assert mlflow_store.read_json("deployments/news.json") is None
    assert ModelServer(server_url, TOKEN, 10).served() == {}


def test_a_wrong_token_is_said(mlflow_store, server_url, promoted):
    promoted(1)
    with pytest.raises(TuneyardError, match="401") as caught:
        stage.put_in_service("news", mlflow_store, server_url, "wrong", 60)
    assert "token" in caught.value.todo
    assert mlflow_store.read_json("deployments/news.json") is None


def test_no_server_is_said_within_the_time(mlflow_store, promoted):
    promoted(1)
    started = time.monotonic()
    with pytest.raises(TuneyardError, match="cannot be reached"):
        put(mlflow_store, "http://127.0.0.1:9", seconds=2)
    # Two seconds of asking, and the looks into registry and store before.
    assert time.monotonic() - started < 20
    with pytest.raises(TuneyardError, match="TUNEYARD_SERVING_URL and TUNEYARD_SERVING_TOKEN not set"):
        stage.put_in_service("news", mlflow_store, "", "", 2)


def run_stage(store, tmp_path, registration):
    folder = tmp_path / "registration"
    folder.mkdir(exist_ok=True)
    (folder / "registration.json").write_text(json.dumps(registration))
    artifact = Artifact(store.put_tree(folder, "report"), folder)
    context = Context("run-1", "news", "deploy", "k" * 64, store, tmp_path / "out", tmp_path)
    return stage.deploy(DeployConfig(ready_seconds=60), {"registration": artifact}, context)


def test_the_stage_serves_the_champion_when_the_new_version_is_not_it(
    mlflow_store, server_url, promoted, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("TUNEYARD_SERVING_URL", server_url)
    monkeypatch.setenv("TUNEYARD_SERVING_TOKEN", TOKEN)
    first = promoted(1)
    worse = promoted(2, champion=False)
    facts = {"name": "news", "version": worse.version, "champion": False, "why": "accuracy 0.8 < 0.9"}
    caplog.set_level("INFO", "tuneyard.deploy")
    result = run_stage(mlflow_store, tmp_path, facts)
    assert (result.summary["version"], result.summary["registered_version"]) == (first.version, worse.version)
    assert result.metrics["load_seconds"] > 0
    written = json.loads((tmp_path / "out/deployment/deployment.json").read_text())
    assert (written["version"], written["digest"]) == (first.version, first.digest)
    assert "version 2 is not champion (accuracy 0.8 < 0.9); 1 stays" in caplog.text


def test_without_a_champion_the_line_stops(mlflow_store, promoted, tmp_path):
    version = promoted(1, champion=False)
    facts = {"name": "news", "version": version.version, "champion": False, "why": "the verdict failed"}
    result = run_stage(mlflow_store, tmp_path, facts)
    assert result.stop.startswith("news has no champion (version 1: the verdict failed)")
    assert "tuneyard promote" in result.stop_todo


def test_a_deployment_is_still_true_only_while_the_model_is_in_service(
    mlflow_store, server_url, promoted, tmp_path, monkeypatch
):
    monkeypatch.setenv("TUNEYARD_SERVING_URL", server_url)
    monkeypatch.setenv("TUNEYARD_SERVING_TOKEN", TOKEN)
    first = promoted(1)
    facts = {"name": "news", "version": first.version, "champion": True}
    summary = run_stage(mlflow_store, tmp_path, facts).summary
    config = DeployConfig()
    assert config.still_true(summary)
    assert not config.still_true({"name": "news"})  # there was no champion then; there may be one now
    mlflow_store.remove("deployments/news.json")
    assert ModelServer(server_url, TOKEN, 30).follow("news") is None
    assert not config.still_true(summary)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TUNEYARD_SERVING_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert not config.still_true(summary)
