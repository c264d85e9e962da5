"""The artifact store: content-addressed files in S3, a local cache of them, and the commits of stages.

Layout of the bucket: `objects/<2>/<sha256>` the bytes, `manifests/<digest>.json` what a tree consists of,
`stages/<stage>/<key>.json` the commit of a finished stage, `runs/<run>/...` what happened in a run,
`damaged/objects/...` what was found with another digest than its name says.
An object is complete or absent (S3 promises that much), and a commit is written last and once (`commit.py`).
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from components.shared import digest, s3
from components.shared.errors import TuneyardError
from components.shared.manifest import FileEntry, Manifest, describe
from components.shared.placing import into_place, link
from components.shared.s3 import is_data_object, split_uri

_TRANSFERS = 4


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
                Bucket=self.bucket, Key=self.key(name), Body=body, ContentType="application/json", **condition
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
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.key(prefix)
        )
        return sorted(o["Key"][len(self._prefix) :] for page in pages for o in page.get("Contents", []))

    # --- trees of files ---------------------------------------------------------------------------

    @s3.faults_named("storing an artifact")
    def put_tree(
        self,
        folder: Path,
        kind: str,
        metadata: dict[str, Any] | None = None,
        made_by: dict[str, Any] | None = None,
    ) -> Manifest:
        """Upload the files of a folder that the store lacks, then its manifest. The folder stays as it is."""
        manifest = Manifest(kind, describe(folder), metadata or {}, made_by or {})
        _ = self.client  # made before threads ask for it
        with ThreadPoolExecutor(_TRANSFERS) as pool:
            list(pool.map(lambda entry: self._put_file(folder / entry.path, entry), manifest.files))
        self.client.put_object(
            Bucket=self.bucket,
            Key=self.key(f"manifests/{manifest.digest}.json"),
            Body=manifest.to_json().encode(),
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
        """Lay the files of a manifest into a folder, by hard link from the cache where the disk allows it.

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
            link(self._cached(entry), target)

        with ThreadPoolExecutor(_TRANSFERS) as pool:
            list(pool.map(lay, manifest.files))
        return folder

    @s3.faults_named("looking for an artifact")
    def has_tree(self, manifest: Manifest) -> bool:
        """Whether every file of the manifest is still in the store (a deleted artifact is no cache hit)."""
        return all(self._has(entry) for entry in manifest.files)

    def _object_name(self, entry: FileEntry) -> str:
        return f"objects/{entry.sha256[:2]}/{entry.sha256}"

    def _has(self, entry: FileEntry) -> bool:
        from botocore.exceptions import ClientError

        try:
            head = self.client.head_object(Bucket=self.bucket, Key=self.key(self._object_name(entry)))
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return False
            raise
        return int(head["ContentLength"]) == entry.size

    def _put_file(self, path: Path, entry: FileEntry) -> None:
        if not self._has(entry):
            self.client.upload_file(str(path), self.bucket, self.key(self._object_name(entry)))
        cached = self._cache_path(entry)
        if not cached.exists():
            # Copied, not linked: a stage may still write to its own file; the cache must not follow.
            into_place(cached, lambda aside: shutil.copyfile(path, aside))

    def _cache_path(self, entry: FileEntry) -> Path:
        return self.cache / "objects" / entry.sha256[:2] / entry.sha256

    def _cached(self, entry: FileEntry) -> Path:
        path = self._cache_path(entry)
        if path.exists() and digest.of_file(path) == entry.sha256:
            return path
        path.unlink(missing_ok=True)

        def download(aside: Path) -> None:
            key = self.key(self._object_name(entry))
            try:
                self.client.download_file(self.bucket, key, str(aside))
            except self.client.exceptions.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                    raise
                raise TuneyardError(
                    f"{entry.path}: s3://{self.bucket}/{key} cannot be read ({error})",
                    "submit again to remake it",
                ) from error
            found = digest.of_file(aside)
            if found != entry.sha256:
                self._set_aside(entry)
                raise TuneyardError(
                    f"{entry.path}: s3://{self.bucket}/{key} has sha256 {found[:12]}, "
                    f"expected {entry.sha256[:12]}; it was changed or cut, and is now under damaged/",
                    "submit again: it will be made anew",
                )

        into_place(path, download)
        return path

    def _set_aside(self, entry: FileEntry) -> None:
        """Move a damaged object away: its artifact then counts as gone, its place is free for a whole one.

        It is kept, since it may have been whole and the machine that read it at fault.
        """
        name = self._object_name(entry)
        source = {"Bucket": self.bucket, "Key": self.key(name)}
        self.client.copy(source, self.bucket, self.key(f"damaged/{name}"))
        self.remove(name)

    # --- any prefix that a user filled ------------------------------------------------------------

    @s3.faults_named("listing a prefix")
    def list_prefix(self, uri: str) -> list[dict[str, Any]]:
        """Objects at or below an s3:// URI: `key`, `size` in bytes, `etag`. Markers (`_x`, `.x`) not.

        Raises:
            TuneyardError: the bucket does not exist, or nothing is there.
        """
        bucket, prefix = split_uri(uri)
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        folder = prefix.rstrip("/") + "/" if prefix else ""
        try:
            found = [o for page in pages for o in page.get("Contents", [])]
        except self.client.exceptions.NoSuchBucket as error:
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

    @s3.faults_named("fetching a prefix")
    def get_prefix(self, uri: str) -> Path:
        """Copy the objects below a URI into the cache, once for each content. Returns the folder."""
        objects = self.list_prefix(uri)
        bucket, prefix = split_uri(uri)
        folder = self.cache / "prefixes" / digest.of_value([uri, objects])
        if folder.exists():
            return folder
        base = prefix.rstrip("/") + "/"

        def download(aside: Path) -> None:
            def one(item: dict[str, Any]) -> None:
                key = item["key"]
                relative = key[len(base) :] if key.startswith(base) else key.rsplit("/", 1)[-1]
                target = aside / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                self.client.download_file(bucket, key, str(target))

            with ThreadPoolExecutor(_TRANSFERS) as pool:
                list(pool.map(one, objects))

        into_place(folder, download)
        return folder
