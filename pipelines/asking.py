"""Ask a served model a question, from the command line."""

from __future__ import annotations

import json
import sys
from typing import Any

from components.shared.errors import TuneyardError


def ask(url: str, model: str, question: str, system: str | None, max_tokens: int, as_json: bool) -> None:
    """Print what the champion answers: a causal model streams, a classifier gives its labels.

    Args:
        url: of the model server.
        model: registered name.
        question: the user's message, or the text to classify.
        system: system message for a causal model.
        max_tokens: longest answer.
        as_json: print the server's JSON instead.

    Raises:
        TuneyardError: the model is not served, or the server refuses.
    """
    import httpx

    with httpx.Client(base_url=url, timeout=300) as client:
        served = {m["id"]: m for m in client.get("/v1/models").raise_for_status().json()["data"]}
        if model not in served:
            names = ", ".join(sorted(served)) or "none"
            raise TuneyardError(
                f"{model} is not in service; in service: {names}", "submit its pipeline first"
            )
        if served[model]["task"] == "classification":
            _classify(client, model, question, as_json)
            return
        messages = ([{"role": "system", "content": system}] if system else []) + [
            {"role": "user", "content": question}
        ]
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        if as_json:
            sys.stdout.write(_checked(client.post("/v1/chat/completions", json=body)).text + "\n")
            return
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            if response.status_code != 200:
                response.read()
            for line in _checked(response).iter_lines():
                if line.startswith("data: {"):
                    sys.stdout.write(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
                    sys.stdout.flush()
        sys.stdout.write("\n")


def _classify(client: Any, model: str, text: str, as_json: bool) -> None:
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}
    answer = _checked(client.post(f"/v2/models/{model}/infer", json={"inputs": [tensor]}))
    if as_json:
        sys.stdout.write(answer.text + "\n")
        return
    outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    sys.stdout.write(f"{outputs['label'][0]} ({max(outputs['probabilities']):.3f})\n")


def _checked(response: Any) -> Any:
    if response.status_code != 200:
        raise TuneyardError(
            f"the model server answered {response.status_code}: {response.text[:300]}", "see tuneyard status"
        )
    return response
