"""A champion on trial, on a real server that clients ask meanwhile; the ledger has how it ended."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from components.deploy import canary
from components.deploy import deploy as stage
from components.deploy.config import DeployConfig
from components.deploy.server import ModelServer
from components.shared import ledger, registry
from components.shared.errors import TuneyardError
from components.shared.ledger import Change
from components.shared.stage import Artifact, Context


@pytest.fixture
def champion(mlflow_store, promoted):
    """Registers a version and makes it champion by the ledger: `champion(seed)`."""

    def make(seed, **more):
        version = promoted(seed, champion=False, **more)
        for action in ("register", "promote"):
            change = Change(action, version.version, version.digest, "a test", "", {"metrics": {"f1": seed}})
            ledger.change("news", mlflow_store, lambda _, change=change: change)
        return version

    return make


@pytest.fixture
def clients(server_url):
    """Asks all the time, each time as somebody else; a third of the texts begin with a Z."""
    stop = threading.Event()
    seen: list[tuple[int, str]] = []

    def ask(number):
        count = 0
        with httpx.Client(base_url=server_url, trust_env=False, timeout=30) as client:
            while not stop.wait(0.01):
                count += 1
                text = "Zebra" if count % 3 == 0 else "profit rose"
                tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}
                headers = {"X-Conversation-Id": f"{number}/{count}"}
                body = {"inputs": [tensor]}
                try:
                    response = client.post("/v2/models/news/infer", json=body, headers=headers)
                except httpx.TransportError:
                    continue
                seen.append((response.status_code, response.headers.get("x-model-version", "")))

    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(ask, number) for number in range(2)]
        yield seen
        stop.set()
        for task in tasks:
            task.result()


@pytest.fixture
def run(mlflow_store, server_url, token, tmp_path, monkeypatch):
    """Runs the stage with canary settings: `run(requests=...)`."""
    monkeypatch.setenv("TUNEYARD_SERVING_URL", server_url)
    monkeypatch.setenv("TUNEYARD_SERVING_TOKEN", token)
    monkeypatch.setattr(canary, "_LOOK_SECONDS", 0.3)

    def make(**settings):
        folder = tmp_path / "registration"
        folder.mkdir(exist_ok=True)
        facts = {"name": "news", "version": registry.champion("news").version}
        (folder / "registration.json").write_text(json.dumps(facts))
        artifact = Artifact(mlflow_store.put_tree(folder, "report"), folder)
        out = tmp_path / f"out-{facts['version']}"
        context = Context("run-1", "news", "deploy", "k" * 64, mlflow_store, out, tmp_path)
        # A first number that is far from the second on a busy machine: speed is judged in test_verdict.py.
        asked = {"weight": 0.5, "requests": 30, "within_minutes": 1, "max_p99_ratio": 1000} | settings
        config = DeployConfig.model_validate({"ready_seconds": 60, "canary": asked})
        return stage.deploy(config, {"registration": artifact}, context)

    return make


def desired(store):
    document = store.read_json("deployments/news.json")
    return document["version"], document.get("canary")


def test_a_canary_that_does_well_gets_all_requests(mlflow_store, champion, clients, run, server_url, token):
    champion(1)
    first = run()
    served = len(clients)
    # Nothing was beside it.
    assert (first.summary["version"], first.summary.get("canary")) == (1, None)
    champion(2)
    result = run()
    assert not result.stop
    told = [result.summary[key] for key in ("version", "changed", "previous_version")]
    assert told == [2, True, 1]
    evidence = result.summary["canary"]
    assert evidence["passed"] and evidence["canary"]["requests"] >= 30 and evidence["canary"]["errors"] == 0
    assert evidence["stable"]["version"] == 1 and evidence["stable"]["requests"] > 0
    assert desired(mlflow_store) == (2, None)
    assert ModelServer(server_url, token, 10).ask("news", "classification").version == "2"
    entry = ledger.verify("news", mlflow_store)[-1]
    assert (entry.action, entry.version, entry.who) == ("promote", 2, "pipeline news, run run-1")
    assert entry.why.startswith("the canary passed: ")
    assert (entry.evidence["canary"], entry.evidence["metrics"]) == (evidence, {"f1": 2})
    # A rollback from here still leads to the version before.
    assert ledger.rollback_target(ledger.read("news", mlflow_store)).version == 1
    assert {status for status, _ in clients[served:]} == {200}
    # Until the first was deployed: the server did not follow the store yet, or knew of no such model.
    assert {status for status, _ in clients[:served]} <= {200, 404, 503}


def test_a_canary_that_fails_is_taken_back(mlflow_store, champion, clients, run, server_url, token):
    champion(1)
    run()
    champion(2, fails_on="Zebra")
    result = run(requests=2000)
    assert result.stop.startswith("news version 2 failed as a canary, version 1 stays: ")
    assert "requests failed, more than max_error_ratio 0.01 of 2000" in result.stop
    assert "version" not in result.summary
    assert desired(mlflow_store) == (1, None)
    assert registry.champion("news").version == 1
    entry = ledger.verify("news", mlflow_store)[-1]
    assert (entry.action, entry.version, entry.evidence["undone"]) == ("rollback", 1, 2)
    # Twenty may fail; it was not tried on all of the two thousand.
    assert 21 <= entry.evidence["canary"]["canary"]["errors"] < 200
    before = len(clients)
    assert ModelServer(server_url, token, 10).ask("news", "classification").version == "1"
    assert {status for status, version in clients[before:] if version == "1"} <= {200}
    assert not DeployConfig().still_true(result.summary)


def test_without_requests_the_old_version_stays(mlflow_store, champion, run):
    champion(1)
    run()
    champion(2)
    result = run(within_minutes=0.05)
    assert "too little is known of it: 0 of 30 requests in 0.05 minutes" in result.stop
    assert desired(mlflow_store) == (1, None)
    assert ledger.champion(ledger.verify("news", mlflow_store)) == 1


def test_somebody_who_deploys_meanwhile_ends_it(mlflow_store, champion, run, server_url, token, monkeypatch):
    one = champion(1)
    run()
    champion(2)
    real = canary._read
    looks = []

    def meddled(meter, server):
        looks.append(1)
        if len(looks) == 2:
            # A rollback by hand.
            registry.set_alias("news", registry.CHAMPION, one.version)
            stage.put_in_service("news", mlflow_store, server_url, token, 60)
        real(meter, server)

    monkeypatch.setattr(canary, "_read", meddled)
    with pytest.raises(TuneyardError, match="somebody deployed while version 2 was tried"):
        run()
    assert desired(mlflow_store) == (1, None)
    assert [entry.version for entry in ledger.verify("news", mlflow_store)] == [1, 1, 2, 2]


def test_a_killed_stage_leaves_the_old_version(mlflow_store, champion, run, server_url, token, monkeypatch):
    champion(1)
    run()
    champion(2)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(canary, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert desired(mlflow_store) == (1, None)
    (state,) = ModelServer(server_url, token, 10).served().values()
    assert (state["version"], state["canary"]) == ("1", None)


def test_a_canary_that_the_server_refuses_is_not_deployed(mlflow_store, champion, run):
    champion(1)
    run()
    champion(2, beside="notes.pkl")
    with pytest.raises(TuneyardError, match=r"notes\.pkl"):
        run()
    assert desired(mlflow_store) == (1, None)
