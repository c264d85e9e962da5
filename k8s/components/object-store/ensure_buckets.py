"""Make the buckets that the platform writes to; those that are there stay as they are."""

from __future__ import annotations

import os
import sys

import boto3
from botocore.exceptions import BotoCoreError, ClientError

BUCKETS = ("corpora", "models", "tuneyard", "mlflow")


def main() -> int:
    """Make what is missing. Returns the exit code."""
    s3 = boto3.client("s3")
    try:
        present = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
        for bucket in BUCKETS:
            if bucket not in present:
                s3.create_bucket(Bucket=bucket)
                sys.stdout.write(f"made {bucket}\n")
    except (BotoCoreError, ClientError) as error:
        where = os.environ.get("AWS_ENDPOINT_URL_S3", "AWS")
        sys.stderr.write(
            f"buckets cannot be made at {where}: {error}; is the store up, its key tuneyard-s3's?\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
