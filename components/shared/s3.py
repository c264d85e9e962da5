"""Talking to S3: what a URI means, a client, and its faults by name."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from components.shared.errors import StoreError, TuneyardError
from components.shared.placing import room


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/some/key` -> (`bucket`, `some/key`).

    Raises:
        TuneyardError: not an s3:// URI with a bucket.
    """
    parsed = urlparse(uri)
    if parsed.scheme != "s3" or not parsed.netloc:
        raise TuneyardError(f"{uri!r} is not an s3://bucket/key URI", "write it as s3://bucket/prefix")
    return parsed.netloc, parsed.path.lstrip("/")


def is_data_object(key: str) -> bool:
    """False for markers: objects whose last path segment is empty or starts with `_` or `.`."""
    name = key.rsplit("/", 1)[-1]
    return bool(name) and name[0] not in "_."


def client(attempts: int) -> Any:
    """A boto3 client of the S3 that the environment names; each request is tried `attempts` times.

    Made once (0.2 s) for each environment and process: threads may share one, a forked process must not use
    its parent's connections.
    """
    named = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))
    return _client(attempts, os.getpid(), named)


@functools.cache
def _client(attempts: int, process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    import boto3
    from botocore.config import Config

    # Whatever is written carries a checksum in a signed header; to hash the body for the signature as well
    # costs a second per GB and is not looked at by SeaweedFS (4.48 takes any value there).
    settings: dict[str, Any] = {"payload_signing_enabled": False}
    if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        # A store of one's own seldom has a name for each bucket.
        settings["addressing_style"] = "path"
    config = Config(
        retries={"max_attempts": attempts, "mode": "standard"}, max_pool_connections=16, s3=settings
    )
    return boto3.session.Session().client("s3", config=config)


@contextlib.contextmanager
def faults_named(doing: str) -> Iterator[None]:
    """Turn what boto3 and botocore raise into an error of ours; a decorator, too.

    Args:
        doing: what is done with the store, for the message.

    Raises:
        StoreError: the store does not answer, or refuses.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (Boto3Error, BotoCoreError, ClientError) as error:
        # A failed upload is told by boto3's own error, raised while it handled the store's answer.
        refusal = error if isinstance(error, ClientError) else error.__context__
        status = 0
        if isinstance(refusal, ClientError):
            status = refusal.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        todo = "see `tuneyard status`, start the store with `tuneyard up`, then submit again"
        if status >= 500:
            # 507, but SeaweedFS also says "internal error" when no volume takes another byte.
            home = Path(os.environ.get("TUNEYARD_HOME", "."))
            todo = f"free some disk if the store has none left ({room(home)}); else {todo}"
        raise StoreError(f"{doing}: the S3 store at {endpoint} failed ({error})", todo) from error
