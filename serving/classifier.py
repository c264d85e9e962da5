"""A classifier in service: one worker thread that answers what arrives together, together."""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.shared.drift import Window
from components.shared.errors import TuneyardError
from components.shared.modelcard import ModelCard
from serving.faults import Stopped
from serving.identity import Identity
from serving.mailbox import Mailbox

log = logging.getLogger("tuneyard.serving")

MAX_WAITING = 256
MAX_TEXTS = 1024
# How long the first request waits for others: below what a client notices, enough for a burst to come in.
_GATHER_SECONDS = 0.002
_GATHER_TEXTS = 64
_BATCH_TOKENS = 4096
_PROBE_SECONDS = 60

Forward = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Verdicts:
    """The answer to one request.

    Args:
        labels: one a text.
        probabilities: [texts][labels of the model], each row sums to 1.
        tokens: of each text before it was cut.
        truncated: how many texts were cut at the model's length.
        error: set when it failed; the rest is empty then.
    """

    labels: Sequence[str] = ()
    probabilities: Sequence[Sequence[float]] = ()
    tokens: Sequence[int] = ()
    truncated: int = 0
    error: Exception | None = None


@dataclass(eq=False)
class TextJob:
    """Texts of one request, and who gets their verdicts (in the worker's thread)."""

    texts: Sequence[str]
    emit: Callable[[Verdicts], None]


