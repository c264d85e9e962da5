"""A real model server or two in front of a real S3 server and a real registry, and tiny classifiers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from components.shared import registry
from components.shared.modelcard import BaseModelRef, ModelCard

ROOT = Path(__file__).resolve().parents[3]
TOKEN = "a-token-of-the-tests"
LABELS = ["down", "up"]


@pytest.fixture
def model_folder(tiny_tokenizer, tmp_path):
    """Makes a classifier folder: `model_folder(seed)`. Its logits are a table's row for the first token.

    With `fails_on`, those of the first token of such a text are not finite; `beside` is a file too many.
    """

    def make(seed: int, fails_on: str = "", beside: str = "") -> Path:
        folder = tmp_path / f"model-{seed}"
        folder.mkdir()
        table = np.random.default_rng(seed).normal(size=(len(tiny_tokenizer), 2)).astype(np.float32)
        if fails_on:
            table[tiny_tokenizer(fails_on)["input_ids"][0]] = np.nan
        nodes = [
            helper.make_node("Gather", ["input_ids", "first"], ["token"], axis=1),
            helper.make_node("Gather", ["table", "token"], ["logits"]),
        ]
        constants = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array(0), "first")]
        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", "t"])
        out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])
        graph = helper.make_graph(nodes, "first-token", [ids], [out], constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(made, folder / "model.onnx")
        if beside:
            (folder / beside).write_bytes(b"\x80\x04.")
        tiny_tokenizer.save_pretrained(folder)
        ModelCard(
            task="classification",
            layout="onnx",
            base_model=BaseModelRef(uri="s3://models/tiny", fingerprint="0" * 64),
            labels=LABELS,
            max_length_tokens=32,
            trainable_weights=1,
            total_weights=1,
        ).write(folder)
        return folder

    return make


@pytest.fixture
def promoted(mlflow_store, model_folder):
    """Registers a model and makes it champion: `promoted(seed)` -> its version."""

    def make(seed: int, champion: bool = True, **more: str) -> registry.RegisteredVersion:
        manifest = mlflow_store.put_tree(model_folder(seed, **more), "model")
        uri = mlflow_store.manifest_uri(manifest)
        tags = {"metrics": "{}", "digest": manifest.digest}
        version = registry.register_version("news", uri, "", tags)
        if champion:
            registry.client().set_registered_model_alias("news", registry.CHAMPION, str(version.version))
        return registry.get("news", version.version)

    return make


@pytest.fixture(scope="session")
def token():
    """Of the admin routes."""
    return TOKEN


@pytest.fixture
def serve(mlflow_store, tmp_path):
    """Starts server processes: `serve(host, port)` -> the process; they are killed at the end."""
    running = []

    def run(host: str, port: int, **environment: str) -> subprocess.Popen:
        own = {"TUNEYARD_SERVING_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"} | environment
        command = [sys.executable, "-m", "serving", "--host", host, "--port", str(port)]
        with (tmp_path / f"server-{len(running)}.log").open("wb") as log:
            running.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | own, stderr=log))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.wait(10)


@pytest.fixture
def free_port():
    """A port that is free at every address of the loopback."""
    with socket.socket() as free:
        free.bind(("0.0.0.0", 0))
        return free.getsockname()[1]


@pytest.fixture
def server_url(serve, free_port):
    """A server process."""
    serve("127.0.0.1", free_port)
    return f"http://127.0.0.1:{free_port}"
