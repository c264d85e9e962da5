"""Two versions share the requests: in the stated part, a conversation with one of them, all of it counted."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter

import pytest
from starlette.testclient import TestClient

from serving import app, decode
from serving.catalogue import Catalogue
from serving.routing import position

TEXT = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["oil prices"]}]}


@pytest.fixture
def serve(store, desire, tmp_path):
    """A client of two versions of one model: `serve(name, stable folder, canary folder, weight)`."""
    made: list[Catalogue] = []

    def run(name, stable, beside, weight, seconds=3600.0):
        if stable == beside:
            beside = tmp_path / "beside"
            shutil.copytree(stable, beside)
            card = beside / "tuneyard.json"
            card.write_text(card.read_text().replace('"max_length_tokens": 24', '"max_length_tokens": 23'))
        two, one = desire(name, 2, beside), desire(name, 1, stable)
        canary = {key: two[key] for key in ("version", "digest", "manifest")}
        canary |= {"weight": weight, "until": time.time() + seconds}
        store.write_json(f"deployments/{name}.json", {**one, "canary": canary})
        made.append(Catalogue(lambda: store))
        made[-1].listed({name})
        made[-1].follow(name)
        return TestClient(app.create(made[-1], "token"))

    yield run
    for catalogue in made:
        catalogue.close()


def version(client, **headers):
    response = client.post("/v2/models/news/infer", json=TEXT, headers=headers)
    assert response.status_code == 200
    assert response.json()["model_version"] == response.headers["x-model-version"]
    return response.headers["x-model-version"]


def within(count, share, of):
    """Four standard deviations of a binomial: a fair share fails this once in 16 000 times."""
    return abs(count - share * of) <= 4 * math.sqrt(of * share * (1 - share))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_positions_are_spread_evenly_and_differ_by_canary(share):
    names = [f"conversation {number}" for number in range(5000)]
    first = {name for name in names if position("a" * 64, name) < share}
    second = {name for name in names if position("b" * 64, name) < share}
    assert within(len(first), share, 5000)
    # Who tried one canary is not for that reason among those who try the next.
    assert within(len(first & second), share * share, 5000)


def test_the_canary_gets_the_share_that_was_asked(serve, onnx_folder):
    client = serve("news", onnx_folder, onnx_folder, 0.2)
    found = Counter(version(client, **{"X-Conversation-Id": f"c{n}"}) for n in range(500))
    assert set(found) == {"1", "2"}
    assert within(found["2"], 0.2, 500)
    metrics = client.get("/metrics").text
    for number, count in found.items():
        labels = f'model="news",route="/v2/models/{{name}}/infer",status="200",version="{number}"'
        counted = [line for line in metrics.splitlines() if line.startswith("tuneyard_requests_total{")]
        (line,) = [line for line in counted if all(part in line for part in labels.split(","))]
        assert float(line.split()[-1]) == count
    assert 'tuneyard_canary_weight{model="news",version="2"} 0.2' in metrics
    assert 'role="canary"' in metrics and 'role="stable"' in metrics


def test_a_conversation_stays_with_one_version(serve, onnx_folder):
    client = serve("news", onnx_folder, onnx_folder, 0.5)
    for number in range(20):
        assert len({version(client, **{"X-Conversation-Id": f"c{number}"}) for _ in range(3)}) == 1
    # Without a header, the same texts are one conversation.
    assert len({version(client) for _ in range(10)}) == 1


def test_further_turns_of_a_chat_go_where_the_first_went(serve, causal_folder):
    client = serve("legal", causal_folder(1), causal_folder(2), 0.5)
    seen = Counter()
    for number in range(16):
        messages = [{"role": "user", "content": f"oil {number}?"}]
        versions = set()
        for _ in range(3):
            body = {"model": "legal", "max_tokens": 2, "messages": messages}
            response = client.post("/v1/chat/completions", json=body)
            versions.add(response.headers["x-model-version"])
            answer = response.json()["choices"][0]["message"]
            messages = [*messages, answer, {"role": "user", "content": "and grain?"}]
        assert len(versions) == 1
        seen.update(versions)
    # All sixteen on one side: once in 32 768 times, were they drawn; they are not, so it holds for ever.
    assert set(seen) == {"1", "2"}


def test_a_client_may_ask_for_a_version(serve, onnx_folder):
    client = serve("news", onnx_folder, onnx_folder, 0.1)
    assert [version(client, **{"X-Model-Version": n}) for n in ("1", "2")] == ["1", "2"]
    response = client.post("/v2/models/news/infer", json=TEXT, headers={"X-Model-Version": "3"})
    assert response.status_code == 404
    assert response.json()["error"] == "'news' has no version '3' in service, only ['1', '2']"
    assert client.get("/v2/models/news").json()["versions"] == ["1", "2"]
    (told,) = client.get("/v1/models").json()["data"]
    assert (told["version"], told["canary"]["version"]) == ("1", "2")


def test_a_canary_whose_time_is_over_gets_nothing(serve, onnx_folder):
    client = serve("news", onnx_folder, onnx_folder, 0.5, seconds=-1)
    assert {version(client, **{"X-Conversation-Id": f"c{n}"}) for n in range(50)} == {"1"}
    assert 'tuneyard_canary_weight{model="news",version="2"} 0.0' in client.get("/metrics").text


def test_an_answer_that_breaks_off_is_counted_as_failed(serve, causal_folder, monkeypatch):
    client = serve("legal", causal_folder(1), causal_folder(2), 0.5)

    def broken(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(decode, "step", broken)
    body = {
        "model": "legal",
        "max_tokens": 20,
        "stream": True,
        "messages": [{"role": "user", "content": "?"}],
    }
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        assert "the model failed" in response.read().decode()
    failed = [line for line in client.get("/metrics").text.splitlines() if 'status="500"' in line]
    assert any('route="/v1/chat/completions"' in line and line.endswith(" 1.0") for line in failed)
