"""The artifact store: content-addressed files in S3, a local cache of them, and the commits of stages.

Layout of the bucket: `objects/<2>/<sha256>` the bytes, `manifests/<digest>.json` what a tree consists of,
`stages/<stage>/<key>.json` the commit of a finished stage, `runs/<run>/...` what happened in a run,
`logs/<run>/...` what its stages said (`logparts.py`), `slots/...` which run has which slot of a schedule,
`uses/<digest>.json` who relies on an artifact (`uses.py`), `damaged/objects/...` what was found with another
digest than its name says. An object is complete or absent (S3 promises that much), and a commit is written
last and once (`commit.py`). How bytes travel is told in `transfer.py`, what a node keeps of them in
`cache.py`.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from components.shared import cache, objects, prefixes, s3, transfer, uses
from components.shared.cache import Stamp
from components.shared.errors import TuneyardError
from components.shared.manifest import FileEntry, Manifest, describe
from components.shared.s3 import split_uri
from components.shared.transfer import Remote

_TRANSFERS = 4


@dataclass(frozen=True)
class Listed:
    """A name in the store, its bytes, its age by the store's clock, and a tag that changes with its bytes."""

    name: str
    size: int
    age_seconds: float
    etag: str = ""


class Store:
    """Reads and writes one bucket (and any s3:// prefix), through a cache directory with hard links.

    Every method that asks the store raises StoreError when it does not answer, or refuses.

    Args:
        root: `s3://bucket[/prefix]` of the artifact store.
        cache: local directory; may be emptied at any time nothing runs.
        attempts: at each request. Ten span the seconds in which a killed store is started again.
    """

    def __init__(self, root: str, cache: Path, attempts: int = 10) -> None:
        self.root = root.rstrip("/")
        self.bucket, self._prefix = split_uri(self.root + "/")
        self.cache = cache
        self._attempts = attempts

    def impatient(self) -> Store:
        """The same store for a caller that asks again by itself: a request fails in seconds, not a minute."""
        return Store(self.root, self.cache, attempts=2)

    @classmethod
    def from_environment(cls) -> Store:
        """The store named by TUNEYARD_STORE, cached under TUNEYARD_CACHE (or TUNEYARD_HOME/cache).

        Raises:
            TuneyardError: TUNEYARD_STORE is not set.
        """
        root = os.environ.get("TUNEYARD_STORE")
        if not root:
            raise TuneyardError("TUNEYARD_STORE is not set", "start through `tuneyard submit`, which sets it")
        home = Path(os.environ.get("TUNEYARD_HOME", ".tuneyard"))
        return cls(root, Path(os.environ.get("TUNEYARD_CACHE", home / "cache")))

    @cached_property
    def client(self) -> Any:
        """A boto3 S3 client, shared by the threads of a transfer (it is thread-safe, a session is not)."""
        return s3.client(self._attempts)

    def key(self, name: str) -> str:
        """Object key of a name inside the store's root."""
        return f"{self._prefix}{name}"

    # --- small JSON documents -------------------------------------------------------------------

    @s3.faults_named("reading a document")
    def read_json(self, name: str) -> dict[str, Any] | None:
        """The document of that name, or None when there is none."""
        try:
            body = self.client.get_object(Bucket=self.bucket, Key=self.key(name))["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None
        return json.loads(body)

    @s3.faults_named("writing a document")
    def write_json(self, name: str, document: dict[str, Any], once: bool = False) -> bool:
        """Write a document; with `once`, only when the name is free. Returns whether it was written."""
        from botocore.exceptions import ClientError

        body = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode()
        condition = {"IfNoneMatch": "*"} if once else {}
        try:
            self.client.put_object(
                Bucket=self.bucket,
                Key=self.key(name),
                Body=body,
                ContentType="application/json",
                ChecksumAlgorithm="SHA256",
                **condition,
            )
        except ClientError as error:
            if once and error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
                return False
            raise
        return True

    @s3.faults_named("removing a document")
    def remove(self, name: str) -> None:
        """Remove what has that name; nothing happens when nothing has."""
        self.client.delete_object(Bucket=self.bucket, Key=self.key(name))

    @s3.faults_named("listing names")
    def names(self, prefix: str) -> list[str]:
        """Names below a prefix of the store's root, sorted."""
        return sorted(listed.name for listed in self.listing(prefix))

    @s3.faults_named("listing names")
    def listing(self, prefix: str, since: str = "") -> list[Listed]:
        """What is below a prefix of the store's root; of names after `since` only."""
        found: list[Listed] = []
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.key(prefix), StartAfter=self.key(since) if since else ""
        )
        for page in pages:
            for item in page.get("Contents", []):
                age = _seconds_since(item["LastModified"], page)
                found.append(Listed(item["Key"][len(self._prefix) :], item["Size"], age, item["ETag"]))
        return found

    @s3.faults_named("looking for a document")
    def age(self, name: str) -> float | None:
        """How many seconds ago a document was written, by the store's own clock; None when there is none."""
        head = self._head(name)
        return None if head is None else _seconds_since(head["LastModified"], head)

    # --- trees of files ---------------------------------------------------------------------------

    @s3.faults_named("storing an artifact")
    def put_tree(
        self,
        folder: Path,
        kind: str,
        metadata: dict[str, Any] | None = None,
        made_by: dict[str, Any] | None = None,
        given: bool = False,
    ) -> Manifest:
        """Upload the files of a folder that the store lacks, then its manifest.

        Args:
            folder: stays as it is, unless it is given.
            kind: of the manifest.
            metadata: of the manifest.
            made_by: of the manifest.
            given: nobody will write to the files any more: they become those of the cache, read-only, instead
                of copies of them.

        Raises:
            TuneyardError: the folder holds no file or a symbolic link, or was written to meanwhile.
        """
        look = cache.freeze if given else cache.stamp
        stamps = {path: look(path) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
        manifest = Manifest(kind, describe(folder), metadata or {}, made_by or {})
        uses.note(manifest, self)

        def put(entry: FileEntry) -> None:
            self._put_file(folder / entry.path, entry, stamps[folder / entry.path], given)

        with ThreadPoolExecutor(_TRANSFERS) as pool:
            list(pool.map(put, manifest.files))
        self.client.put_object(
            Bucket=self.bucket,
            Key=self.key(f"manifests/{manifest.digest}.json"),
            Body=manifest.to_json().encode(),
            ChecksumAlgorithm="SHA256",
        )
        return manifest

    def manifest_uri(self, manifest: Manifest) -> str:
        """Where `put_tree` left the manifest."""
        return f"{self.root}/manifests/{manifest.digest}.json"

    @s3.faults_named("reading a manifest")
    def read_manifest(self, uri: str) -> Manifest:
        """Read a manifest by s3:// URI or local path.

        Raises:
            TuneyardError: there is none, or it is damaged.
        """
        if not uri.startswith("s3://"):
            return Manifest.from_json(Path(uri).read_text(), uri)
        bucket, key = split_uri(uri)
        try:
            body = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        except self.client.exceptions.NoSuchKey as error:
            raise TuneyardError(f"{uri} does not exist", "submit the pipeline again to remake it") from error
        return Manifest.from_json(body, uri)

    @s3.faults_named("fetching an artifact")
    def get_tree(self, manifest: Manifest, folder: Path) -> Path:
        """Lay the files of a manifest into a folder: links to the cache, read-only, and copies of small ones.

        Raises:
            TuneyardError: a file is missing in the store, or its bytes do not have the stated digest.
        """
        folder.mkdir(parents=True, exist_ok=True)
        _ = self.client  # made before threads ask for it

        def lay(entry: FileEntry) -> None:
            target = folder / entry.path
            if not target.resolve().is_relative_to(folder.resolve()):
                raise TuneyardError(
                    f"manifest names {entry.path!r}, outside its own folder", "do not use this artifact"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            remote = self._remote(entry)
            fetch = partial(objects.fetch, self.client, entry, remote)
            cache.lay(cache.obtain(self.cache, entry.sha256, fetch), target)

        with ThreadPoolExecutor(_TRANSFERS) as pool:
            list(pool.map(lay, manifest.files))
        return folder

    @s3.faults_named("looking for an artifact")
    def has_tree(self, manifest: Manifest) -> bool:
        """Whether every file of the manifest is still in the store (a deleted artifact is no cache hit).

        Who is told so may rely on it: `tuneyard gc` keeps what was asked for lately.
        """
        uses.note(manifest, self)
        with ThreadPoolExecutor(_TRANSFERS) as pool:
            return all(pool.map(self._has, manifest.files))

    def _remote(self, entry: FileEntry) -> Remote:
        return Remote(self.bucket, self.key(objects.name_of(entry.sha256)), entry.size, entry.sha256)

    def _head(self, name: str) -> dict[str, Any] | None:
        from botocore.exceptions import ClientError

        try:
            head: dict[str, Any] = self.client.head_object(Bucket=self.bucket, Key=self.key(name))
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise
        return head

    def _has(self, entry: FileEntry) -> bool:
        head = self._head(objects.name_of(entry.sha256))
        return head is not None and int(head["ContentLength"]) == entry.size

    def _put_file(self, path: Path, entry: FileEntry, seen: Stamp, given: bool) -> None:
        if not self._has(entry):
            transfer.upload(self.client, path, self._remote(entry))
        if cache.stamp(path) != seen:
            raise TuneyardError(
                f"{path} was written to while it was stored",
                "see which process of the stage outlived it; then submit again",
            )
        if given:
            cache.adopt(self.cache, entry.sha256, path, seen)
        else:
            cache.keep_copy(self.cache, entry.sha256, path)

    # --- any prefix that a user filled ------------------------------------------------------------

    @s3.faults_named("listing a prefix")
    def list_prefix(self, uri: str) -> list[dict[str, Any]]:
        """Objects at or below an s3:// URI: see `prefixes.objects`."""
        return prefixes.objects(self.client, uri)

    @s3.faults_named("fetching a prefix")
    def get_prefix(self, uri: str) -> Path:
        """Copy the objects below a URI into the cache, once for each content: see `prefixes.fetch`."""
        return prefixes.fetch(self.client, uri, self.cache / "prefixes")


def _seconds_since(written: Any, answer: dict[str, Any]) -> float:
    """Age by the clock that stamped it: that of another machine may be minutes off."""
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return float((now - written).total_seconds())
