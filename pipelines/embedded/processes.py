"""Finding and ending the processes of one home, and only those.

Process ids in files are not trusted: after a crash or a reboot the number may belong to somebody else.
Every process started for a home carries two environment variables instead, which no other process has.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

HOME_VARIABLE = "TUNEYARD_HOME"
SERVICE_VARIABLE = "TUNEYARD_SERVICE"


def service_processes(home: Path) -> dict[psutil.Process, str]:
    """Every live process that was started as a service of `home`, with the service's name."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
        except (psutil.Error, OSError):
            continue  # it ended meanwhile, or it is somebody else's: not ours either way
        if environment.get(HOME_VARIABLE) == str(home) and SERVICE_VARIABLE in environment:
            found[process] = environment[SERVICE_VARIABLE]
    return found


def with_children(pids: Sequence[int]) -> list[psutil.Process]:
    """The processes with these ids and everything below them; ids that are gone are left out."""
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            found |= {each.pid: each for each in (process, *process.children(recursive=True))}
        except psutil.Error:
            continue
    return list(found.values())


def memory_gib(pid: int) -> float:
    """Resident memory of a process and everything below it, in GiB; 0 when it is gone."""
    total = 0
    for process in with_children([pid]):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total / 2**30


def wait_gone(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait until these processes have ended.

    Returns:
        Those that are still there after `seconds`. A zombie counts as ended: its parent may never collect it
        (common in containers), and it holds nothing.
    """
    deadline = time.monotonic() + seconds
    left = list(processes)
    while True:
        left = [process for process in left if _alive(process)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def end(processes: Sequence[psutil.Process], grace_seconds: float) -> None:
    """Ask these processes to end, and kill those that are still there after `grace_seconds`."""
    for process in processes:
        _signal(process, "terminate")
    for process in wait_gone(processes, grace_seconds):
        _signal(process, "kill")
    wait_gone(processes, 5)


def port_holder(port: int) -> str:
    """Who listens on a TCP port, in words; how to find out when the system does not tell us."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr:
                continue
            if connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                command = " ".join(process.cmdline())[:120]
                return f"{process.name()} (process {process.pid}, user {process.username()}: {command})"
    except (psutil.Error, OSError):
        pass  # other users' sockets need root, macOS asks for it always: the reader is told how to ask
    return f"a process we may not see (`sudo lsof -i :{port}` tells which)"


def _alive(process: psutil.Process) -> bool:
    try:
        # A killed process shows as a zombie while its other threads still end, and hold its ports.
        zombie = process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
        return process.is_running() and not zombie
    except psutil.Error:
        return False


def _signal(process: psutil.Process, how: str) -> None:
    try:
        getattr(process, how)()
    except psutil.NoSuchProcess:
        return  # it ended by itself, which is what was wanted
