"""The supervisor of one home: how it is configured, started, asked and changed.

The work is done by the `supervisor` package; this file writes its settings and speaks to it over its unix
socket. Its settings hold no secret: those reach the services through the process environment.
"""

from __future__ import annotations

import http.client
import os
import pwd
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xmlrpc.client import Error, Fault, ServerProxy

from components.shared.errors import TuneyardError
from pipelines.embedded.private_files import write_private
from pipelines.embedded.processes import SERVICE_VARIABLE

SOCKET = "supervisor.sock"
CHECKOUT_VARIABLE = "TUNEYARD_CHECKOUT"
ALREADY_STARTED = 60  # supervisor.xmlrpc.Faults, whose module is slow to import


@dataclass(frozen=True)
class Service:
    """One program that the supervisor keeps.

    Attributes:
        name: of the program, of its log file, and of its row in `status`.
        command: the program and its arguments.
        variables: what its environment has beyond the supervisor's; no secrets, they would be seen by `ps`.
        folder: where it starts; relative to the home, or `%(ENV_NAME)s`.
        priority: lower starts first and stops last.
        autostart: whether it runs from the start or on request only.
        stop_seconds: how long it may take to end before it is killed.
    """

    name: str
    command: Sequence[str]
    variables: Mapping[str, str]
    folder: str
    priority: int
    autostart: bool
    stop_seconds: int


def configuration(services: Sequence[Service], identifier: str) -> str:
    """The text of supervisord's configuration file, for a supervisord that starts in the home.

    Paths in it are relative: supervisor expands some of its settings twice, so that a percent sign in the
    path of a checkout has no spelling that is right everywhere.
    """
    parts = [
        "; Written by `make up`; changes are overwritten.",
        "[unix_http_server]",
        f"file = %(ENV_TUNEYARD_RUNTIME)s/{SOCKET}",
        "chmod = 0700",
        "[supervisord]",
        f"identifier = {identifier}",
        "logfile = logs/supervisor.log",
        "logfile_maxbytes = 5MB",
        "logfile_backups = 1",
        "pidfile = supervisor.pid",
        "childlogdir = logs",
        "umask = 077",
        # Saying so is how root tells supervisor that it is meant.
        *([f"user = {pwd.getpwuid(0).pw_name}"] if os.geteuid() == 0 else []),
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
    ]
    for service in services:
        variables = {SERVICE_VARIABLE: service.name, **service.variables}
        # `env` sets them and becomes the program: unlike supervisor's own `environment =`, it copes with
        # quotes and blanks in the paths of a checkout.
        command = [
            "/usr/bin/env",
            *(f"{name}={value}" for name, value in variables.items()),
            *service.command,
        ]
        parts += [
            f"[program:{service.name}]",
            f"command = {quote_command(command)}",
            f"directory = {service.folder}",
            f"priority = {service.priority}",
            f"autostart = {str(service.autostart).lower()}",
            "autorestart = true",
            f"stopwaitsecs = {service.stop_seconds}",
            "stopasgroup = true",
            "killasgroup = true",
            "redirect_stderr = true",
            f"stdout_logfile = logs/{service.name}.log",
            "stdout_logfile_maxbytes = 10MB",
            "stdout_logfile_backups = 2",
        ]
    return "\n".join(parts) + "\n"


def quote_command(arguments: Sequence[str]) -> str:
    """A command line as supervisor's configuration wants it: split like a shell's, `%` doubled.

    A blank before `;` or `#` begins a comment there, even inside quotes. Two single quotes put in between
    close and open the quotes again: the same to the shell syntax, and no blank before the mark.
    """
    joined = shlex.join(arguments).replace("%", "%%")
    return joined.replace(" ;", " '';").replace(" #", " ''#")


def call(runtime: Path, method: str, *arguments: Any) -> Any:
    """Call one method of the running supervisor (see supervisor's XML-RPC documentation).

    Raises:
        OSError, http.client.HTTPException, xmlrpc.client.Error: nobody answers, or supervisor refuses.
    """
    from supervisor.xmlrpc import SupervisorTransport

    # One connection a call: the transport cannot be used again after a failed one.
    transport = SupervisorTransport(None, None, f"unix://{runtime / SOCKET}")
    try:
        proxy = ServerProxy("http://localhost", transport=transport)
        return getattr(proxy.supervisor, method)(*arguments)
    finally:
        transport.close()


def identification(runtime: Path) -> str | None:
    """The identifier of the supervisor that answers in `runtime`; None when none does."""
    if not (runtime / SOCKET).exists():
        return None
    try:
        return str(call(runtime, "getIdentification"))
    except (OSError, http.client.HTTPException, Error):
        return None


def processes(runtime: Path) -> dict[str, dict[str, Any]]:
    """Every service by name, with its statename, pid, start, now and so on; empty when nobody answers."""
    try:
        return {str(each["name"]): each for each in call(runtime, "getAllProcessInfo")}
    except (OSError, http.client.HTTPException, Error):
        return {}


def launch(home: Path, runtime: Path, environ: Mapping[str, str], deadline: float) -> None:
    """Start supervisord with the configuration in `home`, and wait until it answers.

    It becomes a daemon in a session of its own, so neither Ctrl-C nor closing the terminal reaches it.

    Raises:
        TuneyardError: it did not start, with what it said.
    """
    (runtime / SOCKET).unlink(missing_ok=True)
    log_path = home / "logs" / "supervisor.log"
    started = subprocess.run(
        [sys.executable, "-m", "supervisor.supervisord", "-c", str(configuration_path(home))],
        env=dict(environ) | {"TUNEYARD_RUNTIME": str(runtime), SERVICE_VARIABLE: "supervisor"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=home,
        start_new_session=True,
        check=False,
    )
    while started.returncode == 0:
        if identification(runtime) is not None:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    said = started.stdout.decode(errors="replace").strip() or "it does not answer on its socket"
    raise TuneyardError(f"supervisord did not start (status {started.returncode}): {said}", f"see {log_path}")


def configuration_path(home: Path) -> Path:
    """Where supervisord's configuration lies."""
    return home / "supervisord.conf"


def apply(home: Path, runtime: Path, text: str) -> list[str]:
    """Give the running supervisor a configuration; only services whose section differs are restarted.

    Returns:
        The names of the services that were changed, added or removed.
    """
    write_private(configuration_path(home), text)
    # Asked every time, not only when the file changed: an `up` killed right here must not lose the change.
    added, changed, removed = call(runtime, "reloadConfig")[0]
    for name in (*changed, *removed):
        call(runtime, "stopProcessGroup", name)
        call(runtime, "removeProcessGroup", name)
    for name in (*changed, *added):
        call(runtime, "addProcessGroup", name)
    return [*added, *changed, *removed]


def start(runtime: Path, name: str) -> None:
    """Start one service unless it is started already.

    Raises:
        TuneyardError: supervisor refuses.
    """
    try:
        call(runtime, "startProcess", name, False)
    except Fault as fault:
        if fault.faultCode != ALREADY_STARTED:
            raise TuneyardError(f"{name} cannot be started: {fault.faultString}") from fault
