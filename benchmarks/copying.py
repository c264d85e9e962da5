"""Three ways to copy a folder to a bucket and back, each a pair of functions (folder, prefix)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Copy = Callable[[Path, str], None]


def boto3(bucket: str) -> tuple[Copy, Copy]:
    """boto3's managed transfers (s3transfer), four files at once, settings as they come."""
    from boto3.session import Session

    client: Any = Session().client("s3")

    def up(folder: Path, prefix: str) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(
                pool.map(lambda p: client.upload_file(str(p), bucket, f"{prefix}/{p.name}"), folder.iterdir())
            )

    def down(folder: Path, prefix: str) -> None:
        keys = [o["Key"] for o in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda k: client.download_file(bucket, k, str(folder / Path(k).name)), keys))

    return up, down


def s5cmd(bucket: str) -> tuple[Copy, Copy]:
    """s5cmd, a program in Go; settings as they come."""
    program = str(Path(sys.executable).parent / "s5cmd")
    environment = os.environ | {"S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL_S3"]}

    def copy(source: str, target: str) -> None:
        command = [program, "--log", "error", "cp", source, target]
        subprocess.run(command, env=environment, check=True)

    return (
        lambda folder, prefix: copy(f"{folder}/", f"s3://{bucket}/{prefix}/"),
        lambda folder, prefix: copy(f"s3://{bucket}/{prefix}/*", f"{folder}/"),
    )


def obstore(bucket: str) -> tuple[Copy, Copy]:
    """obstore, the object_store library of Rust, four files at once, parts of 16 MiB."""
    from obstore import get as fetch
    from obstore import list as listing
    from obstore import put as store
    from obstore.store import S3Store

    remote = S3Store(
        bucket,
        endpoint=os.environ["AWS_ENDPOINT_URL_S3"],
        region=os.environ["AWS_REGION"],
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        client_options={"allow_http": True, "timeout": "600s"},
        virtual_hosted_style_request=False,
    )

    def put(path: Path, key: str) -> None:
        store(remote, key, path, chunk_size=2**24, max_concurrency=4)

    def get(key: str, path: Path) -> None:
        with path.open("wb") as stream:
            for chunk in fetch(remote, key).stream(min_chunk_size=2**22):
                stream.write(chunk)

    def up(folder: Path, prefix: str) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda p: put(p, f"{prefix}/{p.name}"), folder.iterdir()))

    def down(folder: Path, prefix: str) -> None:
        keys = [meta["path"] for page in listing(remote, prefix) for meta in page]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda key: get(key, folder / Path(key).name), keys))

    return up, down
