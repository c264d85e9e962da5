"""The model server as the deploy stage sees it: what it serves, load this, answer me."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import httpx

from components.shared.errors import TuneyardError

_POLL_SECONDS = 0.5
_QUESTION = "1 + 1 = ?"


@dataclass(frozen=True)
class Answer:
    """What a served model said, and under which version and digest."""

    text: str
    version: str
    digest: str


def address() -> tuple[str, str]:
    """URL and token of the model server that the environment names; '' where it names none."""
    return os.environ.get("TUNEYARD_SERVING_URL", ""), os.environ.get("TUNEYARD_SERVING_TOKEN", "")


class ModelServer:
    """A client of one server.

    Args:
        url: http:// URL of the server.
        token: of its admin routes.
        seconds: how long everything asked through this client may take together.
    """

    def __init__(self, url: str, token: str, seconds: float) -> None:
        missing = [n for n, v in (("TUNEYARD_SERVING_URL", url), ("TUNEYARD_SERVING_TOKEN", token)) if not v]
        if missing:
            raise TuneyardError(
                f"{' and '.join(missing)} not set", "start through `tuneyard`, which sets them"
            )
        self.url = url.rstrip("/")
        self._seconds = seconds
        self._until = time.monotonic() + seconds
        self.token = token

    def wait_until_alive(self) -> None:
        """Wait for a server that is still starting.

        Raises:
            TuneyardError: it does not answer in time.
        """
        while True:
            try:
                if self._call("GET", "/healthz").status_code == 200:
                    return
            except TuneyardError:
                if time.monotonic() + _POLL_SECONDS > self._until:
                    raise
            time.sleep(_POLL_SECONDS)

    def served(self) -> dict[str, dict[str, Any]]:
        """Models by name: version, digest, ready, reason, task."""
        return {model["id"]: model for model in self._done("GET", "/v1/models").json()["data"]}

    def serves(self, name: str) -> bool:
        """Whether a model is in service, after waiting for one that is on its way."""
        while True:
            state = self.served().get(name)
            if state is not None and state["reason"] != "loading":
                return bool(state["ready"])
            reasons = self._call("GET", "/readyz").json()["reasons"]
            nothing_more_to_come = reasons in ([], ["no model deployed"])
            if (state is None and nothing_more_to_come) or time.monotonic() + _POLL_SECONDS > self._until:
                return False
            time.sleep(_POLL_SECONDS)

    def load(self, name: str) -> dict[str, Any]:
        """Put the desired version of a model in service; the old one stays until it answers.

        Raises:
            TuneyardError: the server refused it, in its own words, or it took too long.
        """
        state: dict[str, Any] = self._done("POST", "/admin/deploy", json={"name": name}).json()
        return state

    def unload(self, name: str) -> None:
        """Take a model out of service."""
        self._done("DELETE", f"/admin/models/{name}")

    def ask(self, name: str, task: str) -> Answer:
        """Let the model answer a question, as any client would.

        Raises:
            TuneyardError: it does not.
        """
        if task == "causal-lm":
            message = {"role": "user", "content": _QUESTION}
            body = {"model": name, "messages": [message], "max_tokens": 16, "temperature": 0}
            response = self._done("POST", "/v1/chat/completions", json=body)
            text = response.json()["choices"][0]["message"]["content"]
        else:
            tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [_QUESTION]}
            response = self._done("POST", f"/v2/models/{name}/infer", json={"inputs": [tensor]})
            text = response.json()["outputs"][0]["data"][0]
        return Answer(text, response.headers["x-model-version"], response.headers["x-model-digest"])

    def _done(self, method: str, path: str, json: Any = None) -> httpx.Response:
        """The response of a request that must succeed; waits while the server is busy."""
        response = self._call(method, path, json)
        while response.status_code in (429, 503) and time.monotonic() + _POLL_SECONDS < self._until:
            time.sleep(_POLL_SECONDS)
            response = self._call(method, path, json)
        if response.is_success:
            return response
        todo = (
            "see `tuneyard status`"
            if response.status_code != 401
            else "use the token the server was started with"
        )
        raise TuneyardError(f"{method} {self.url}{path}: {response.status_code}, {_said(response)}", todo)

    def _call(self, method: str, path: str, json: Any = None) -> httpx.Response:
        left = max(_POLL_SECONDS, self._until - time.monotonic())
        headers = {"Authorization": f"Bearer {self.token}"} if path.startswith("/admin/") else {}
        try:
            # No proxy of the environment: the token is for the server alone.
            return httpx.request(
                method, self.url + path, json=json, headers=headers, timeout=left, trust_env=False
            )
        except httpx.TimeoutException as error:
            raise TuneyardError(
                f"{method} {self.url}{path}: no answer within deploy.ready_seconds ({self._seconds:g})",
                "raise deploy.ready_seconds, or look into the server's log",
            ) from error
        except httpx.TransportError as error:
            raise TuneyardError(
                f"{method} {self.url}{path}: the model server cannot be reached ({error})", "`tuneyard up`"
            ) from error


def _said(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return response.text[:300]
    return str(error["message"] if isinstance(error, dict) else error)
