"""The Open Inference Protocol v2 routes of a real server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

TEXTS = ["Profits rose by twelve percent.", "oil", "grain exports grow " * 20, "trade talks stall"]
LABELS = ["acq", "earn", "grain", "trade"]


def infer(server, model="news", texts=TEXTS, **tensor):
    text = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": texts} | tensor
    return server.client.post(f"/v2/models/{model}/infer", json={"id": "a-1", "inputs": [text]})


def reference(folder, text):
    """Probabilities of a text by itself: transformers for the torch layout."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = tokenizer(text, truncation=True, max_length=24, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits.softmax(-1)[0].tolist()


@pytest.mark.parametrize("name", ["news", "news-torch"])
def test_an_answer_has_a_label_and_probabilities_for_each_text(shared_server, name):
    response = infer(shared_server, name)
    body = response.json()
    assert response.status_code == 200
    assert (body["model_name"], body["model_version"], body["id"]) == (name, "7", "a-1")
    assert response.headers["x-model-version"] == "7"
    label, probabilities = body["outputs"]
    assert (label["name"], label["datatype"], label["shape"]) == ("label", "BYTES", [4])
    assert (probabilities["name"], probabilities["datatype"], probabilities["shape"]) == (
        "probabilities",
        "FP32",
        [4, 4],
    )
    assert probabilities["parameters"]["labels"] == LABELS
    for i, chosen in enumerate(label["data"]):
        row = probabilities["data"][4 * i : 4 * i + 4]
        assert sum(row) == pytest.approx(1, abs=1e-6)
        assert chosen == LABELS[row.index(max(row))]
    # One of the four texts has more than the model's 24 tokens.
    assert body["parameters"]["truncated"] == 1


def test_probabilities_are_those_of_transformers(shared_server, bert_folder):
    data = infer(shared_server, "news-torch").json()["outputs"][1]["data"]
    expected = [p for text in TEXTS for p in reference(bert_folder, text)]
    # float32 sums in another order: the 6th digit.
    assert data == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("name", "tolerance"), [("news", 0.0), ("news-torch", 1e-5)])
def test_requests_that_arrive_together_get_their_own_answers(shared_server, name, tolerance):
    texts = [f"{word} number {i}" for i in range(8) for word in ("oil", "contract", "grain", "profits")]

    def ask(text):
        return infer(shared_server, name, [text]).json()["outputs"][1]["data"]

    alone = [ask(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, texts))
    assert len({tuple(row) for row in alone}) == len(texts)
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, abs=tolerance, rel=0)


def test_metadata_names_version_digest_inputs_and_outputs(shared_server):
    body = shared_server.client.get("/v2/models/news").json()
    assert (body["name"], body["versions"], body["platform"]) == ("news", ["7"], "onnx")
    assert body["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert [(o["name"], o["shape"]) for o in body["outputs"]] == [("label", [-1]), ("probabilities", [-1, 4])]
    assert len(body["parameters"]["digest"]) == 64
    causal = shared_server.client.get("/v2/models/legal").json()
    assert (causal["parameters"]["task"], causal["parameters"]["max_context_tokens"]) == ("causal-lm", 512)


def test_health_and_server_metadata(shared_server):
    get = shared_server.client.get
    assert get("/v2").json()["name"] == "tuneyard"
    assert get("/v2/health/live").status_code == get("/v2/health/ready").status_code == 200
    assert get("/v2/models/news/ready").json() == {"name": "news", "ready": True}
    assert get("/v2/models/nobody/ready").status_code == 404


def test_only_the_outputs_that_were_asked_for_are_given(shared_server):
    text = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["oil"]}
    post = shared_server.client.post
    body = post("/v2/models/news/infer", json={"inputs": [text], "outputs": [{"name": "label"}]}).json()
    assert [o["name"] for o in body["outputs"]] == ["label"]
    wrong = post("/v2/models/news/infer", json={"inputs": [text], "outputs": [{"name": "logits"}]})
    assert (wrong.status_code, "logits" in wrong.json()["error"]) == (400, True)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ({"name": "input_ids"}, "name is 'input_ids', must be 'text'"),
        ({"datatype": "FP32"}, "datatype is 'FP32', must be 'BYTES'"),
        ({"shape": [3]}, "shape is [3], must be [4] as data has 4 elements"),
        ({"shape": [2], "data": ["a", 7]}, "elements [1] are no strings"),
        ({"shape": [0], "data": []}, "0 texts, must be 1 to 1024"),
    ],
)
def test_a_wrong_tensor_is_explained(shared_server, tensor, said):
    response = infer(shared_server, **tensor)
    assert response.status_code == 400
    assert said in response.json()["error"]


def test_a_causal_model_does_not_classify(shared_server):
    response = infer(shared_server, "legal")
    assert (response.status_code, "/v1/chat/completions" in response.json()["error"]) == (400, True)


def test_truncated_inputs_are_counted(shared_server):
    infer(shared_server)
    text = shared_server.client.get("/metrics").text
    assert 'tuneyard_truncated_inputs_total{model="news",version="7"}' in text
