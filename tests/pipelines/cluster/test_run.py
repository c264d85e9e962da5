"""A whole run through the endpoint: what a pod runs has run, with just the environment that a pod has."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from components.shared.errors import EXIT_DONE
from components.shared.store import Store
from pipelines.cluster import endpoint as endpoints
from pipelines.cluster import submitting

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
        f"http://127.0.0.1:{server.server_port}/x"
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
    assert first.model["aliases"] == ["candidate", "champion"] or "champion" in first.model["aliases"]
    assert first.run_id in cluster.runs and first.metrics["tuned"]["accuracy"] >= 0
    assert Store.from_environment().read_json(f"runs/{first.run_id}/run.json")["status"] == "done"


def test_the_log_of_every_stage_was_streamed(first):
    from pathlib import Path

    log = Path(first.log).read_text()
    assert [f"▸ {s['name']}" in log for s in first.stages] == [True] * 7
    assert log.count("▸ train") == 1


def test_somebody_was_told(first, webhook):
    assert [list(each) for each in webhook] == [["text"]]
    assert first.run_id in webhook[0]["text"] and "done" in webhook[0]["text"]


def test_an_unchanged_submit_starts_no_run(first, cluster, pipeline):
    before = len(cluster.runs)
    again = submitting.run_cluster(str(pipeline), endpoints.require(), screen=None)
    assert len(cluster.runs) == before
    assert [s["cached"] for s in again.stages] == [True] * 7 and again.exit_code == EXIT_DONE
    assert again.model == first.model
