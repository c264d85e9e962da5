"""Life of the server: what it loads, what it refuses, how one model replaces another, how it stops."""

from __future__ import annotations

import json
import os
import shutil
import socket
import socketserver
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

CHAT = {"messages": [{"role": "user", "content": "oil?"}], "temperature": 0}


def ask(client, name="legal", **fields):
    return client.post("/v1/chat/completions", json={"model": name, "max_tokens": 6} | CHAT | fields)


def until(reached, seconds: float = 30) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while not reached() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(reached())


def test_an_empty_server_lives_but_is_not_ready(start):
    server = start()
    assert until(lambda: server.client.get("/readyz").json()["reasons"] == ["no model deployed"])
    assert server.client.get("/readyz").status_code == 503
    assert server.client.get("/healthz").json() == {"status": "alive"}
    assert server.client.get("/v1/models").json()["data"] == []
    assert server.stop() == 0


@pytest.mark.parametrize("given", ["", "Bearer wrong", "Basic a-token-of-the-tests"])
def test_admin_routes_need_the_token(shared_server, given):
    headers = {"Authorization": given} if given else {}
    client = shared_server.client
    response = client.post("/admin/deploy", json={"name": "legal"}, headers=headers)
    assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
    assert ask(client).status_code == 200


def test_a_name_that_nobody_deployed_is_404(shared_server):
    assert shared_server.deploy("nobody").status_code == 404
    assert shared_server.deploy("../runs/x").status_code == 400


def test_a_model_can_be_taken_out_of_service(start, desire, store, onnx_folder):
    desire("news", 1, onnx_folder)
    server = start()
    server.wait("/readyz")
    store.remove("deployments/news.json")
    assert server.deploy("news").status_code == 404
    assert server.client.get("/v2/models/news").status_code == 404
    assert server.client.get("/readyz").json()["reasons"] == ["no model deployed"]


