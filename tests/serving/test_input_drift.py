"""Drift from the request to the metric: requests like those of the training, then others."""

from __future__ import annotations

import random
import re

import pytest
from starlette.testclient import TestClient

from components.shared import drift
from components.shared.modelcard import ModelCard
from serving import app
from serving.catalogue import Catalogue

WORDS = ["oil", "prices", "fell", "trade", "talks", "stall", "grain", "exports", "grow", "profits", "rose"]


def texts(draw, count, shortest, longest):
    return [" ".join(draw.choices(WORDS, k=draw.randint(shortest, longest))) for _ in range(count)]


def verdicts(client, batch, name="news"):
    """Labels, asked for in tens."""
    found = []
    for start in range(0, len(batch), 10):
        part = batch[start : start + 10]
        tensor = {"name": "text", "shape": [len(part)], "datatype": "BYTES", "data": part}
        response = client.post(f"/v2/models/{name}/infer", json={"inputs": [tensor]})
        found += response.json()["outputs"][0]["data"]
    return found


def readings(client):
    pattern = r'tuneyard_input_drift\{model="news",signal="(\w+)",version="(\d+)"\} (\S+)'
    text = client.get("/metrics").text
    return {(signal, version): float(value) for signal, version, value in re.findall(pattern, text)}


@pytest.fixture
def client(store):
    catalogue = Catalogue(lambda: store)
    catalogue.listed(set())
    yield TestClient(app.create(catalogue, "token")), catalogue
    catalogue.close()


def test_other_texts_raise_it_and_texts_like_those_of_the_training_do_not(
    client, desire, onnx_folder, tokenizer, tmp_path
):
    """Alike, its mean is 9 / 400 + 9 / 1000 = 0.03 and its deviation 0.015: 0.15 is eight of them off."""
    ask, catalogue = client
    draw = random.Random(1)
    desire("news", 1, onnx_folder)
    catalogue.follow("news")
    trained = texts(draw, 1000, 2, 20)
    labels = verdicts(ask, trained)
    assert readings(ask) == {}, "a card without a reference says nothing"
    counts = [len(ids) for ids in tokenizer(trained)["input_ids"]]
    card = ModelCard.read(onnx_folder).model_copy(update={"reference": drift.reference(counts, labels)})
    folder = tmp_path / "with-reference"
    folder.mkdir()
    for path in onnx_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    card.write(folder)
    desire("news", 2, folder)
    catalogue.follow("news")
    verdicts(ask, texts(draw, 400, 2, 20))
    alike = readings(ask)
    assert set(alike) == {("prompt_tokens", "2"), ("labels", "2")}
    assert max(alike.values()) < 0.15
    # One and the same short text, a thousand times: another length, one label.
    verdicts(ask, ["oil prices"] * 1000)
    assert min(readings(ask).values()) > 0.25


def test_prompts_of_a_chat_are_counted_in_tokens(client, store, desire, causal_folder, tmp_path):
    ask, catalogue = client
    folder = causal_folder(1)
    card = ModelCard.read(folder)
    card.model_copy(update={"reference": drift.reference([*range(5, 105)])}).write(folder)
    desire("legal", 1, folder)
    catalogue.follow("legal")
    served = catalogue.get("legal").stable.served
    body = {"model": "legal", "max_tokens": 1, "messages": [{"role": "user", "content": "oil?"}]}
    for _ in range(3):
        assert ask.post("/v1/chat/completions", json=body).status_code == 200
    length = len(served.encode_chat(body["messages"]))
    edges = catalogue.get("legal").stable.card.reference.token_edges
    expected = sum(edge < length for edge in edges)
    assert list(served.inputs._tokens) == [expected] * 3
