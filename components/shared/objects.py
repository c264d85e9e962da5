"""The objects of the store: content under its own digest, fetched whole or set aside as damaged."""

from __future__ import annotations

from typing import IO, Any

from components.shared import transfer
from components.shared.errors import TuneyardError
from components.shared.manifest import FileEntry
from components.shared.transfer import Remote

FOLDER = "objects/"
DAMAGED = "damaged/"


def name_of(sha256: str) -> str:
    """Name of an object below the store's root."""
    return f"{FOLDER}{sha256[:2]}/{sha256}"


def fetch(client: Any, entry: FileEntry, remote: Remote, stream: IO[bytes]) -> None:
    """Complete a local file with what an object holds.

    Args:
        client: a boto3 S3 client.
        entry: the file as its manifest has it.
        remote: its object.
        stream: as `transfer.receive` has it.

    Raises:
        TuneyardError: there is no such object, or it is damaged (then it is set aside).
        ClientError, BotoCoreError: the store does not answer, or refuses.
    """
    where = f"{entry.path}: s3://{remote.bucket}/{remote.key}"
    try:
        transfer.receive(client, remote, stream)
    except client.exceptions.ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        raise TuneyardError(f"{where} cannot be read ({error})", "submit again to remake it") from error
    except transfer.NotTheseBytes as error:
        _set_aside(client, entry, remote)
        raise TuneyardError(
            f"{where} has {error}, expected sha256 {entry.sha256[:12]} of {entry.size} bytes; "
            f"it was changed or cut, and is now under {DAMAGED}",
            "submit again: it will be made anew",
        ) from error


def _set_aside(client: Any, entry: FileEntry, remote: Remote) -> None:
    """Move a damaged object away: its artifact then counts as gone, its place is free for a whole one.

    It is kept, since it may have been whole and the machine that read it at fault.
    """
    name = name_of(entry.sha256)
    target = f"{remote.key.removesuffix(name)}{DAMAGED}{name}"
    client.copy({"Bucket": remote.bucket, "Key": remote.key}, remote.bucket, target)
    client.delete_object(Bucket=remote.bucket, Key=remote.key)
