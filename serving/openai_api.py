"""The OpenAI-compatible routes: /v1/models, /v1/chat/completions, /v1/completions."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serving import faults, routing
from serving.catalogue import Catalogue
from serving.causal import CausalModel, Job, Piece
from serving.openai_requests import ChatRequest, CompletionRequest, Sampling

CLIENT_GONE = 499


@dataclass
class Answer:
    """A job that is being answered, seen from the event loop."""

    served: CausalModel
    job: Job
    pieces: asyncio.Queue[Piece]

    async def read(self) -> AsyncIterator[Piece]:
        """The pieces, in order.

        Raises:
            Exception: what the model failed with.
        """
        while True:
            piece = await self.pieces.get()
            if piece.error is not None:
                raise piece.error
            yield piece
            if piece.last:
                return

    def cancel(self) -> None:
        """Stop the computation; harmless when it is complete."""
        self.served.cancel(self.job)


async def ask(
    catalogue: Catalogue,
    request: Request,
    asked: Sampling,
    opening: str,
    encode: Callable[[CausalModel], list[int]],
) -> Answer:
    """Queue a request at the version that answers it now.

    Args:
        catalogue: the models.
        request: its headers may name a conversation or a version.
        asked: what is asked.
        opening: how the conversation began.
        encode: gives the prompt's token ids.

    Raises:
        Fault: no such model, too long, or too many wait.
    """
    loop = asyncio.get_running_loop()
    choice = routing.choice(request.headers, opening)
    while True:
        served = catalogue.causal(asked.model, choice)
        request.state.served = served.identity
        try:
            prompt = await asyncio.to_thread(encode, served)
            room = served.room(prompt, asked.max_tokens)
            pieces: asyncio.Queue[Piece] = asyncio.Queue()

            def emit(piece: Piece, pieces: asyncio.Queue[Piece] = pieces) -> None:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

            job = Job(prompt, room, asked.temperature, asked.top_p, asked.seed, asked.stop, emit)
            served.submit(job)
        except faults.Retired:
            continue
        served.inputs.observe([len(prompt)])
        return Answer(served, job, pieces)


async def until_disconnect(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def complete(request: Request, answer: Answer) -> tuple[str, Piece] | None:
    """The whole answer and its last piece; None when the client went away, which stops the computation."""

    async def gather() -> tuple[str, Piece]:
        pieces = [piece async for piece in answer.read()]
        return "".join(piece.text for piece in pieces), pieces[-1]

    work = asyncio.ensure_future(gather())
    gone = asyncio.ensure_future(until_disconnect(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        answer.cancel()
        for task in (work, gone):
            task.cancel()


class EventStream(StreamingResponse):
    """Server-sent events that stop the computation when they end, for whatever reason.

    Args:
        answer: whose pieces are sent.
        events: JSON documents to send; a failure becomes one, too.
        headers: of the response.
    """

    def __init__(
        self, answer: Answer, events: AsyncIterator[dict[str, Any]], headers: dict[str, str]
    ) -> None:
        super().__init__(
            self._lines(events),
            headers={"Cache-Control": "no-cache", **headers},
            media_type="text/event-stream",
        )
        self._answer, self._failed = answer, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Here and not in the generator: one that was never started runs no `finally`.
            self._answer.cancel()
            scope["state"]["failed"] = self._failed

    async def _lines(self, events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
        try:
            async for event in events:
                yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
        except Exception as error:  # the status line is out already: the error goes into the stream
            fault = faults.of_exception(error)
            self._failed = fault.status
            yield f"data: {json.dumps(faults.body(fault, '/v1'))}\n\n"
        yield "data: [DONE]\n\n"


@dataclass(frozen=True)
class _Shape:
    """How one of the two kinds of completion looks."""

    id_prefix: str
    whole: str
    part: str
    choice: Callable[[str], dict[str, Any]]
    delta: Callable[[str], dict[str, Any]]


_CHAT = _Shape(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {"content": text} if text else {}},
)
_TEXT = _Shape(
    "cmpl-", "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text}
)


async def respond(request: Request, asked: Sampling, answer: Answer, shape: _Shape) -> Response:
    """The answer in OpenAI's form, whole or as a stream."""
    identity = answer.served.identity
    document = {
        "id": shape.id_prefix + uuid.uuid4().hex,
        "object": shape.part if asked.stream else shape.whole,
        "created": int(time.time()),
        "model": identity.name,
        "system_fingerprint": identity.digest[:12],
    }
    if asked.stream:
        return EventStream(answer, _chunks(document, asked, answer, shape), identity.headers)
    found = await complete(request, answer)
    if found is None:
        return Response(status_code=CLIENT_GONE)
    text, last = found
    choice = {"index": 0, **shape.choice(text), "logprobs": None, "finish_reason": last.finish}
    whole = {**document, "choices": [choice], "usage": _usage(answer, last)}
    return JSONResponse(whole, headers=identity.headers)


async def _chunks(
    document: dict[str, Any], asked: Sampling, answer: Answer, shape: _Shape
) -> AsyncIterator[dict[str, Any]]:
    def chunk(part: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {**document, "choices": [{"index": 0, **part, "logprobs": None, "finish_reason": finish}]}

    if shape is _CHAT:
        yield chunk({"delta": {"role": "assistant", "content": ""}}, None)
    async for piece in answer.read():
        if piece.text:
            yield chunk(shape.delta(piece.text), None)
        if piece.last:
            yield chunk(shape.delta(""), piece.finish)
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield {**document, "choices": [], "usage": _usage(answer, piece)}


def _usage(answer: Answer, last: Piece) -> dict[str, int]:
    prompt = len(answer.job.prompt)
    return {"prompt_tokens": prompt, "completion_tokens": last.tokens, "total_tokens": prompt + last.tokens}


def router(catalogue: Catalogue) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1")
    told = ("version", "digest", "ready", "reason", "refused", "task", "canary")

    @routes.get("/models")
    def models() -> dict[str, Any]:
        """Every model that is or should be in service."""
        return {
            "object": "list",
            "data": [
                {"id": s["name"], "object": "model", "created": s["since"], "owned_by": "tuneyard"}
                | {key: s[key] for key in told}
                for s in catalogue.states()
            ],
        }

    @routes.post("/chat/completions")
    async def chat(request: Request, asked: ChatRequest) -> Response:
        """Answer a conversation."""
        messages = [{"role": message.role, "content": message.text} for message in asked.messages]
        # What every further turn sends again: the messages before the first answer.
        first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
        opening = json.dumps(messages[: first or 1])
        answer = await ask(catalogue, request, asked, opening, lambda served: served.encode_chat(messages))
        return await respond(request, asked, answer, _CHAT)

    @routes.post("/completions")
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        """Go on with a text."""
        prompt = asked.prompt
        answer = await ask(catalogue, request, asked, prompt, lambda served: served.encode_text(prompt))
        return await respond(request, asked, answer, _TEXT)

    return routes
