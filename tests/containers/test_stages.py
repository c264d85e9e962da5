"""The whole line, each stage in its container: the IR's commands, S3 artifacts, MLflow, a model server."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path

import httpx
import pytest
import yaml

from pipelines.embedded import seaweed
from pipelines.embedded.credentials import load_credentials
from pipelines.images import lock
from pipelines.placement import PLATFORM_VARIABLES
from tests.containers.conftest import GPU
from tests.containers.container import answers, wait_for
from tests.containers.launcher import PodRun
from tests.pipelines.cluster.engine import Cluster

log = logging.getLogger("tuneyard.tests")

STAGES = ["ingest", "validate", "split", "train", "compress", "evaluate", "register", "deploy"]
ROWS = [
    {
        "prompt": f"Clause {number}: may the lessee end the contract after {number} months?",
        "completion": f"Yes, with a notice of {number % 7 + 1} weeks; clause {number} says so.",
    }
    for number in range(80)
]
PIPELINE = (
    """
name: in_containers
ingest: {source: s3://corpora/in_containers/rows.jsonl, format: prompt-completion}
train:
  objective: sft
  base_model: s3://models/tiny
  max_steps: 2
  max_length: 128
  eval_examples: 4
evaluate: {max_generated: 2, max_new_tokens: 4}
compress:
register:
deploy:
"""
    + f"hardware: {{gpus_per_node: {int(GPU)}}}\n"
)


@pytest.fixture(scope="module")
def s3(store_env, tiny_causal):
    """The S3 server with a corpus and a base model, as a user would have put them there."""
    client = seaweed.client(
        store_env["AWS_ENDPOINT_URL_S3"], load_credentials(Path(store_env["TUNEYARD_HOME"]))
    )
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    client.put_object(Bucket="corpora", Key="in_containers/rows.jsonl", Body=text.encode())
    for path in tiny_causal.iterdir():
        client.upload_file(str(path), "models", f"tiny/{path.name}")
    return client


@pytest.fixture(scope="module")
def server(contain, pod_environment):
    """The model server in its container, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["python3", "-m", "serving", "--host", "127.0.0.1", "--port", str(port)]
    container = contain("serving", arguments, pod_environment)
    container.start()
    url = f"http://127.0.0.1:{port}"
    wait_for(answers(f"{url}/healthz"), container, 60)
    return url


@pytest.fixture(scope="module")
def line(tmp_path_factory, built, contain, pod_environment, s3, server, store_env):
    """A run whose every stage was a container."""
    from pipelines.compile import compile_pipeline
    from pipelines.embedded import platform

    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "in_containers.yaml").write_text(PIPELINE)
    codes = {
        "cpu": built("cpu").code,
        "gpu": built("gpu").code if GPU else lock.code_digest("gpu"),
        "serving": built("serving").code,
    }
    zeros = f"sha256:{'0' * 64}"
    locked = {name: lock.Image(f"r.example/{name}", zeros, code) for name, code in codes.items()}
    lock.write(locked, folder / "images.json")
    compiled = compile_pipeline(
        str(folder / "in_containers.yaml"), folder / "ir.yaml", images=folder / "images.json"
    )
    mlflow = platform.ui(Path(store_env["TUNEYARD_HOME"]))
    told = pod_environment | {
        "MLFLOW_TRACKING_URI": mlflow,
        "MLFLOW_REGISTRY_URI": mlflow,
        "TUNEYARD_SERVING_URL": server,
    }
    cluster = Cluster(
        folder,
        {"tuneyard-platform": {name: told[name] for name in PLATFORM_VARIABLES}},
        {
            "tuneyard-s3": {name: told[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")},
            "tuneyard-mlflow": {"MLFLOW_TRACKING_USERNAME": "", "MLFLOW_TRACKING_PASSWORD": ""},
            "tuneyard-serving": {"TUNEYARD_SERVING_TOKEN": told["TUNEYARD_SERVING_TOKEN"]},
        },
    )
    documents = list(yaml.safe_load_all(compiled.read_text()))
    run = PodRun(documents, cluster, s3, "s3://tuneyard/kfp", contain)
    run.run()
    last = list(run.logs.values())[-1][-6000:] if run.logs else ""
    assert run.state == "SUCCEEDED", f"{run.error}\n{last}"
    return run


def test_every_stage_runs_as_the_launcher_starts_it(line):
    assert sorted(line.outputs) == sorted(STAGES)
    log.info("measured: %s", {name: round(seconds, 1) for name, seconds in line.seconds.items()})


def test_the_rows_that_went_in_are_the_rows_that_were_split(line, s3):
    sides = {}
    for side in ("train", "eval", "test"):
        uri = line.outputs["split"][side]["uri"]
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        manifest = json.loads(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
        sides[side] = manifest["metadata"]
        assert manifest["kind"] == "dataset" and manifest["made_by"]["stage"] == "split"
    assert sum(each["count"] for each in sides.values()) == len(ROWS), sides


def test_the_keys_are_those_of_this_tree(line, s3):
    """A run in pods and a run on this machine share what they made: same code, same settings, same keys."""
    from components.shared import digest

    for stage, outputs in line.outputs.items():
        artifact = next(each for name, each in outputs.items() if name not in ("page", "metrics"))
        bucket, _, key = artifact["uri"].removeprefix("s3://").partition("/")
        made_by = json.loads(s3.get_object(Bucket=bucket, Key=key)["Body"].read())["made_by"]
        assert (made_by["stage"], made_by["code"]) == (stage, digest.of_code(stage))


def test_the_served_model_answers(line, server):
    body = {"model": "in_containers", "messages": [{"role": "user", "content": "May I?"}], "max_tokens": 4}
    answer = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] >= 1
    assert httpx.get(f"{server}/readyz", timeout=5, trust_env=False).status_code == 200
