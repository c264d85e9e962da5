"""A causal model in service: one worker thread that decodes everything that is asked, together.

A request waits in the mailbox, its prompt is read alone, then it joins the rows in decoding at the next
token and leaves when it is done: nobody waits for the longest answer of a batch.
"""

from __future__ import annotations

import gc
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from components.shared import chat
from components.shared.drift import Window
from components.shared.errors import TuneyardError
from serving import decode, sampling
from serving.answers import Job, Piece, Row
from serving.faults import Fault, Stopped
from serving.identity import Identity
from serving.mailbox import Mailbox

log = logging.getLogger("tuneyard.serving")

MAX_WAITING = 64
MAX_ROWS = 16
# What keys and values of all rows may take at their longest. Requests that do not fit beside the others wait.
CACHE_BYTES = 2 << 30
DEFAULT_MAX_TOKENS = 512
_PROBE_SECONDS = 120


class CausalModel:
    """See the module.

    Args:
        identity: name, version and digest it answers under.
        model: transformers causal model in eval mode.
        tokenizer: its tokenizer.
        inputs: what it was asked lately.
        count_tokens: called in the worker's thread with how many tokens a step generated.
    """

    task = "causal-lm"

    def __init__(
        self,
        identity: Identity,
        model: Any,
        tokenizer: Any,
        inputs: Window,
        count_tokens: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.identity, self.inputs = identity, inputs
        self._model, self._tokenizer, self._count_tokens = model, tokenizer, count_tokens
        self._tokenizing = threading.Lock()
        self._ends = chat.end_ids(tokenizer)
        self._mailbox: Mailbox[Job] = Mailbox(MAX_WAITING)
        self._rows: list[Row] = []
        self._state: decode.Rows | None = None
        self._reading = 0
        self._abort = threading.Event()
        self._slots, self.context_tokens = _room(model, self.encode_chat([{"role": "user", "content": "1"}]))
        self._worker = threading.Thread(target=self._work, name=f"decode-{identity.name}", daemon=True)
        self._worker.start()

    # --- asking; any thread ---------------------------------------------------------------------

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, as in training.

        Raises:
            Fault: 400, the model's template refuses the messages.
        """
        from jinja2 import TemplateError

        try:
            with self._tokenizing:
                return chat.prompt_ids(self._tokenizer, messages)
        except TemplateError as error:
            raise Fault(400, f"messages: the model's chat template says: {error}", "messages") from error

    def encode_text(self, text: str) -> list[int]:
        """Token ids of raw text, with the token the model expects at the start of a document."""
        with self._tokenizing:
            return list(self._tokenizer(text)["input_ids"])

    def room(self, prompt: Sequence[int], max_tokens: int | None) -> int:
        """How many tokens the answer may have: `max_tokens`, or what is left up to DEFAULT_MAX_TOKENS.

        Raises:
            Fault: 400, prompt and answer do not fit in the context together.
        """
        asked = 1 if max_tokens is None else max_tokens
        if not prompt:
            raise Fault(400, "the prompt has no tokens", "prompt", "invalid_value")
        if len(prompt) + asked > self.context_tokens:
            message = (
                f"the prompt has {len(prompt)} tokens and the answer {asked}, together more than the "
                f"context of {self.context_tokens}; shorten the prompt or lower max_tokens"
            )
            raise Fault(400, message, "messages", "context_length_exceeded")
        return max_tokens or min(DEFAULT_MAX_TOKENS, self.context_tokens - len(prompt))

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            Fault: 429, too many wait.
            Retired: the model is being replaced.
        """
        self._mailbox.put(job)

    def cancel(self, job: Job) -> None:
        """Stop working on a job: nobody waits for it any more."""
        job.cancelled.set()
        self._mailbox.discard(job)

    def probe(self) -> str:
        """Answer a question greedily, as a client would have it.

        Raises:
            TuneyardError: no answer, or one that is not finite.
        """
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        prompt = self.encode_chat([{"role": "user", "content": "1 + 1 = ?"}])
        self.submit(Job(prompt, 8, 0.0, 1.0, None, (), pieces.put))
        text = ""
        while True:
            try:
                piece = pieces.get(timeout=_PROBE_SECONDS)
            except queue.Empty as error:
                raise TuneyardError(f"{self.identity.name}: no answer in {_PROBE_SECONDS} s") from error
            text += piece.text
            if piece.error is not None:
                raise TuneyardError(f"{self.identity.name}: the probe failed: {piece.error}") from piece.error
            if piece.finish:
                return text

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._mailbox)

    @property
    def in_flight(self) -> int:
        """Requests being answered."""
        return len(self._rows) + self._reading

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._worker.is_alive()

    def close(self) -> None:
        """Accept nothing new, finish what was accepted, then free the weights. Returns at once."""
        self._mailbox.close()

    def abort(self, seconds: float) -> None:
        """Close, end unfinished answers with Stopped, and wait for the worker."""
        self._abort.set()
        self._mailbox.close()
        self._worker.join(seconds)

    # --- answering; the worker's thread -----------------------------------------------------------

    def _work(self) -> None:
        import torch

        with torch.inference_mode():
            while self._rows or not self._mailbox.exhausted:
                job = self._mailbox.take(self._fits, wait_seconds=0 if self._rows else None)
                if job is not None:
                    self._read(job)
                self._step()
        self._model = self._tokenizer = self._state = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.info("%s: freed", self.identity)

    def _fits(self, job: Job) -> bool:
        if not self._rows:
            return True
        longest = max(len(j.prompt) + j.max_tokens for j in [job, *(row.job for row in self._rows)])
        return len(self._rows) < MAX_ROWS and (len(self._rows) + 1) * longest <= self._slots

    def _read(self, job: Job) -> None:
        """Read a job's prompt and let it join, or fail it alone."""
        self._reading = 1
        try:
            for found in decode.read_prompt(self._model, job.prompt):
                if job.cancelled.is_set() or self._abort.is_set():
                    return job.send(Piece(error=Stopped()))
                if found[1].slots < len(job.prompt):
                    self._step()
            logits, state = found
            row = Row(job, self._tokenizer)
            if self._advance([row], logits)[0]:
                self._state = decode.join(self._state, state)
                self._rows.append(row)
        except Exception as error:  # of one request: it gets the answer, the model goes on with the others
            log.exception("%s: reading a prompt failed", self.identity)
            job.send(Piece(error=error))
        finally:
            self._reading = 0

    def _step(self) -> None:
        """One more token for every row."""
        self._drop([not (row.job.cancelled.is_set() or self._abort.is_set()) for row in self._rows])
        if self._state is None:
            return
        try:
            tokens = [row.last_token for row in self._rows]
            logits, self._state = decode.step(self._model, self._state, tokens)
            self._drop(self._advance(self._rows, logits))
        except Exception as error:  # out of memory, say: all rows share the state, so all of them failed
            log.exception("%s: decoding failed", self.identity)
            rows, self._rows, self._state = self._rows, [], None
            for row in rows:
                row.job.send(Piece(error=error))

    def _drop(self, stays: Sequence[bool]) -> None:
        if all(stays):
            return
        for row, stay in zip(self._rows, stays, strict=True):
            if not stay and self._abort.is_set():
                row.job.send(Piece(error=Stopped()))
        kept = [index for index, stay in enumerate(stays) if stay]
        if self._state is not None:
            self._state = decode.keep(self._state, kept)
        self._rows = [self._rows[index] for index in kept]

    def _advance(self, rows: Sequence[Row], logits: Any) -> list[bool]:
        """Choose the next token of each row and send what it gives. Returns which rows go on."""
        best, greedy = (tensor.tolist() for tensor in logits.float().max(-1))
        goes_on = []
        for index, row in enumerate(rows):
            if not abs(best[index]) < float("inf"):
                row.job.send(Piece(error=FloatingPointError(f"logits reach {best[index]}")))
                goes_on.append(False)
                continue
            token = greedy[index]
            if row.job.temperature > 0:
                on_cpu = logits[index].float().cpu()
                token = sampling.choose(on_cpu, row.job.temperature, row.job.top_p, row.generator)
            if token in self._ends:
                row.end()
                goes_on.append(False)
            else:
                self._count_tokens(1)
                goes_on.append(row.extend(token))
        return goes_on


def _room(model: Any, prompt: list[int]) -> tuple[int, int]:
    """Slots that fit in CACHE_BYTES, and the context: the model's own, or less where slots are fewer."""
    import torch

    with torch.inference_mode():
        decode.verify_joins(model, (prompt, [*prompt, *prompt]))
        *_, (_, rows) = decode.read_prompt(model, prompt)
    slots = CACHE_BYTES // decode.bytes_per_token(rows)
    return slots, min(slots, int(model.config.get_text_config().max_position_embeddings))
