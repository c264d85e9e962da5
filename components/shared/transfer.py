"""One file to or from S3: in parts, several at once, each checked, and going on where it was cut off.

Memory is a few parts, whatever the size of the file. Uploads carry the SHA-256 of each part (S3's
`x-amz-checksum-sha256`; AWS and SeaweedFS refuse a part that does not have it), and leave the parts of a
cut-off upload in the store, where the next attempt finds them (ListMultipartUploads, ListParts). Downloads
ask for ranges and append them in order, so the length of what is on disk says where to go on; the digest of
the whole is taken while the bytes pass. What was measured, and what lost, is in docs/decisions (how bytes
travel).
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from components.shared.errors import TuneyardError

log = logging.getLogger("tuneyard.store")

PART_BYTES = 16 * 2**20
_PARTS_AT_ONCE = 3
# S3 takes no more parts than this; a file over 156 GiB gets larger ones.
_MOST_PARTS = 10_000
_ATTEMPTS = 5


class NotTheseBytes(Exception):
    """What the store holds under a name is not what was asked for; the message says what it is."""


@dataclass(frozen=True)
class Remote:
    """An object to fetch.

    Args:
        bucket: its bucket.
        key: its key.
        size: in bytes.
        sha256: hex digest that its bytes must have; '' when nobody knows.
        etag: that it must still have at each range; '' for an object that cannot change.
    """

    bucket: str
    key: str
    size: int
    sha256: str = ""
    etag: str = ""


def part_bytes(size: int) -> int:
    """How large the parts of a file are: from its size alone, so that a later attempt cuts it alike."""
    least = -(-size // _MOST_PARTS)
    return max(PART_BYTES, -(-least // 2**20) * 2**20)


# --- up ---------------------------------------------------------------------------------------------


def upload(client: Any, path: Path, remote: Remote) -> None:
    """Put a file in the store, going on with the parts that a cut-off attempt has left there.

    Raises:
        ClientError, BotoCoreError: the store does not answer, or refuses.
    """
    from botocore.exceptions import ClientError

    if remote.size <= PART_BYTES:
        checksum = base64.b64encode(bytes.fromhex(remote.sha256)).decode()
        client.put_object(
            Bucket=remote.bucket, Key=remote.key, Body=path.read_bytes(), ChecksumSHA256=checksum
        )
        return
    begun, present = _begun(client, remote)
    try:
        _send_parts(client, path, remote, begun or _begin(client, remote), present)
    except ClientError as error:
        # A rival that sent the same bytes has finished this very upload, or it was aborted meanwhile, or an
        # older program began it in another way.
        gone = error.response["Error"]["Code"] == "NoSuchUpload"
        if gone and _is_there(client, remote):
            return
        if not begun and not gone:
            raise
        log.info("upload of %s cannot be gone on with (%s): begun anew", remote.key, error)
        _send_parts(client, path, remote, _begin(client, remote), [])


def _begin(client: Any, remote: Remote) -> str:
    made = client.create_multipart_upload(Bucket=remote.bucket, Key=remote.key, ChecksumAlgorithm="SHA256")
    return str(made["UploadId"])


def _begun(client: Any, remote: Remote) -> tuple[str, list[dict[str, Any]]]:
    """The newest unfinished upload of this key, and its parts; '' when there is none."""
    pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=remote.bucket, Prefix=remote.key)
    uploads = [u for page in pages for u in page.get("Uploads", []) if u["Key"] == remote.key]
    if not uploads:
        return "", []
    name = max(uploads, key=lambda u: u["Initiated"])["UploadId"]
    pages = client.get_paginator("list_parts").paginate(Bucket=remote.bucket, Key=remote.key, UploadId=name)
    return name, [part for page in pages for part in page.get("Parts", [])]


def _is_there(client: Any, remote: Remote) -> bool:
    from botocore.exceptions import ClientError

    try:
        head = client.head_object(Bucket=remote.bucket, Key=remote.key)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            return False
        raise
    return int(head["ContentLength"]) == remote.size


def _send_parts(
    client: Any, path: Path, remote: Remote, upload_id: str, present: list[dict[str, Any]]
) -> None:
    length = part_bytes(remote.size)
    where = {"Bucket": remote.bucket, "Key": remote.key, "UploadId": upload_id}
    by_number: dict[int, list[dict[str, Any]]] = {}
    for part in present:
        by_number.setdefault(part["PartNumber"], []).append(part)

    def send(number: int) -> dict[str, Any]:
        with path.open("rb") as stream:
            body = os.pread(stream.fileno(), length, (number - 1) * length)
        checksum = base64.b64encode(hashlib.sha256(body).digest()).decode()
        # SeaweedFS lists a part that was sent twice twice; which one counts is said by its ETag at the end.
        mine = [part for part in by_number.get(number, []) if _same(part, body, checksum)] or [
            client.upload_part(**where, PartNumber=number, Body=body, ChecksumSHA256=checksum)
        ]
        return {"PartNumber": number, "ETag": mine[0]["ETag"], "ChecksumSHA256": checksum}

    parts = list(_ahead(send, range(1, -(-remote.size // length) + 1)))
    client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})


def _same(part: dict[str, Any], body: bytes, checksum: str) -> bool:
    """Whether a part in the store has our bytes.

    SeaweedFS lists no checksums. An ETag is the part's MD5 but for some ways of encryption: then the part is
    sent again.
    """
    if part["Size"] != len(body):
        return False
    if "ChecksumSHA256" in part:
        return bool(part["ChecksumSHA256"] == checksum)
    return bool(part["ETag"].strip('"') == hashlib.md5(body, usedforsecurity=False).hexdigest())


# --- down -------------------------------------------------------------------------------------------


def receive(client: Any, remote: Remote, stream: IO[bytes]) -> None:
    """Append to a file what it lacks of an object, and verify the whole.

    Args:
        client: a boto3 S3 client.
        remote: the object.
        stream: opened for reading and appending; holds the beginning of the object, or nothing. Nobody else
            may write to it.

    Raises:
        NotTheseBytes: the object has another digest or length. The file is then empty.
        TuneyardError: the object was changed by someone while it was read.
        ClientError, BotoCoreError: the store does not answer, or refuses.
    """
    begun = stream.seek(0, os.SEEK_END)
    try:
        _receive(client, remote, stream)
    except NotTheseBytes:
        stream.truncate(0)
        if not begun:
            raise
        # What lay here may be at fault (a machine that lost power leaves zeros), and not the store.
        log.info("%s: what an earlier attempt left is damaged: fetched from its start", remote.key)
        try:
            _receive(client, remote, stream)
        except NotTheseBytes:
            stream.truncate(0)
            raise


def _receive(client: Any, remote: Remote, stream: IO[bytes]) -> None:
    hasher = hashlib.sha256()
    stream.seek(0)
    while remote.sha256 and (piece := stream.read(2**20)):
        hasher.update(piece)
    begun = stream.seek(0, os.SEEK_END)
    if begun > remote.size:
        raise NotTheseBytes(f"{begun} bytes are here already")
    starts = range(begun, remote.size, PART_BYTES)
    for body in _ahead(lambda start: _range(client, remote, start), starts):
        stream.write(body)
        hasher.update(body)
    stream.flush()
    if remote.sha256 and hasher.hexdigest() != remote.sha256:
        raise NotTheseBytes(f"sha256 {hasher.hexdigest()[:12]}")


def _range(client: Any, remote: Remote, start: int) -> bytes:
    """The bytes of one range. boto3 tries a request again, but not an answer that breaks off half way."""
    from botocore.exceptions import BotoCoreError, ClientError

    last = min(start + PART_BYTES, remote.size) - 1
    condition = {"IfMatch": f'"{remote.etag}"'} if remote.etag else {}
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            answer = client.get_object(
                Bucket=remote.bucket, Key=remote.key, Range=f"bytes={start}-{last}", **condition
            )
            length = int(answer["ContentRange"].rpartition("/")[2])
            if length != remote.size:
                raise NotTheseBytes(f"{length} bytes")
            return bytes(answer["Body"].read())
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == 416:
                raise NotTheseBytes(f"fewer than {start + 1} bytes") from error
            if status == 412:
                raise TuneyardError(
                    f"s3://{remote.bucket}/{remote.key} was changed while it was read",
                    "submit again when nobody writes there",
                ) from error
            raise
        except BotoCoreError as error:
            if attempt == _ATTEMPTS:
                raise
            log.info("%s from byte %d: %s; asked again", remote.key, start, error)
            time.sleep(0.2 * attempt)
    raise AssertionError("the last attempt returns or raises")


def _ahead(work: Callable[[int], Any], items: range) -> Iterator[Any]:
    """The results of `work` in order, a few of them made at once: no more than that many are in memory."""
    waiting: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(_PARTS_AT_ONCE)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) == _PARTS_AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
