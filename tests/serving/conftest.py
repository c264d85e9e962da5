"""Tiny models of every layout, and a real server process in front of a real S3 server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from components.shared import chat
from components.shared.modelcard import BaseModelRef, ModelCard
from components.shared.store import Store
from tests.tiny import tiny_gemma

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-of-the-tests"
SENTENCES = [
    "The contract is void when consent was given under threat.",
    "Profits rose by twelve percent in the third quarter.",
    "根据刑法第二百六十四条，盗窃公私财物，数额较大的，处三年以下有期徒刑。",
    "1 + 1 = ? Answer briefly. 请简要回答。",
    "oil prices fell, trade talks stall, grain exports grow",
]
LABELS = ["acq", "earn", "grain", "trade"]


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    return chat.prepare(made)


def _causal_model(tokenizer, seed, window=8):
    return tiny_gemma(
        len(tokenizer),
        seed,
        # Shorter than the prompts and answers here, so that a mistake with windows and padding shows.
        sliding_window=window,
        max_position_embeddings=512,
        # Large weights: the likeliest token leads by far more than rounding, so answers can be compared.
        initializer_range=0.3,
        # Tied, the likeliest next token would be the last one again, and every answer a repetition.
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@pytest.fixture(scope="session")
def causal_folder(tokenizer, tmp_path_factory):
    """Makes a causal model folder: `causal_folder(seed)`."""

    def make(seed: int) -> Path:
        folder = tmp_path_factory.mktemp(f"causal-{seed}")
        _causal_model(tokenizer, seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _card("causal-lm", "transformers", max_length_tokens=64, template_probe=chat.probe(tokenizer)).write(
            folder
        )
        return folder

    return make


@pytest.fixture(scope="session")
def bert_folder(tokenizer, tmp_path_factory):
    """A classifier in the transformers layout."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=len(LABELS),
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("bert")
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _card("classification", "transformers", max_length_tokens=24, labels=LABELS).write(folder)
    return folder


@pytest.fixture(scope="session")
def onnx_folder(tokenizer, tmp_path_factory):
    """A classifier in the onnx layout: logits are the masked mean of a table's rows."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    table = np.random.default_rng(5).normal(size=(len(tokenizer), len(LABELS))).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
        helper.make_node("Mul", ["rows", "wide"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "tokens"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["wide", "tokens"], ["count"], keepdims=0),
        helper.make_node("Div", ["sum", "count"], ["logits"]),
    ]
    constants = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.array([2]), "last"),
        numpy_helper.from_array(np.array([1]), "tokens"),
    ]
    ids = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["n", "t"])
        for n in ("input_ids", "attention_mask")
    ]
    out = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", len(LABELS)])]
    graph = helper.make_graph(nodes, "mean", ids, out, constants)
    folder = tmp_path_factory.mktemp("onnx")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    tokenizer.save_pretrained(folder)
    _card("classification", "onnx", max_length_tokens=24, labels=LABELS).write(folder)
    return folder


def _card(task, layout, **facts):
    base = BaseModelRef(uri="s3://models/tiny", fingerprint="0" * 64)
    return ModelCard(task=task, layout=layout, base_model=base, trainable_weights=1, total_weights=1, **facts)


def _own_store(home: Path) -> dict[str, str]:
    return {"TUNEYARD_STORE": f"s3://tuneyard/serving-{uuid.uuid4().hex[:12]}", "TUNEYARD_HOME": str(home)}


def _desire(store: Store, name: str, version: int, folder: Path) -> dict:
    manifest = store.put_tree(folder, "model")
    document = {
        "name": name,
        "version": version,
        "manifest": store.manifest_uri(manifest),
        "digest": manifest.digest,
    }
    store.write_json(f"deployments/{name}.json", document)
    return document


@pytest.fixture
def desire(store):
    """Writes the desired state: `desire(name, version, folder)` -> its document."""
    return lambda name, version, folder: _desire(store, name, version, folder)


class Server:
    """A server process of the test, and a client for it."""

    admin: ClassVar[dict[str, str]] = {"Authorization": f"Bearer {TOKEN}"}

    def __init__(self, log: Path, environment: dict[str, str] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        # One thread: on a busy machine the threads of tiny matrices only wait for each other.
        own = {"TUNEYARD_SERVING_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"} | (environment or {})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serving", "--port", str(port)],
            cwd=ROOT,
            env=os.environ | own,
            stderr=log.open("wb"),
        )
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self.wait("/healthz")

    def wait(self, path: str, seconds: float = 180) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()
            # It may not be listening yet.
            with contextlib.suppress(httpx.TransportError):
                if self.client.get(path).status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"{path} was not 200 in {seconds} s:\n{self.log.read_text()}")

    def deploy(self, name: str) -> httpx.Response:
        return self.client.post("/admin/deploy", json={"name": name}, headers=self.admin)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self.client.close()


@pytest.fixture
def start(store, tmp_path):
    """Starts servers: `start()`; they are stopped at the end."""
    servers: list[Server] = []

    def run() -> Server:
        servers.append(Server(tmp_path / f"server-{len(servers)}.log"))
        return servers[-1]

    yield run
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def shared_server(store_env, tmp_path_factory, causal_folder, bert_folder, onnx_folder):
    """One server that found a model of each layout at its start, for tests that change nothing on it."""
    home = tmp_path_factory.mktemp("shared-server")
    own = _own_store(home)
    store = Store(own["TUNEYARD_STORE"], home / "cache")
    for name, folder in {"legal": causal_folder(1), "news": onnx_folder, "news-torch": bert_folder}.items():
        _desire(store, name, 7, folder)
    server = Server(home / "server.log", own)
    server.wait("/readyz")
    yield server
    server.kill()
