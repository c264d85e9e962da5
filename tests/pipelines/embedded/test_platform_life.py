"""The platform through its life: twice up, crashes, stolen ports, down, and up again with its data."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.shared import digest
from components.shared.errors import TuneyardError, UsageError
from pipelines.embedded import seaweed, services
from pipelines.embedded.credentials import load_credentials
from pipelines.embedded.platform import Platform, down, environment, status, ui, up
from pipelines.embedded.processes import service_processes
from pipelines.embedded.state import load_state


def names(home: Path) -> list[str]:
    return sorted(service_processes(home).values())


def states(home: Path) -> dict[str, str]:
    return {row.name: row.state for row in status(home)}


def keep(s3: Any, content: bytes) -> None:
    s3.put_object(Bucket="models", Key="kept", Body=content)


def kept(platform: Platform) -> bytes:
    s3 = seaweed.client(platform.s3_url, load_credentials(platform.home))
    return bytes(s3.get_object(Bucket="models", Key="kept")["Body"].read())


def test_up_again_changes_nothing(running: Platform) -> None:
    before = {process.pid for process in service_processes(running.home)}
    assert up(running.home) == running
    assert {process.pid for process in service_processes(running.home)} == before


def test_other_serving_code_starts_the_server_anew_and_nothing_else(
    running: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: process.pid for process, name in service_processes(running.home).items()}
    monkeypatch.setattr(digest, "of_code", lambda stage: "another")
    assert up(running.home) == running
    after = {name: process.pid for process, name in service_processes(running.home).items()}
    assert {name for name in before if after[name] != before[name]} == {"server"}


def test_status_tells_what_runs(running: Platform) -> None:
    rows = {row.name: row for row in status(running.home)}
    assert list(rows) == ["s3", "server", "ui"]
    assert states(running.home) == {"s3": "running", "server": "running", "ui": "stopped"}
    store = rows["s3"]
    assert store.url == running.s3_url
    assert store.pid
    assert psutil.pid_exists(store.pid)
    assert store.uptime_seconds is not None
    assert 0.02 < store.memory_gib < 1
    assert store.log.is_file()
    assert (rows["ui"].pid, rows["ui"].url, rows["ui"].memory_gib) == (None, None, 0.0)


def test_services_do_not_share_our_session(running: Platform) -> None:
    """Ctrl-C goes to the foreground process group, hang-up to the session: they are in neither."""
    for process in service_processes(running.home):
        assert os.getsid(process.pid) != os.getsid(0)


def test_the_page_starts_on_request_and_stays(running: Platform) -> None:
    url = ui(running.home)
    assert states(running.home)["ui"] == "running"
    assert url == {row.name: row for row in status(running.home)}["ui"].url
    up(running.home)
    assert states(running.home)["ui"] == "running"


def test_a_killed_store_comes_back_with_its_data(
    running: Platform, s3: Any, weed: Callable[[], psutil.Process]
) -> None:
    keep(s3, b"before the kill")
    killed = weed()
    killed.kill()
    time.sleep(0.1)
    assert up(running.home) == running
    assert weed().pid != killed.pid
    assert kept(running) == b"before the kill"


def test_a_killed_supervisor_leaves_nothing_that_confuses_the_next_up(running: Platform, s3: Any) -> None:
    keep(s3, b"before the crash")
    orphans = [process for process, name in service_processes(running.home).items() if name != "supervisor"]
    next(p for p, name in service_processes(running.home).items() if name == "supervisor").kill()
    time.sleep(0.1)
    assert set(states(running.home).values()) >= {"failed"}
    # As it looks after a reboot, too: the socket folder is gone, the pid file names somebody else.
    runtime = Path(load_state(running.home).runtime)
    (runtime / "supervisor.sock").unlink(missing_ok=True)
    (running.home / "supervisor.pid").write_text(f"{os.getpid()}\n")
    assert up(running.home) == running
    assert not [process for process in orphans if process.is_running()]
    assert names(running.home) == ["s3", "server", "supervisor"]
    assert kept(running) == b"before the crash"


def test_down_leaves_no_process_and_up_elsewhere_finds_the_data(
    running: Platform, s3: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Ports and sockets are given back; a port that was taken meanwhile is replaced and named in the log."""
    keep(s3, b"before the night")
    runtime, ports = Path(load_state(running.home).runtime), load_state(running.home).ports
    stopped = down(running.home)
    assert {"s3", "server", "supervisor"} <= set(stopped)
    assert names(running.home) == []
    assert set(states(running.home).values()) == {"stopped"}
    assert not runtime.exists()
    assert not [path for path in seaweed.grpc_sockets(ports) if path.exists()]
    assert down(running.home) == []
    with socket.create_server(("127.0.0.1", ports["s3"])), caplog.at_level(logging.WARNING):
        again = up(running.home)
    assert again.s3_url != running.s3_url
    assert again.serving_url == running.serving_url
    assert f"port {ports['s3']} of s3 is taken by" in caplog.text
    assert str(os.getpid()) in caplog.text
    assert kept(again) == b"before the night"
    assert environment(again)["AWS_ENDPOINT_URL_S3"] == again.s3_url


def test_a_fixed_port_that_is_taken_stops_up_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("TUNEYARD_S3_PORT", str(port))
        with pytest.raises(UsageError) as refused:
            up(tmp_path / "home")
    assert f"TUNEYARD_S3_PORT={port}" in str(refused.value)
    assert f"process {os.getpid()}" in str(refused.value)
    assert names(tmp_path / "home") == []
    assert down(tmp_path / "home") == []


def test_a_server_that_cannot_start_is_reported_with_the_end_of_its_log(
    running: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the changed service is restarted, and `up` recovers as soon as the fault is gone."""
    store = next(row for row in status(running.home) if row.name == "s3").pid
    broken = ["/bin/sh", "-c", "echo no such model >&2; sleep 0.2; exit 3"]
    with monkeypatch.context() as patch:
        patch.setattr(services, "server_command", lambda port: broken)
        with pytest.raises(TuneyardError, match="server did not become healthy") as failed:
            up(running.home, wait_seconds=2)
    assert "no such model" in str(failed.value)
    assert up(running.home) == running
    assert next(row for row in status(running.home) if row.name == "s3").pid == store


def test_two_ups_at_once_start_one_platform(running: Platform, weed: Callable[[], psutil.Process]) -> None:
    """The second waits for the first; here both find a server that must be started again."""
    for process, name in service_processes(running.home).items():
        if name == "server":
            process.send_signal(signal.SIGKILL)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(up, [running.home] * 2)) == [running] * 2
    assert names(running.home).count("s3") == 1
    assert names(running.home).count("server") == 1


def test_status_and_down_of_a_home_that_never_was(tmp_path: Path) -> None:
    home = tmp_path / "never"
    assert set(states(home).values()) == {"stopped"}
    assert down(home) == []
    assert not home.exists()
