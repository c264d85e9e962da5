"""A cluster on loopback: the endpoint with its runner, the real store, MLflow and model server behind it."""

from __future__ import annotations

import json
import random
import uuid

import pytest
import yaml

from pipelines.images import lock
from pipelines.placement import PLATFORM_VARIABLES
from tests.pipelines.cluster.kfp_server import Endpoint, serving

WORDS = {"grain": "wheat corn crop harvest tonnes", "ship": "vessel port strike cargo tanker"}


def examples(count, seed=0):
    """Labelled texts of two classes that no word is common to."""
    draw = random.Random(seed)
    labels = list(WORDS)
    return [
        {"text": " ".join(draw.choices(WORDS[labels[i % 2]].split(), k=6)) + f" {i}", "label": labels[i % 2]}
        for i in range(count)
    ]


def canary():
    """A secret that can stand nowhere by chance."""
    return f"canary{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def images(tmp_path_factory, patch):
    """A lock of images that hold the code of this tree."""
    path = tmp_path_factory.mktemp("docker") / "images.json"
    patch.setattr(lock, "PATH", path)
    names = {
        n: lock.Image(f"registry.example/{n}", f"sha256:{'0' * 64}", lock.code_digest(n)) for n in lock.NAMES
    }
    lock.write(names, path)
    return path


@pytest.fixture(scope="module")
def cluster(store_env, images, tmp_path_factory, patch):
    """The endpoint; this process's environment names it and the cluster's store."""
    folder = tmp_path_factory.mktemp("cluster")
    environment = dict(store_env)
    environment["MLFLOW_TRACKING_URI"] = environment["MLFLOW_REGISTRY_URI"] = f"sqlite:///{folder}/mlflow.db"
    endpoint = Endpoint(folder, token="a-token")
    endpoint.cluster.config_maps["tuneyard-platform"] = {
        name: environment.get(name, "") for name in PLATFORM_VARIABLES
    }
    endpoint.cluster.secrets = {
        "tuneyard-s3": {n: environment[n] for n in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")},
        "tuneyard-mlflow": {"MLFLOW_TRACKING_USERNAME": "stages", "MLFLOW_TRACKING_PASSWORD": canary()},
        "tuneyard-serving": {"TUNEYARD_SERVING_TOKEN": environment["TUNEYARD_SERVING_TOKEN"]},
        "tuneyard-notify": {"TUNEYARD_NOTIFY_URL": ""},
        "canaries": {f"key-{number}": canary() for number in range(7)},
    }
    for name, value in environment.items():
        patch.setenv(name, value)
    patch.setenv("TUNEYARD_HOME", str(folder / "home"))
    patch.setenv("TUNEYARD_KFP_TOKEN", "a-token")
    with serving(endpoint) as url:
        patch.setenv("TUNEYARD_KFP_ENDPOINT", url)
        yield endpoint


@pytest.fixture(scope="module")
def pipeline(cluster, tiny_encoder, tmp_path_factory):
    """The file of a small pipeline whose corpus and base model are in the cluster's S3."""
    from components.shared import s3

    client, prefix = s3.client(3), f"t{uuid.uuid4().hex[:12]}"
    rows = "\n".join(json.dumps(row) for row in examples(160))
    client.put_object(Bucket="corpora", Key=f"{prefix}/train.jsonl", Body=rows.encode())
    for file in tiny_encoder.iterdir():
        client.upload_file(str(file), "models", f"{prefix}/{file.name}")
    settings = {
        "name": f"little_{prefix}",
        "ingest": {"source": f"s3://corpora/{prefix}"},
        "train": {
            "objective": "classification",
            "base_model": f"s3://models/{prefix}",
            "max_steps": 4,
            "per_device_batch_size": 16,
            "max_length": 128,
        },
        "evaluate": {"per_device_batch_size": 4},
        "register": {},
        "deploy": {},
        "notify": {"on": ["done", "failed", "stopped", "no-version"]},
        "hardware": {
            "retries": 1,
            "secrets": {"canaries": {f"key-{number}": f"CANARY_{number}" for number in range(7)}},
        },
    }
    path = tmp_path_factory.mktemp("pipeline") / "little.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
