"""Make the buckets that the platform writes to; those that are there stay as they are."""

from __future__ import annotations

import sys

import boto3

BUCKETS = ("corpora", "models", "tuneyard", "mlflow")


def main() -> int:
    """Make what is missing. Returns the exit code."""
    s3 = boto3.client("s3")
    present = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
    for bucket in BUCKETS:
        if bucket not in present:
            s3.create_bucket(Bucket=bucket)
            sys.stdout.write(f"made {bucket}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
