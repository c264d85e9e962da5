"""`tuneyard gc`: remove from the store what nothing wants any more (see reach.py).

Nobody who relies on an artifact can lose it meanwhile: see components/shared/uses.py for the two looks that
see each other. Documents go before what they name, so that a sweep that is killed leaves no commit without
its outputs, only objects that the next sweep finds.
"""

from __future__ import annotations

import logging
import platform as machine
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from components.shared import cache, s3
from components.shared.errors import TuneyardError
from components.shared.objects import FOLDER
from components.shared.store import Listed, Store
from components.shared.uses import SWEEP, SWEEP_ENDED_SECONDS
from pipelines import reach

log = logging.getLogger("tuneyard.gc")

_BATCH = 500
_ALIVE_SECONDS = 30.0


@dataclass(frozen=True)
class Upload:
    """A multipart upload that nobody finished: the key it was for, its id, and the bytes of its parts."""

    key: str
    upload_id: str
    size: int


@dataclass(frozen=True)
class Swept:
    """What can be removed, or was.

    Args:
        removed: names that nothing wants.
        uploads: unfinished multipart uploads older than the grace.
        wanted: what stays, of the same kinds.
        deleted: whether it is gone.
    """

    removed: list[Listed]
    uploads: list[Upload]
    wanted: list[Listed]
    deleted: bool

    def by_kind(self) -> dict[str, dict[str, int]]:
        """Kind -> counts and bytes of what is removed and of what stays."""
        rows = {
            kind: {"removed": 0, "removed_bytes": 0, "kept": 0, "kept_bytes": 0}
            for kind in (*reach.KINDS.values(), "unfinished uploads")
        }
        for column, found in (("removed", self.removed), ("kept", self.wanted)):
            for item in found:
                row = rows[reach.kind_of(item.name)]
                row[column] += 1
                row[f"{column}_bytes"] += item.size
        unfinished = rows["unfinished uploads"]
        unfinished["removed"] = len(self.uploads)
        unfinished["removed_bytes"] = sum(upload.size for upload in self.uploads)
        return rows


def look(store: Store, keep_days: float) -> Swept:
    """Say what could be removed; nothing is changed.

    Raises:
        TuneyardError: the store or MLflow does not answer, or a ledger is broken.
    """
    return _swept(store, reach.survey(store, keep_days), deleted=False)


def sweep(store: Store, keep_days: float) -> Swept:
    """Remove what nothing wants.

    Raises:
        TuneyardError: as `look`; another sweep is at work; the store refuses to remove something.
    """
    with _alone(store) as alive:
        found = _swept(store, reach.survey(store, keep_days, alive), deleted=True)
        for prefix in reach.KINDS:  # in its order: first what names, then what is named
            names = [item.name for item in found.removed if item.name.startswith(prefix)]
            _remove(store, names, alive)
        with s3.faults_named("aborting uploads"):
            for upload in found.uploads:
                alive()
                store.client.abort_multipart_upload(
                    Bucket=store.bucket, Key=upload.key, UploadId=upload.upload_id
                )
    for item in found.removed:
        if item.name.startswith(FOLDER):
            cache.forget(store.cache, item.name.rsplit("/", 1)[1])
    return found


def _swept(store: Store, survey: reach.Survey, deleted: bool) -> Swept:
    wanted = [survey.listed[name] for name in sorted(survey.wanted)]
    return Swept(survey.unwanted(), _uploads(store), wanted, deleted)


@s3.faults_named("listing unfinished uploads")
def _uploads(store: Store) -> list[Upload]:
    found = []
    lister = store.client.get_paginator("list_multipart_uploads")
    prefixes = [store.key(prefix) for prefix in (FOLDER, "work/")]
    for page in (page for p in prefixes for page in lister.paginate(Bucket=store.bucket, Prefix=p)):
        now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
        for item in page.get("Uploads", []):
            if (now - item["Initiated"]).total_seconds() >= reach.GRACE_DAYS * reach.DAY_SECONDS:
                found.append(Upload(item["Key"], item["UploadId"], _bytes_of(store, item)))
    return found


def _bytes_of(store: Store, item: dict[str, Any]) -> int:
    pages = store.client.get_paginator("list_parts").paginate(
        Bucket=store.bucket, Key=item["Key"], UploadId=item["UploadId"]
    )
    return sum(part["Size"] for page in pages for part in page.get("Parts", []))


def _remove(store: Store, names: Sequence[str], alive: Callable[[], None]) -> None:
    refused = []
    for start in range(0, len(names), _BATCH):
        alive()
        keys = [{"Key": store.key(name)} for name in names[start : start + _BATCH]]
        with s3.faults_named("removing objects"):
            answer = store.client.delete_objects(Bucket=store.bucket, Delete={"Objects": keys, "Quiet": True})
        refused += [f"{e['Key']} ({e.get('Code')}: {e.get('Message')})" for e in answer.get("Errors", [])]
    if refused:
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise TuneyardError(
            f"{store.root}: {len(refused)} of {len(names)} were not removed: {'; '.join(refused[:5])}{more}",
            "let this key delete objects there, or see the store's log; then run gc again",
        )


@contextmanager
def _alone(store: Store) -> Iterator[Callable[[], None]]:
    """Say that a sweep is at work, for as long as it is; gives a function to be called all along.

    Raises:
        TuneyardError: another one is.
    """
    ours = {"id": secrets.token_hex(8), "machine": machine.node()}
    age = store.age(SWEEP)
    if age is not None and age >= SWEEP_ENDED_SECONDS:
        log.info("a sweep that was killed %.0f s ago is taken over", age)
        store.remove(SWEEP)
    if not store.write_json(SWEEP, ours, once=True):
        other = store.read_json(SWEEP) or {}
        raise TuneyardError(
            f"{store.root}/{SWEEP}: a sweep is at work on {other.get('machine', 'another machine')}",
            f"wait for it; if it was killed, it counts as ended after {SWEEP_ENDED_SECONDS:.0f} s",
        )
    last = time.monotonic()

    def alive() -> None:
        nonlocal last
        silent = time.monotonic() - last
        if silent < _ALIVE_SECONDS:
            return
        # After a long sleep of this machine others take the sweep for ended, and rely on what we would take.
        if silent > SWEEP_ENDED_SECONDS / 2 or store.read_json(SWEEP) != ours:
            raise TuneyardError(
                f"{store.root}/{SWEEP}: this sweep was silent for {silent:.0f} s and may no longer go on",
                "run gc again",
            )
        store.write_json(SWEEP, ours)
        last = time.monotonic()

    try:
        yield alive
    finally:
        if store.read_json(SWEEP) == ours:
            store.remove(SWEEP)
