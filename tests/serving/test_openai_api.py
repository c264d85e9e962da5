"""The OpenAI-compatible routes of a real server."""

from __future__ import annotations

import json
import time

import pytest

from components.shared import causal

MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "盗窃 contract oil?"},
]


def chat(server, **fields):
    body = {"model": "legal", "messages": MESSAGES, "max_tokens": 12, "temperature": 0} | fields
    return server.client.post("/v1/chat/completions", json=body)


def events(text):
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def expected(causal_folder):
    """What transformers answers to MESSAGES (12 tokens) and to the raw prompt `oil prices` (9 tokens)."""
    import torch

    from components.shared import chat as template

    # In the precision of the server. These models prefer their tokens by far more than it rounds.
    model, tokenizer = causal.open_folder(causal_folder(1), causal.preferred_precision("auto"))
    answers = []
    for ids, length in (
        (template.prompt_ids(tokenizer, MESSAGES), 12),
        (tokenizer("oil prices")["input_ids"], 9),
    ):
        out = model.generate(torch.tensor([ids]), max_new_tokens=length, do_sample=False)
        answers.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    return {
        "chat": answers[0],
        "text": answers[1],
        "prompt_tokens": len(template.prompt_ids(tokenizer, MESSAGES)),
    }


def test_a_chat_answer_is_that_of_transformers_and_says_who_gave_it(shared_server, expected):
    response = chat(shared_server)
    body = response.json()
    assert response.status_code == 200
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": expected["chat"]},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    prompt = expected["prompt_tokens"]
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}
    assert (body["object"], body["model"]) == ("chat.completion", "legal")
    assert response.headers["x-model-version"] == "7"
    assert response.headers["x-model-digest"].startswith(body["system_fingerprint"])


def test_a_stream_adds_up_to_the_whole_answer(shared_server, expected):
    response = chat(shared_server, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last, usage = events(response.text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == expected["chat"]
    assert all(c["choices"][0]["finish_reason"] is None for c in chunks)
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 12)
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}


def test_a_completion_goes_on_with_the_raw_prompt(shared_server, expected):
    body = {"model": "legal", "prompt": "oil prices", "max_tokens": 9, "temperature": 0}
    whole = shared_server.client.post("/v1/completions", json=body).json()
    assert whole["choices"][0]["text"] == expected["text"]
    stream = events(shared_server.client.post("/v1/completions", json=body | {"stream": True}).text)
    assert "".join(c["choices"][0]["text"] for c in stream) == expected["text"]


def test_a_stop_string_ends_the_answer(shared_server, expected):
    stop = expected["chat"][4:6]
    choice = chat(shared_server, stop=stop).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == expected["chat"][: expected["chat"].index(stop)]


def test_fields_that_ask_for_nothing_are_accepted(shared_server, expected):
    neutral = {"n": 1, "frequency_penalty": 0, "logprobs": False, "user": "me", "stop": None, "tools": []}
    response = chat(shared_server, max_tokens=None, max_completion_tokens=12, **neutral)
    assert response.json()["choices"][0]["message"]["content"] == expected["chat"]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"n": 2}, "n", "Input should be 1 (given: 2)"),
        ({"logit_bias": {"3": 5}}, "logit_bias", "logit_bias: not supported"),
        ({"temperature": 3}, "temperature", "less than or equal to 2 (given: 3)"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": []}, "messages", "at least 1 item"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "messages.0.role",
            "'system', 'user' or 'assistant'",
        ),
        ({"max_tokens": 10_000}, "messages", "together more than the context of 512"),
        ({"stream_options": {"include_usage": True}}, "", "needs stream: true"),
    ],
)
def test_a_wrong_field_is_named_in_openais_form(shared_server, fields, param, said):
    response = chat(shared_server, **fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert sorted(error) == ["code", "message", "param", "type"]
    assert (error["type"], error["param"] or "") == ("invalid_request_error", param)
    assert said in error["message"]


def test_all_faults_are_said_at_once(shared_server):
    message = chat(shared_server, n=2, top_p=7).json()["error"]["message"]
    assert "n:" in message and "top_p:" in message


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_404_before_a_stream_begins(shared_server, stream):
    response = chat(shared_server, model="legla", stream=stream)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "['legal', 'news', 'news-torch']" in response.json()["error"]["message"]


def test_a_classifier_is_no_chat_model(shared_server):
    response = chat(shared_server, model="news")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "wrong_task")


def test_what_is_no_json_is_400(shared_server):
    response = shared_server.client.post("/v1/chat/completions", content=b'{"model": "legal", ')
    assert response.status_code == 400
    assert "JSON decode error" in response.json()["error"]["message"]


def test_an_unknown_route_answers_in_the_same_form(shared_server):
    response = shared_server.client.post("/v1/embeddings", json={})
    assert (response.status_code, response.json()["error"]["type"]) == (404, "invalid_request_error")
    assert shared_server.client.delete("/v1/models").status_code == 405


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_a_mebibyte_is_413(shared_server, chunked):
    body = json.dumps({"model": "legal", "messages": [{"role": "user", "content": "x" * (1 << 20)}]}).encode()
    content = iter([body[:70_000], body[70_000:]]) if chunked else body
    response = shared_server.client.post("/v1/chat/completions", content=content)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_the_list_of_models_names_version_and_digest(shared_server):
    models = {m["id"]: m for m in shared_server.client.get("/v1/models").json()["data"]}
    assert sorted(models) == ["legal", "news", "news-torch"]
    assert (models["legal"]["version"], models["legal"]["ready"], models["legal"]["task"]) == (
        "7",
        True,
        "causal-lm",
    )
    assert len(models["legal"]["digest"]) == 64


def in_flight(server):
    lines = server.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("tuneyard_in_flight{"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_the_computation(shared_server, stream):
    def generated():
        text = shared_server.client.get("/metrics").text
        return next(
            float(x.split()[-1])
            for x in text.splitlines()
            if x.startswith("tuneyard_generated_tokens_total{")
        )

    import httpx

    before = generated()
    body = {
        "model": "legal",
        "messages": MESSAGES,
        "max_tokens": 450,
        "temperature": 2,
        "stream": stream,
        "seed": 5,
    }
    with httpx.Client(base_url=shared_server.url, trust_env=False, timeout=0.2) as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=body)
    until = time.monotonic() + 10
    while in_flight(shared_server) and time.monotonic() < until:
        time.sleep(0.05)
    assert in_flight(shared_server) == 0
    assert generated() - before < 450


def test_metrics_count_requests_by_model_version_route_and_status(shared_server):
    chat(shared_server)
    text = shared_server.client.get("/metrics").text
    labels = 'model="legal",route="/v1/chat/completions",status="200",version="7"'
    assert f"tuneyard_requests_total{{{labels}}}" in text
    assert 'tuneyard_request_seconds_count{model="legal",route="/v1/chat/completions",version="7"}' in text
    assert 'tuneyard_model_info{digest="' in text
    assert 'tuneyard_queue_length{model="legal"} 0.0' in text
    chat(shared_server, model="made-up-name")
    assert "made-up-name" not in shared_server.client.get("/metrics").text
