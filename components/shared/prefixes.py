"""Prefixes of any bucket that a user filled: their objects, and a local copy of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from components.shared import cache, digest, transfer
from components.shared.errors import TuneyardError
from components.shared.s3 import is_data_object, split_uri
from components.shared.transfer import Remote

_FILES_AT_ONCE = 4


def objects(client: Any, uri: str) -> list[dict[str, Any]]:
    """Objects at or below an s3:// URI: `key`, `size` in bytes, `etag`. Markers (`_x`, `.x`) not.

    Raises:
        TuneyardError: the bucket does not exist, or nothing is there.
    """
    bucket, prefix = split_uri(uri)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    folder = prefix.rstrip("/") + "/" if prefix else ""
    try:
        found = [o for page in pages for o in page.get("Contents", [])]
    except client.exceptions.NoSuchBucket as error:
        raise TuneyardError(
            f"{uri}: there is no bucket {bucket!r}", "check the name in the pipeline file"
        ) from error
    kept = [
        {"key": o["Key"], "size": o["Size"], "etag": o["ETag"].strip('"')}
        for o in found
        if is_data_object(o["Key"]) and (o["Key"] == prefix or o["Key"].startswith(folder))
    ]
    if not kept:
        raise TuneyardError(f"{uri}: nothing is there", "check the prefix, or upload the files first")
    return sorted(kept, key=lambda o: o["key"])


def fetch(client: Any, uri: str, folder: Path) -> Path:
    """Copy the objects below a URI into the cache, once for each content; a cut-off copy goes on.

    Args:
        client: a boto3 S3 client.
        uri: s3://bucket/prefix.
        folder: of the cache, for prefixes.

    Returns:
        The folder that holds them.

    Raises:
        TuneyardError: nothing is there, or it was changed meanwhile.
    """
    found = objects(client, uri)
    bucket, prefix = split_uri(uri)
    name = digest.of_value([uri, found])
    target = folder / name
    base = prefix.rstrip("/") + "/"

    def one(item: dict[str, Any]) -> None:
        key = item["key"]
        whole = aside / (key[len(base) :] if key.startswith(base) else key.rsplit("/", 1)[-1])
        if whole.exists():
            return
        remote = Remote(bucket, key, item["size"], etag=item["etag"])
        partial = whole.with_name(f".{whole.name}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("a+b") as stream:
            try:
                transfer.receive(client, remote, stream)
            except transfer.NotTheseBytes as error:
                raise TuneyardError(
                    f"s3://{bucket}/{key} has {error}, its listing said {item['size']}", "submit again"
                ) from error
        partial.rename(whole)

    if target.exists():
        return target
    aside = folder / f".{name}.partial"
    # One process fetches, the others wait and find it done.
    lock = folder / f".{name}.lock"
    with cache.alone(lock):
        if not target.exists():
            with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
                list(pool.map(one, found))
            aside.rename(target)
        lock.unlink()
    return target
