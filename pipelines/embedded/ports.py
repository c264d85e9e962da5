"""Which TCP ports a home uses: found free once, remembered, and checked before anything starts."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from components.shared.errors import UsageError
from pipelines.embedded.processes import port_holder

log = logging.getLogger(__name__)

S3_PORTS = ("s3", "s3_grpc", "master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc")
PORTS_OF_SERVICE = {"s3": S3_PORTS, "server": ("serving",), "ui": ("ui",)}
PORT_NAMES = tuple(name for names in PORTS_OF_SERVICE.values() for name in names)
VARIABLE_OF_PORT = {"s3": "TUNEYARD_S3_PORT", "serving": "TUNEYARD_SERVING_PORT", "ui": "TUNEYARD_UI_PORT"}
# Below Linux's ephemeral range (32768 and up), where any outgoing connection may sit on a remembered port.
FIRST_PORT, LAST_PORT = 20_000, 31_999
PORTS_PER_HOME = 20


def is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do it: a port whose last connections merely linger (TIME_WAIT) is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def grpc_socket(name: str, port: int) -> Path:
    """The unix socket that SeaweedFS opens beside a gRPC port; it lets nobody choose another path."""
    return Path(f"/tmp/seaweedfs-{name.removesuffix('_grpc')}-grpc-{port}.sock")


def fixed_ports(environ: Mapping[str, str]) -> dict[str, int]:
    """The ports that the user fixed by TUNEYARD_S3_PORT, TUNEYARD_SERVING_PORT, TUNEYARD_UI_PORT.

    Raises:
        UsageError: values that are no port number, or one number for two services; all faults at once.
    """
    fixed: dict[str, int] = {}
    faults = []
    for name, variable in VARIABLE_OF_PORT.items():
        text = environ.get(variable, "").strip()
        if not text:
            continue
        port = int(text) if text.isascii() and text.isdigit() else 0
        if not 1 <= port <= 65535:
            faults.append(f"{variable}={text!r} is not a port number from 1 to 65535")
        elif port in fixed.values():
            other = next(VARIABLE_OF_PORT[known] for known, value in fixed.items() if value == port)
            faults.append(f"{variable}={port} is also {other}; two services cannot share a port")
        fixed[name] = port
    if faults:
        raise UsageError("; ".join(faults), "correct or unset these variables; unset, free ports are picked")
    return fixed


def settle_ports(
    home: Path, remembered: Mapping[str, int], fixed: Mapping[str, int], held: set[str], wanted: set[str]
) -> dict[str, int]:
    """Decide every port of a home, before anything starts.

    Args:
        home: spreads the first choice, so that two checkouts seldom even try the same ports.
        remembered: port by name from the last time; empty the first time.
        fixed: ports that the user insists on.
        held: services that run now, whose remembered ports are therefore busy, but by us.
        wanted: services about to be started, whose remembered ports must be free.

    Raises:
        UsageError: fixed ports that somebody else listens on, with who that is.
    """
    service_of = {port: service for service, ports in PORTS_OF_SERVICE.items() for port in ports}
    own = {name for name in PORT_NAMES if service_of[name] in held and name in remembered}
    _refuse_busy(
        {name: port for name, port in fixed.items() if not (name in own and remembered[name] == port)}
    )
    settled = dict(fixed)
    settled |= {name: remembered[name] for name in own if name not in fixed}
    candidates = _candidates(home)
    for name in PORT_NAMES:
        if name in settled:
            continue
        port = remembered.get(name, 0)
        usable = port not in settled.values() and (service_of[name] not in wanted or _usable(name, port))
        if not port or not usable:
            known = {*settled.values(), *remembered.values()}
            settled[name] = next(each for each in candidates if each not in known and _usable(name, each))
            if port:
                holder = port_holder(port)
                log.warning(
                    "port %d of %s is taken by %s; using %d instead", port, name, holder, settled[name]
                )
        else:
            settled[name] = port
    return {name: settled[name] for name in PORT_NAMES}


def _usable(name: str, port: int) -> bool:
    if name.endswith("_grpc"):
        try:
            if os.lstat(grpc_socket(name, port)).st_uid != os.getuid():
                return False  # another user's store, or somebody sitting on the name
        except FileNotFoundError:
            pass
    return is_free(port)


def _refuse_busy(fixed: Mapping[str, int]) -> None:
    faults = [
        f"{VARIABLE_OF_PORT[name]}={port} is not free: {_why_busy(port)}"
        for name, port in fixed.items()
        if not is_free(port)
    ]
    if faults:
        raise UsageError("; ".join(faults), "stop that process, choose another port, or unset the variable")


def _why_busy(port: int) -> str:
    if port < 1024:
        return f"ports below 1024 are for root, or it is held by {port_holder(port)}"
    return f"it is held by {port_holder(port)}"


def _candidates(home: Path) -> Iterator[int]:
    slots = (LAST_PORT + 1 - FIRST_PORT) // PORTS_PER_HOME
    slot = int.from_bytes(hashlib.sha256(str(home).encode("utf-8", "surrogateescape")).digest()[:8]) % slots
    span = LAST_PORT + 1 - FIRST_PORT
    for offset in range(span):
        yield FIRST_PORT + (slot * PORTS_PER_HOME + offset) % span
    raise UsageError(
        f"no free loopback port from {FIRST_PORT} to {LAST_PORT} for {home}",
        "stop some servers, or fix the ports by " + ", ".join(VARIABLE_OF_PORT.values()),
    )
