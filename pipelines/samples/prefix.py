"""A sample's place in S3: is it whole, and how it gets there.

Two objects that readers ignore tell the states apart. `_FETCHING.json` is written first and removed last;
`_SAMPLE.json` comes after every other object and names them all with size and sha256.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Literal

from components.shared import digest
from components.shared.errors import TuneyardError
from components.shared.s3 import is_data_object, split_uri
from pipelines.samples.catalogue import Sample

log = logging.getLogger("tuneyard.samples")

MARKER = "_SAMPLE.json"
STARTED = "_FETCHING.json"


def state(client: Any, sample: Sample) -> Literal["whole", "lacking", "foreign"]:
    """What lies at the sample's prefix.

    `whole`: all objects of this very recipe, by name and size. `foreign`: data that no sample put there,
    such as a user's own copy of the model; it is theirs to use and not ours to overwrite. Else `lacking`.
    """
    sizes = _sizes(client, sample)
    if MARKER not in sizes:
        foreign = STARTED not in sizes and any(is_data_object(name) for name in sizes)
        return "foreign" if foreign else "lacking"
    marker = _read_marker(client, sample)
    if marker.get("recipe") != sample.recipe:
        return "lacking"
    objects = marker["objects"]
    return "whole" if all(sizes.get(name) == entry["size"] for name, entry in objects.items()) else "lacking"


def upload(client: Any, sample: Sample, folder: Path) -> None:
    """Put the files of a folder below the prefix, read them back, then write the marker.

    Objects of an older recipe that this one does not have are removed.

    Raises:
        TuneyardError: the store gives back other bytes than it was given.
    """
    bucket, prefix = split_uri(sample.uri)
    _require_bucket(client, bucket)
    before = _read_marker(client, sample).get("objects", {})
    _put_json(client, sample, STARTED, {"recipe": sample.recipe})
    objects = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        objects[name] = {"sha256": digest.of_file(path), "size": path.stat().st_size}
        client.upload_file(str(path), bucket, prefix + name)
        stored = _stored_sha256(client, bucket, prefix + name)
        if stored != objects[name]["sha256"]:
            raise TuneyardError(
                f"{sample.uri}{name} reads back with sha256 {stored}, sent was {objects[name]['sha256']}",
                "the store damages data: look at its disk and its log",
            )
    for stale in sorted(set(before) - set(objects)):
        client.delete_object(Bucket=bucket, Key=prefix + stale)
    packages = [package.model_dump(exclude={"members", "size"}) for package in sample.packages]
    facts = {"what": sample.what, "licence": sample.licence, "recipe": sample.recipe, "packages": packages}
    _put_json(client, sample, MARKER, {**facts, "objects": objects})
    client.delete_object(Bucket=bucket, Key=prefix + STARTED)


def _sizes(client: Any, sample: Sample) -> dict[str, int]:
    bucket, prefix = split_uri(sample.uri)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    try:
        return {o["Key"][len(prefix) :]: o["Size"] for page in pages for o in page.get("Contents", [])}
    except client.exceptions.NoSuchBucket:
        return {}


def _read_marker(client: Any, sample: Sample) -> dict[str, Any]:
    bucket, prefix = split_uri(sample.uri)
    try:
        body = client.get_object(Bucket=bucket, Key=prefix + MARKER)["Body"].read()
    except client.exceptions.NoSuchKey:
        return {}
    try:
        return dict(json.loads(body))
    except ValueError:
        log.warning("%s%s is damaged; the sample is fetched again", sample.uri, MARKER)
        return {}


def _put_json(client: Any, sample: Sample, name: str, document: dict[str, Any]) -> None:
    bucket, prefix = split_uri(sample.uri)
    body = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode()
    client.put_object(Bucket=bucket, Key=prefix + name, Body=body, ContentType="application/json")


def _require_bucket(client: Any, bucket: str) -> None:
    from botocore.exceptions import ClientError

    try:
        client.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        client.create_bucket(Bucket=bucket)


def _stored_sha256(client: Any, bucket: str, key: str) -> str:
    stored = hashlib.sha256()
    for block in client.get_object(Bucket=bucket, Key=key)["Body"].iter_chunks(2**20):
        stored.update(block)
    return stored.hexdigest()