def forward(port: int, target: str) -> socketserver.ThreadingTCPServer:
    """Listen on a port and pass every connection on to `target`."""
    host, target_port = urlsplit(target).hostname, urlsplit(target).port

    def pump(source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    class Pipe(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((host, target_port)) as there:
                back = threading.Thread(target=pump, args=(there, self.request), daemon=True)
                back.start()
                pump(self.request, there)
                back.join()

    listener = socketserver.ThreadingTCPServer(("127.0.0.1", port), Pipe)
    listener.daemon_threads = True
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    return listener


def test_the_server_waits_for_the_store_and_then_loads(start, desire, onnx_folder, monkeypatch):
    desire("news", 1, onnx_folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = os.environ["AWS_ENDPOINT_URL_S3"]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    server = start()
    assert until(lambda: "cannot be listed" in server.client.get("/readyz").text)
    response = server.client.get("/v2/models/news")
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    with forward(port, target) as listener:
        server.wait("/readyz")
        listener.shutdown()
    assert server.client.get("/v2/models/news").status_code == 200


def broken_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("\\n", " "))


def changed_card(folder):
    card = json.loads((folder / "tuneyard.json").read_text())
    card["surprise"] = 1
    (folder / "tuneyard.json").write_text(json.dumps(card))


def pickled(folder):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def disguised(folder):
    (folder / "extra.json").write_bytes(b"\x80\x04\x95.")


def poisoned(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_cannot_be_trusted_is_refused_and_the_old_model_stays(
    start, desire, store, causal_folder, tmp_path
):
    good = causal_folder(1)
    first = desire("legal", 1, good)
    server = start()
    server.wait("/readyz")
    answer = ask(server.client).json()["choices"]
    cases = {
        broken_template: "the chat template gives other token ids than in training",
        changed_card: "no usable tuneyard.json",
        pickled: "['pytorch_model.bin']",
        disguised: "extra.json: no json",
        poisoned: "gives logits that are not finite",
    }
    for version, (spoil, said) in enumerate(cases.items(), 2):
        folder = tmp_path / spoil.__name__
        shutil.copytree(good, folder)
        spoil(folder)
        desire("legal", version, folder)
        response = server.deploy("legal")
        assert response.status_code == 422, (spoil.__name__, response.text)
        assert said in response.json()["error"]["message"]
        assert "Traceback" not in response.text
    after = ask(server.client)
    assert after.headers["x-model-digest"] == first["digest"]
    assert after.json()["choices"] == answer


def test_a_flipped_byte_in_the_store_is_refused(start, desire, store, onnx_folder, tmp_path):
    document = desire("news", 1, onnx_folder)
    manifest = store.read_manifest(document["manifest"])
    weights = next(entry for entry in manifest.files if entry.path == "model.onnx")
    key = store.key(f"objects/{weights.sha256[:2]}/{weights.sha256}")
    body = bytearray(store.client.get_object(Bucket=store.bucket, Key=key)["Body"].read())
    body[len(body) // 2] ^= 1
    store.client.put_object(Bucket=store.bucket, Key=key, Body=bytes(body))
    shutil.rmtree(store.cache)
    server = start()
    response = server.deploy("news")
    assert response.status_code == 422
    said = response.json()["error"]["message"]
    assert weights.sha256[:12] in said and "changed or cut" in said
    # The server may still be listing what it should load.
    assert until(lambda: server.client.get("/readyz").json()["reasons"][0].startswith("news: "))
    assert len(server.client.get("/readyz").json()["reasons"]) == 1


def test_fifty_swaps_under_load_lose_no_request(start, desire, causal_folder):
    folders = {"1": causal_folder(1), "2": causal_folder(2)}
    documents = {version: desire("legal", int(version), folder) for version, folder in folders.items()}
    server = start()
    server.wait("/readyz")
    texts: dict[str, Counter] = {"1": Counter(), "2": Counter()}
    faults: list[str] = []
    stop = threading.Event()

    def load(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            while not stop.wait(0.02):
                try:
                    response = ask(client, max_tokens=4 + number)
                    version, body = response.headers["x-model-version"], response.json()
                    if body["system_fingerprint"] != documents[version]["digest"][:12]:
                        faults.append(f"version {version} with fingerprint {body['system_fingerprint']}")
                    texts[version][number, body["choices"][0]["message"]["content"]] += 1
                except Exception as error:
                    faults.append(repr(error))

    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(load, number) for number in range(4)]
        for swap in range(50):
            version = str(swap % 2 + 1)
            desire("legal", int(version), folders[version])
            state = server.deploy("legal").json()
            assert state["version"] == version
        stop.set()
        for task in tasks:
            task.result()
    assert faults == []
    assert min(sum(texts["1"].values()), sum(texts["2"].values())) >= 20
    # Greedy: a version has one answer to a question, and it is not the other version's.
    assert len(texts["1"]) == len(texts["2"]) == 4
    assert not set(texts["1"]) & set(texts["2"])


def test_deploying_what_is_in_service_already_loads_nothing(start, desire, onnx_folder):
    desire("news", 1, onnx_folder)
    server = start()
    server.wait("/readyz")
    assert server.deploy("news").json()["loaded"] is False


def test_sigterm_loses_no_accepted_request(start, desire, causal_folder):
    desire("legal", 1, causal_folder(1))
    server = start()
    server.wait("/readyz")
    begun = threading.Barrier(7, timeout=60)

    def stream(number: int) -> str:
        body = {"model": "legal", "max_tokens": 300, "stream": True, **CHAT}
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as response:
            lines = response.iter_lines()
            first = next(lines)
            begun.wait()
            return "\n".join([first, *lines])

    with ThreadPoolExecutor(6) as pool:
        tasks = [pool.submit(stream, number) for number in range(6)]
        begun.wait()
        code = server.stop()
        answers = [task.result() for task in tasks]
    assert code == 0
    for answer in answers:
        assert '"finish_reason": "length"' in answer or '"finish_reason": "stop"' in answer
        assert answer.rstrip().endswith("data: [DONE]")
    with pytest.raises(httpx.ConnectError):
        server.client.get("/healthz")


def test_more_than_the_queue_holds_is_told_to_come_back(start, desire, causal_folder):
    desire("legal", 1, causal_folder(1))
    server = start()
    server.wait("/readyz")

    def one(number: int) -> httpx.Response:
        return ask(server.client, max_tokens=450, temperature=2, seed=number)

    with ThreadPoolExecutor(100) as pool:
        responses = list(pool.map(one, range(100)))
    statuses = Counter(response.status_code for response in responses)
    # The queue holds 64; what was taken out of it meanwhile comes on top.
    assert set(statuses) == {200, 429} and statuses[200] >= 64
    refused = next(response for response in responses if response.status_code == 429)
    assert (refused.headers["retry-after"], refused.json()["error"]["type"]) == ("1", "rate_limit_error")
