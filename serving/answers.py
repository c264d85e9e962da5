"""One answer in the making: what was asked, what has been generated, what was sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.assembly import Assembly


@dataclass(frozen=True)
class Piece:
    """Part of an answer.

    Args:
        text: to append; may be empty.
        tokens: generated so far, without the token that ended the answer.
        finish: `stop` or `length` on the last piece, else empty.
        error: set on the last piece of an answer that failed.
    """

    text: str = ""
    tokens: int = 0
    finish: str = ""
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether nothing comes after it."""
        return bool(self.finish) or self.error is not None


@dataclass(eq=False)
class Job:
    """One answer to generate.

    Args:
        prompt: token ids.
        max_tokens: longest answer.
        temperature: 0 is greedy.
        top_p: see sampling.choose.
        seed: of the sampling; None: another answer each time.
        stops: strings that end the answer.
        emit: gets every piece, in the worker's thread.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stops: Sequence[str]
    emit: Callable[[Piece], None]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def send(self, piece: Piece) -> None:
        """Hand a piece to whoever waits."""
        try:
            self.emit(piece)
        except RuntimeError:
            # The event loop of the client's connection has closed: nobody listens any more.
            self.cancelled.set()


class Row:
    """A job whose prompt has been read.

    Args:
        job: what was asked.
        tokenizer: of its model.
    """

    def __init__(self, job: Job, tokenizer: Any) -> None:
        import torch

        self.job = job
        self.generator = torch.Generator()
        if job.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(job.seed)
        self.last_token = 0
        self._text = Assembly(tokenizer, job.stops)
        self._tokens = 0

    def end(self) -> None:
        """The model ended the answer."""
        self.job.send(Piece(self._text.finish(), self._tokens, "stop"))

    def extend(self, token: int) -> bool:
        """Append a token and send the text it gives. Returns whether the answer goes on."""
        self.last_token = token
        self._tokens += 1
        text = self._text.push(token)
        finish = ""
        if not self._text.stopped and self._tokens == self.job.max_tokens:
            text += self._text.finish()
            finish = "length"
        if self._text.stopped:
            finish = "stop"
        if text or finish:
            self.job.send(Piece(text, self._tokens, finish))
        return not finish
