"""The model server's container: it starts, says how it is, keeps to its volumes, and stops cleanly."""

from __future__ import annotations

import logging
import re
import socket
import uuid
from pathlib import Path

import httpx
import pytest

from tests.containers.container import answers, wait_for

log = logging.getLogger("tuneyard.tests")


@pytest.fixture
def started(contain, pod_environment):
    """A server on a port of its own, with a store that desires no model: (container, url)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = pod_environment | {"TUNEYARD_STORE": f"s3://tuneyard/empty-{uuid.uuid4().hex[:8]}"}
    command = ["python3", "-m", "serving", "--host", "127.0.0.1", "--port", str(port)]
    container = contain("serving", command, environment)
    container.start()
    return container, f"http://127.0.0.1:{port}"


def reasons(url):
    answer = httpx.get(f"{url}/readyz", timeout=2, trust_env=False)
    assert answer.status_code == 503
    return answer.json()["reasons"]


def test_the_server_is_alive_says_what_it_waits_for_and_ends_cleanly_when_asked(started):
    container, url = started
    alive = wait_for(answers(f"{url}/healthz"), container, 60)
    # Not ready before a model is deployed; test_stages.py deploys one.
    looked = wait_for(lambda: "no model deployed" in reasons(url), container, 60)
    log.info("measured: alive after %.1f s, has looked for models after %.1f s", alive, alive + looked)
    assert container.stop() == 0, container.said()


def test_the_server_has_no_right_beyond_its_user(started):
    container, url = started
    wait_for(answers(f"{url}/healthz"), container, 60)
    status = dict(
        re.findall(
            r"^(\w+):\s+(.*)$", Path(f"/proc/{container.state()['pid']}/status").read_text(), re.MULTILINE
        )
    )
    assert status["Uid"].split() == ["10001"] * 4 and status["Gid"].split() == ["10001"] * 4
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"


def test_only_the_volumes_can_be_written(contain):
    program = """
import os
for folder in ("/", "/app", "/venv", "/etc", "/var", "/usr", "/tmp", "/work"):
    try:
        open(os.path.join(folder, "x"), "w").close()
        print(folder)
    except OSError as error:
        print(folder, error.strerror)
"""
    container = contain("serving", ["python3", "-c", program])
    assert container.run(60) == 0
    said = dict(line.partition(" ")[::2] for line in container.said().splitlines())
    assert [folder for folder, fault in said.items() if not fault] == ["/tmp", "/work"]
    assert {fault for fault in said.values() if fault} == {"Read-only file system"}
