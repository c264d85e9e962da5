"""A real cluster: the one that TUNEYARD_KFP_ENDPOINT, TUNEYARD_STORE, AWS_* and KUBECONFIG name.

    make test-cluster        # after docs/kubernetes.md, steps 1 to 3

Nothing here runs without them; what can be tried without a cluster is in tests/pipelines/cluster, tests/k8s.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid

import pytest
import yaml

from tests.pipelines.cluster.conftest import examples

WANTED = ("TUNEYARD_KFP_ENDPOINT", "TUNEYARD_STORE", "AWS_ACCESS_KEY_ID", "KUBECONFIG")


@pytest.fixture(scope="session")
def cluster():
    """(endpoint, namespace of the runs)."""
    missing = [name for name in WANTED if not os.environ.get(name)]
    if missing or not shutil.which("kubectl"):
        pytest.skip(f"no cluster: {', '.join(missing) or 'kubectl'} missing (docs/kubernetes.md, step 3)")
    from pipelines.cluster import endpoint

    there = endpoint.require()
    return there, there.namespace or "kubeflow"


@pytest.fixture(scope="session")
def kubectl(cluster):
    """Calls kubectl in the namespace of the runs and returns what it prints as JSON."""

    def call(*arguments):
        command = ["kubectl", "-n", cluster[1], *arguments, "-o", "json"]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    return call


@pytest.fixture(scope="session")
def pipeline(cluster, tiny_encoder, tmp_path_factory):
    """A small pipeline whose corpus and base model were put into the cluster's S3."""
    from components.shared import s3

    client, prefix = s3.client(3), f"t{uuid.uuid4().hex[:12]}"
    present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for bucket in {"corpora", "models"} - present:
        client.create_bucket(Bucket=bucket)
    rows = "\n".join(json.dumps(row) for row in examples(160))
    client.put_object(Bucket="corpora", Key=f"{prefix}/train.jsonl", Body=rows.encode())
    for file in tiny_encoder.iterdir():
        client.upload_file(str(file), "models", f"{prefix}/{file.name}")
    train = {"objective": "classification", "base_model": f"s3://models/{prefix}", "max_steps": 4}
    settings = {
        "name": f"little_{prefix}",
        "ingest": {"source": f"s3://corpora/{prefix}"},
        "train": train | {"per_device_batch_size": 16, "max_length": 128},
        "register": {},
        "deploy": {},
        "hardware": {"gpus_per_node": 0},  # so that any cluster will do
    }
    path = tmp_path_factory.mktemp("pipeline") / "little.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