class Classifier:
    """See the module.

    Args:
        identity: name, version and digest it answers under.
        card: labels and length.
        tokenizer: its tokenizer.
        forward: batch of int64 numpy arrays [texts, tokens] by input name -> logits [texts, labels].
        inputs: what it was asked lately.
        platform: name of the runtime, for the metadata.
    """

    task = "classification"

    def __init__(
        self,
        identity: Identity,
        card: ModelCard,
        tokenizer: Any,
        forward: Forward,
        inputs: Window,
        platform: str,
    ) -> None:
        self.identity, self.card, self.inputs, self.platform = identity, card, inputs, platform
        self._tokenizer, self._forward = tokenizer, forward
        self._mailbox: Mailbox[TextJob] = Mailbox(MAX_WAITING)
        self._working = 0
        self._abort = threading.Event()
        self._worker = threading.Thread(target=self._work, name=f"classify-{identity.name}", daemon=True)
        self._worker.start()

    # --- asking; any thread ---------------------------------------------------------------------

    def submit(self, job: TextJob) -> None:
        """Queue a job.

        Raises:
            Fault: 429, too many wait.
            Retired: the model is being replaced.
        """
        self._mailbox.put(job)

    def cancel(self, job: TextJob) -> None:
        """Forget a job that still waits; one in the batch costs no more than to finish it."""
        self._mailbox.discard(job)

    def probe(self) -> str:
        """Classify a text, as a client would have it.

        Raises:
            TuneyardError: no verdict, or probabilities that are none.
        """
        verdicts: queue.SimpleQueue[Verdicts] = queue.SimpleQueue()
        self.submit(TextJob(["Profits rose by 12% in the third quarter."], verdicts.put))
        try:
            found = verdicts.get(timeout=_PROBE_SECONDS)
        except queue.Empty as error:
            raise TuneyardError(f"{self.identity.name}: no answer in {_PROBE_SECONDS} s") from error
        if found.error is not None:
            raise TuneyardError(f"{self.identity.name}: the probe failed: {found.error}") from found.error
        return found.labels[0]

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._mailbox)

    @property
    def in_flight(self) -> int:
        """Requests being answered."""
        return self._working

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._worker.is_alive()

    def close(self) -> None:
        """Accept nothing new, finish what was accepted, then free the weights. Returns at once."""
        self._mailbox.close()

    def abort(self, seconds: float) -> None:
        """Close, end what waits with Stopped, and wait for the worker."""
        self._abort.set()
        self._mailbox.close()
        self._worker.join(seconds)

    # --- answering; the worker's thread -----------------------------------------------------------

    def _work(self) -> None:
        while not self._mailbox.exhausted:
            jobs = self._gather()
            self._working = len(jobs)
            if self._abort.is_set():
                _send_all(jobs, [Verdicts(error=Stopped())] * len(jobs))
            elif jobs:
                self._answer(jobs)
            self._working = 0
        del self._forward, self._tokenizer
        gc.collect()
        log.info("%s: freed", self.identity)

    def _gather(self) -> list[TextJob]:
        first = self._mailbox.take(lambda job: True, wait_seconds=None)
        if first is None:
            return []
        jobs, texts = [first], len(first.texts)
        until = time.monotonic() + _GATHER_SECONDS
        while texts < _GATHER_TEXTS:
            job = self._mailbox.take(lambda job: True, wait_seconds=max(0.0, until - time.monotonic()))
            if job is None:
                break
            jobs.append(job)
            texts += len(job.texts)
        return jobs

    def _answer(self, jobs: Sequence[TextJob]) -> None:
        try:
            verdicts = self._verdicts(jobs)
        except Exception as error:  # the worker must live on for the next requests
            if len(jobs) > 1:  # it is the failure of one of them, and no matter of its neighbours
                for job in jobs:
                    self._answer([job])
                return
            log.exception("%s: classifying failed", self.identity)
            verdicts = [Verdicts(error=error)] * len(jobs)
        _send_all(jobs, verdicts)

    def _verdicts(self, jobs: Sequence[TextJob]) -> list[Verdicts]:
        rows, lengths = self._encode([text for job in jobs for text in job.texts])
        probabilities: list[list[float]] = [[] for _ in rows]
        room = 1 if self.card.one_at_a_time else _BATCH_TOKENS
        for batch in _by_length([len(row["input_ids"]) for row in rows], room):
            for index, found in zip(batch, self._probabilities([rows[i] for i in batch]), strict=True):
                probabilities[index] = found
        verdicts, at = [], 0
        for job in jobs:
            part = slice(at, at + len(job.texts))
            at += len(job.texts)
            labels = [self.card.labels[max(range(len(p)), key=p.__getitem__)] for p in probabilities[part]]
            cut = sum(length > self.card.max_length_tokens for length in lengths[part])
            verdicts.append(Verdicts(labels, probabilities[part], lengths[part], cut))
        return verdicts

    def _encode(self, texts: Sequence[str]) -> tuple[list[dict[str, list[int]]], list[int]]:
        """Token ids (and what else the tokenizer gives) of each text, and how many before a cut."""
        limit = self.card.max_length_tokens
        whole = self._tokenizer(list(texts), truncation=False, verbose=False)
        rows = [{name: whole[name][i] for name in whole} for i in range(len(texts))]
        lengths = [len(row["input_ids"]) for row in rows]
        for index in (i for i, length in enumerate(lengths) if length > limit):
            # By the tokenizer, not by slicing: it keeps the closing special token.
            short = self._tokenizer(texts[index], truncation=True, max_length=limit)
            rows[index] = {name: short[name] for name in short}
        return rows, lengths

    def _probabilities(self, rows: Sequence[Mapping[str, list[int]]]) -> list[list[float]]:
        import numpy as np

        longest = max(len(row["input_ids"]) for row in rows)
        padding = {"input_ids": self._tokenizer.pad_token_id}
        batch = {
            name: np.array(
                [[*row[name], *[padding.get(name, 0)] * (longest - len(row[name]))] for row in rows]
            )
            for name in rows[0]
        }
        logits = np.asarray(self._forward(batch), dtype=np.float64)
        if not np.isfinite(logits).all():
            raise FloatingPointError("logits are not finite")
        exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
        found: list[list[float]] = (exp / exp.sum(axis=-1, keepdims=True)).tolist()
        return found


def _by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, of at most `batch_tokens` padded tokens (one text at least)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[index] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _send_all(jobs: Sequence[TextJob], verdicts: Sequence[Verdicts]) -> None:
    for job, found in zip(jobs, verdicts, strict=True):
        try:
            job.emit(found)
        except RuntimeError:
            # The event loop of the client's connection has closed: nobody listens any more.
            log.debug("an answer had no reader")
