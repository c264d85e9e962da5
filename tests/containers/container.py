"""One container of an image as the cluster starts it, with runc and nothing else.

The root file system is read-only, the user is 10001, no capability is left, no new privilege can be had;
what it may write are volumes that everybody may write, as emptyDir is. It shares this machine's network,
where the tests' S3 server listens on loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

VOLUMES = ("tmp", "work")
NAMESPACES = ("pid", "ipc", "uts", "mount")


class Root:
    """The root file system of an image, mounted once for all its containers.

    Args:
        tag: of the image in buildah's store.
    """

    def __init__(self, tag: str) -> None:
        self.container = buildah("from", "--pull-never", tag)
        self.path = Path(buildah("mount", self.container))
        self.config = json.loads(buildah("inspect", "--type", "image", tag))["OCIv1"]["config"]

    def close(self) -> None:
        buildah("umount", self.container)
        buildah("rm", self.container)


def buildah(*arguments: str) -> str:
    return subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=True).stdout.strip()


class Container:
    """A container that was made, not started.

    Args:
        root: of its image.
        folder: an empty folder for its settings and its volumes.
        arguments: what to run; None: what the image says.
        environment: laid over the image's.
        volumes: paths of its volumes, without the first slash.
    """

    def __init__(
        self,
        root: Root,
        folder: Path,
        arguments: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        volumes: Sequence[str] = VOLUMES,
    ) -> None:
        self.name, self.folder = f"tuneyard-test-{uuid.uuid4().hex[:12]}", folder
        for volume in volumes:
            (folder / volume).mkdir(parents=True)
            (folder / volume).chmod(0o777)
        said = [*root.config.get("Entrypoint", []), *root.config.get("Cmd", [])]
        (folder / "config.json").write_text(
            json.dumps(_settings(root, folder, list(arguments or said), environment or {}, volumes))
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "log"

    def start(self) -> None:
        command = [
            "runc",
            "--root",
            str(self.folder / "state"),
            "run",
            "--bundle",
            str(self.folder),
            self.name,
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log.open("wb"), stderr=subprocess.STDOUT
        )

    def run(self, seconds: float = 600) -> int:
        """Start it and wait for its end. Returns the exit code."""
        self.start()
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        finally:
            self.end()

    def state(self) -> dict:
        command = ["runc", "--root", str(self.folder / "state"), "state", self.name]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def stop(self, seconds: float = 40) -> int:
        """What the kubelet does at first: SIGTERM. Returns the exit code."""
        assert self.process is not None
        os.kill(self.state()["pid"], signal.SIGTERM)
        return self.process.wait(seconds)

    def end(self) -> None:
        """Leave no process behind, whatever happened."""
        if self.process is not None and self.process.poll() is None:
            subprocess.run(
                ["runc", "--root", str(self.folder / "state"), "kill", self.name, "KILL"], capture_output=True
            )
            self.process.wait(20)

    def outside(self, path: str) -> Path:
        """Where a path below one of its volumes is on this machine."""
        return self.folder / path.lstrip("/")

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def _settings(
    root: Root, folder: Path, arguments: list[str], environment: Mapping[str, str], volumes: Sequence[str]
) -> dict:
    """The OCI runtime's settings: https://github.com/opencontainers/runtime-spec/blob/v1.0.2/config.md"""
    variables = dict(each.split("=", 1) for each in root.config["Env"]) | dict(environment)
    user, group = (int(each) for each in root.config["User"].split(":"))
    private = ["nosuid", "noexec", "nodev"]
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*private, "mode=1777"]},
        {"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "ro", *private]},
    ]
    mounts += [
        {
            "destination": f"/{volume}",
            "type": "bind",
            "source": str(folder / volume),
            "options": ["bind", "rw"],
        }
        for volume in volumes
    ]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": user, "gid": group},
            "args": arguments,
            "env": [f"{name}={value}" for name, value in variables.items()],
            "cwd": root.config["WorkingDir"],
            "capabilities": {
                each: [] for each in ("bounding", "effective", "inheritable", "permitted", "ambient")
            },
            "noNewPrivileges": True,
        },
        "root": {"path": str(root.path), "readonly": True},
        "hostname": "pod",
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": each} for each in NAMESPACES],
            "maskedPaths": ["/proc/kcore", "/proc/keys"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def wait_for(true: Callable[[], bool], container: Container, seconds: float) -> float:
    """Seconds until `true()` is; fails with the container's log."""
    started = time.monotonic()
    while not true():
        assert container.process is not None and container.process.poll() is None, container.said()
        assert time.monotonic() - started < seconds, container.said()
        time.sleep(0.05)
    return time.monotonic() - started


def answers(url: str) -> Callable[[], bool]:
    """Whether a GET of this URL is answered with 200 now: for `wait_for`."""

    def ask() -> bool:
        try:
            return httpx.get(url, timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    return ask


def missing() -> str:
    """Why containers cannot run here; empty when they can."""
    faults = [f"no {name}" for name in ("buildah", "runc", "debootstrap") if shutil.which(name) is None]
    faults += ["not root"] if os.geteuid() else []
    return ", ".join(faults)
