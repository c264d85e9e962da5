"""The embedded platform of one checkout: `up`, `down`, `status`, and what stages need to reach it."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from components.shared.errors import TuneyardError
from pipelines.embedded import seaweed, supervisor
from pipelines.embedded.credentials import Credentials, ensure_credentials, load_credentials
from pipelines.embedded.ports import fixed_ports, settle_ports
from pipelines.embedded.preflight import preflight
from pipelines.embedded.private_files import private_folder, write_private
from pipelines.embedded.processes import end, memory_gib, service_processes, wait_gone, with_children
from pipelines.embedded.services import (
    Platform,
    home_dir,
    platform_of,
    services_of,
    stage_environment,
    supervisor_environment,
    write_aws_settings,
)
from pipelines.embedded.state import State, forget_runtime, load_state, locked, runtime_folder, save_state

__all__ = ["Platform", "ServiceStatus", "down", "environment", "home_dir", "preflight", "status", "ui", "up"]

log = logging.getLogger(__name__)

SERVICES = ("s3", "server", "ui")
ALWAYS = ("s3", "server")
HEALTH_PATH = {"s3": "/healthz", "server": "/healthz", "ui": "/health"}
UI_WAIT_SECONDS = 180
DOWN_WAIT_SECONDS = 45
LOG_LINES = 15
RUNNING = ("RUNNING", "STARTING")
FAILED = ("BACKOFF", "FATAL", "EXITED", "UNKNOWN")


@dataclass(frozen=True)
class ServiceStatus:
    """One service as `tuneyard status` shows it.

    Attributes:
        state: "running", "stopped" or "failed"; failed includes a process whose supervisor is gone.
        pid: None when there is no process, as are url and uptime_seconds.
        memory_gib: resident, with its child processes.
    """

    name: str
    state: str
    pid: int | None
    url: str | None
    uptime_seconds: float | None
    memory_gib: float
    log: Path


def up(home: Path, wait_seconds: float = 60) -> Platform:
    """Start the object store and the model server of `home` where they do not run, and wait for their health.

    What already runs is left alone, unless its settings changed. Safe to call from several processes at once.

    Args:
        home: where everything is kept; created when it is missing.
        wait_seconds: for all of it together.

    Raises:
        UsageError: a port that the user fixed is taken; nothing was started.
        TuneyardError: a service did not become healthy; with the end of its log.
    """
    home = home.expanduser().resolve()
    deadline = time.monotonic() + wait_seconds
    with locked(home, wait_seconds):
        return _up(home, ALWAYS, deadline)


def ui(home: Path) -> str:
    """Start MLflow's page, and the platform under it, where they do not run.

    Returns:
        The URL of the page.

    Raises:
        TuneyardError: it did not come up within three minutes; with the end of its log.
    """
    home = home.expanduser().resolve()
    deadline = time.monotonic() + UI_WAIT_SECONDS
    with locked(home, UI_WAIT_SECONDS):
        _up(home, SERVICES, deadline)
        return f"http://127.0.0.1:{load_state(home).ports['ui']}"


def down(home: Path) -> list[str]:
    """Stop every service of `home` and its supervisor, and wait until no process is left.

    Returns:
        The names of what was stopped; empty when nothing ran.
    """
    home = home.expanduser().resolve()
    if not home.is_dir():
        return []
    with locked(home, DOWN_WAIT_SECONDS):
        stopped = _down(home, load_state(home))
    return stopped


def status(home: Path) -> list[ServiceStatus]:
    """What runs for `home`. Starts and changes nothing."""
    home = home.expanduser().resolve()
    state = load_state(home)
    known = supervisor.processes(Path(state.runtime)) if state.runtime else {}
    orphans: dict[str, int] = {}
    if not known:
        orphans = {name: process.pid for process, name in service_processes(home).items()}
    rows = []
    for name in SERVICES:
        process = known.get(name, {})
        pid = process.get("pid") or orphans.get(name)
        running = process.get("statename") in RUNNING
        failed = process.get("statename") in FAILED or name in orphans
        rows.append(
            ServiceStatus(
                name=name,
                state="running" if running else "failed" if failed else "stopped",
                pid=pid,
                url=_url(state, name) if running else None,
                uptime_seconds=float(process["now"] - process["start"]) if running else None,
                memory_gib=memory_gib(pid) if pid else 0.0,
                log=_log_path(home, name),
            )
        )
    return rows


def environment(platform: Platform) -> dict[str, str]:
    """What the processes of stages need to reach the platform; lay it over the inherited environment.

    Raises:
        TuneyardError: `platform.home` holds no readable credentials.
    """
    return stage_environment(platform, load_credentials(platform.home))


def _up(home: Path, wanted: Sequence[str], deadline: float) -> Platform:
    fixed = fixed_ports(os.environ)
    state = load_state(home)
    private_folder(home / "logs")
    credentials = ensure_credentials(home)
    identifier = _identifier(home, credentials)
    answering = supervisor.identification(Path(state.runtime)) if state.runtime else None
    if answering != identifier:
        # A crashed supervisor leaves its services behind, still on their ports; one with other secrets
        # or without its socket cannot be spoken to. Either way, start from nothing.
        if _down(home, state):
            log.warning("stopped what an earlier platform left behind in %s", home)
        answering = None
        state = load_state(home)
    known = supervisor.processes(Path(state.runtime)) if answering else {}
    held = {name for name, process in known.items() if process["statename"] in RUNNING}
    ports = settle_ports(home, state.ports, fixed, held, {*wanted, *held})
    state = State(str(home), str(runtime_folder(state)), ports)
    platform = platform_of(home, ports)
    save_state(home, state)
    write_aws_settings(home)
    seaweed.write_settings(home, credentials)
    text = supervisor.configuration(services_of(platform, ports, Path(state.runtime)), identifier)
    if answering:
        changed = supervisor.apply(home, Path(state.runtime), text)
    else:
        log.info("starting the embedded platform in %s", home)
        changed = list(ALWAYS)
        write_private(supervisor.configuration_path(home), text)
        launch_environment = supervisor_environment(platform, credentials)
        supervisor.launch(home, Path(state.runtime), launch_environment, deadline)
    for name in SERVICES:
        if (name in wanted and name not in held) or (name in held and name in changed):
            supervisor.start(Path(state.runtime), name)
    _make_ready(home, state, wanted, credentials, deadline)
    return platform


def _make_ready(
    home: Path, state: State, wanted: Sequence[str], credentials: Credentials, deadline: float
) -> None:
    # Beside the data, so that it goes when the data goes. It names the process that was seen working: after
    # a restart the S3 port answers seconds before the volumes behind it do.
    marker = seaweed.store_folder(home) / "data" / "ready.json"
    proven = marker.read_text() if marker.is_file() else ""
    # Building a boto3 client takes a second, which the services' own start hides.
    s3 = seaweed.client(_url(state, "s3"), credentials) if proven != _proof(state) else None
    _wait_healthy(home, state, wanted, deadline)
    if s3 or proven != _proof(state):
        seaweed.prepare(s3 or seaweed.client(_url(state, "s3"), credentials), home, deadline)
        write_private(marker, _proof(state))


def _proof(state: State) -> str:
    process = supervisor.processes(Path(state.runtime)).get("s3", {})
    return json.dumps({"buckets": seaweed.BUCKETS, "pid": process.get("pid"), "start": process.get("start")})


def _identifier(home: Path, credentials: Credentials) -> str:
    """Names a supervisor that runs with these secrets for this home; another one must be replaced."""
    secret = json.dumps([str(home), credentials.s3_secret_key, credentials.serving_token])
    return "tuneyard-" + hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _wait_healthy(home: Path, state: State, names: Sequence[str], deadline: float) -> None:
    pending = list(names)
    if "ui" in pending and not _healthy(state, "ui"):
        log.info("MLflow's page takes about half a minute to start")
    while True:
        known = supervisor.processes(Path(state.runtime))
        pending = [
            name
            for name in pending
            if known.get(name, {}).get("statename") not in RUNNING or not _healthy(state, name)
        ]
        if not pending:
            return
        dead = [name for name in pending if known.get(name, {}).get("statename", "FATAL") == "FATAL"]
        if dead or time.monotonic() > deadline:
            raise _unhealthy(home, dead or pending, known)
        time.sleep(0.05)


def _unhealthy(home: Path, names: Sequence[str], known: dict[str, Any]) -> TuneyardError:
    parts = []
    for name in names:
        path = _log_path(home, name)
        tail = path.read_text(errors="replace").splitlines()[-LOG_LINES:] if path.is_file() else []
        state = known.get(name, {}).get("statename", "no supervisor")
        lines = "\n".join(f"    {line}" for line in tail) or "    (empty)"
        parts.append(f"{name} did not become healthy (state {state}); the end of {path}:\n{lines}")
    return TuneyardError(
        "\n".join(parts), "correct what the log says and run `make up` again, or start over by `make down`"
    )


def _healthy(state: State, name: str) -> bool:
    address = urlsplit(_url(state, name))
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=2)
    try:
        connection.request("GET", HEALTH_PATH[name])
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _down(home: Path, state: State) -> list[str]:
    runtime = Path(state.runtime)
    known = supervisor.processes(runtime) if state.runtime else {}
    stopped = [name for name in reversed(SERVICES) if known.get(name, {}).get("pid")]
    if known:
        stopped.append("supervisor")
        pids = [process["pid"] for process in known.values() if process["pid"]]
        everything = with_children([supervisor.call(runtime, "getPID"), *pids])
        supervisor.call(runtime, "shutdown")
        wait_gone(everything, DOWN_WAIT_SECONDS)
    left = service_processes(home)
    if left:
        # The supervisor first, or it would start again what is ended below it.
        supervisors = [process for process, name in left.items() if name == "supervisor"]
        end(supervisors, grace_seconds=DOWN_WAIT_SECONDS / 2)
        end(list(left), grace_seconds=2)
        stopped += [name for name in dict.fromkeys(left.values()) if name not in stopped]
    if state.ports:
        seaweed.remove_sockets(state.ports)
    forget_runtime(state)
    return stopped


def _url(state: State, name: str) -> str:
    port = state.ports["serving" if name == "server" else name]
    return f"http://127.0.0.1:{port}"


def _log_path(home: Path, name: str) -> Path:
    return home / "logs" / f"{name}.log"
