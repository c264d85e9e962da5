"""The S3 features that the artifact store stands on, against the real server."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from botocore.exceptions import ClientError

from pipelines.embedded import seaweed
from pipelines.embedded.platform import Platform, environment

MIB = 2**20


def test_up_created_the_buckets(s3: Any) -> None:
    assert {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]} == set(seaweed.BUCKETS)


def test_a_put_that_must_be_the_first_fails_when_it_is_the_second(s3: Any) -> None:
    """The commit of a stage: of many that write the same manifest at once, exactly one succeeds."""

    def commit(number: int) -> int:
        try:
            s3.put_object(Bucket="tuneyard", Key="manifests/key", Body=str(number).encode(), IfNoneMatch="*")
        except ClientError as error:
            return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
        return 200

    s3.delete_object(Bucket="tuneyard", Key="manifests/key")
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(commit, range(8)))
    assert sorted(outcomes) == [200] + [412] * 7
    winner = outcomes.index(200)
    assert s3.get_object(Bucket="tuneyard", Key="manifests/key")["Body"].read() == str(winner).encode()


def test_a_multipart_upload_arrives_whole_or_not_at_all(s3: Any) -> None:
    parts = [os.urandom(5 * MIB), os.urandom(5 * MIB), os.urandom(12345)]
    target = {"Bucket": "models", "Key": "weights"}
    upload = s3.create_multipart_upload(**target)["UploadId"]
    sent = [
        {
            "PartNumber": number,
            "ETag": s3.upload_part(**target, UploadId=upload, PartNumber=number, Body=part)["ETag"],
        }
        for number, part in enumerate(parts, start=1)
    ]
    with pytest.raises(ClientError, match=r"404|NoSuchKey"):
        s3.head_object(**target)
    s3.complete_multipart_upload(**target, UploadId=upload, MultipartUpload={"Parts": sent})
    assert s3.get_object(**target)["Body"].read() == b"".join(parts)
    part = s3.get_object(**target, Range=f"bytes={5 * MIB - 3}-{5 * MIB + 2}")["Body"].read()
    assert part == parts[0][-3:] + parts[1][:3]


def test_an_aborted_multipart_upload_leaves_nothing(s3: Any) -> None:
    target = {"Bucket": "models", "Key": "aborted"}
    upload = s3.create_multipart_upload(**target)["UploadId"]
    s3.upload_part(**target, UploadId=upload, PartNumber=1, Body=os.urandom(5 * MIB))
    s3.abort_multipart_upload(**target, UploadId=upload)
    assert "Contents" not in s3.list_objects_v2(Bucket="models", Prefix="aborted")
    assert "Uploads" not in s3.list_multipart_uploads(Bucket="models")


def test_volumes_take_the_room_of_their_contents(running: Platform, s3: Any) -> None:
    """No preallocation: 4 MiB in, and at most 1 MiB more on the disk."""
    data = seaweed.store_folder(running.home) / "data"

    def used() -> int:
        return sum(path.stat().st_blocks * 512 for path in data.rglob("*") if path.is_file())

    before = used()
    s3.put_object(Bucket="corpora", Key="filler", Body=os.urandom(4 * MIB))
    assert 4 * MIB <= used() - before <= 5 * MIB


def test_the_environment_of_a_stage_covers_up_the_shells(running: Platform) -> None:
    """A shell with somebody's AWS account, proxy and telemetry still reaches this store, and only it."""
    shell = {
        "AWS_PROFILE": "work",
        "AWS_SESSION_TOKEN": "of somebody else",
        "AWS_SECRET_ACCESS_KEY": "of somebody else",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
        "MLFLOW_REGISTRY_URI": "http://127.0.0.1:9",
    }
    program = """
import boto3
s3 = boto3.client("s3")
s3.put_object(Bucket="tuneyard", Key="from-a-stage", Body=b"here")
print(s3.get_object(Bucket="tuneyard", Key="from-a-stage")["Body"].read().decode(), s3.meta.endpoint_url)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | shell | environment(running),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["here", running.s3_url], done.stderr
