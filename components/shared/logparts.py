"""The log of a stage in the store, as it grows: `logs/<run>/<time>/<stage>/<attempt>/<part>.txt`.

The API of Kubeflow Pipelines names neither the pods of a run nor their logs (kubeflow/pipelines#14007), and a
pod is soon gone. So a stage in a pod leaves what it says in the store itself: a new object every few seconds,
since an object of S3 cannot grow. The time comes first in the name so that a reader can ask for what is new;
an attempt is known by its pod.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, NamedTuple

from components.shared import s3
from components.shared.errors import StoreError, TuneyardError
from components.shared.progress import PREFIX
from components.shared.store import Store

log = logging.getLogger("tuneyard.stage")

FOLDER = "logs/"
_POD = "KFP_POD_NAME"
_CLOCK = "%Y%m%dT%H%M%S"
# Between two parts of a young attempt, and of one that has run for half an hour: 6,000 parts in two days.
_SHORTEST_SECONDS, _LONGEST_SECONDS, _SLOWDOWN = 3.0, 30.0, 60.0
# Of an attempt; of what it says beyond that only the end is kept.
_MOST_BYTES, _END_BYTES = 8 << 20, 64 << 10
# A pod that is ended has 30 seconds for all it has to do.
_PATIENCE_SECONDS = 10.0


class Part(NamedTuple):
    """What a name below FOLDER says.

    Args:
        name: all of it.
        stage: or the share of one that a pod does.
        attempt: its pod.
        number: from 1.
    """

    name: str
    stage: str
    attempt: str
    number: int


def parts(store: Store, run: str, since: str = "") -> list[Part]:
    """The parts of a run's logs, oldest first.

    Args:
        store: with the logs.
        run: its id.
        since: names after this one only.

    Raises:
        StoreError: the store does not answer.
    """
    found = []
    for name in sorted(listed.name for listed in store.listing(f"{FOLDER}{run}/", since)):
        *_, stage, attempt, number = name.split("/")
        found.append(Part(name, stage, attempt, int(number.removesuffix(".txt"))))
    return found


def before(run: str, part: Part, seconds: float) -> str:
    """A name that sorts before those of a run that were begun less than so many seconds before a part."""
    stamp = part.name.split("/")[2]
    began = datetime.strptime(stamp[:15], _CLOCK).replace(tzinfo=UTC).timestamp()
    return f"{FOLDER}{run}/{datetime.fromtimestamp(began - seconds, UTC).strftime(_CLOCK)}"


@s3.faults_named("reading a log")
def read(store: Store, part: Part) -> str:
    """The lines of a part; '' when it is gone."""
    try:
        body = store.client.get_object(Bucket=store.bucket, Key=store.key(part.name))["Body"].read()
    except store.client.exceptions.NoSuchKey:
        return ""
    return str(body.decode(errors="replace"))


@contextlib.contextmanager
def shipped(run: str, name: str) -> Iterator[None]:
    """Inside, what this process writes to stdout and stderr also goes to the store; in a pod, nowhere else.

    The work neither waits for the store nor fails with it: what could not be left there is told at the end.
    Children write to the pod's log alone.

    Args:
        run: id of the run.
        name: of the stage, or of the share of one that is done here.
    """
    pod, store = os.environ.get(_POD, ""), None
    if pod and os.environ.get("TUNEYARD_STORE"):
        with contextlib.suppress(TuneyardError):  # the work needs it too, and says better what is wrong
            store = Store.from_environment().impatient()
    if store is None:
        yield
        return
    said: deque[str] = deque()
    shipping = _Shipping(store, f"{name}/{pod}", run, said)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Tee(stream, said) for stream in streams)
    shipping.start()
    try:
        yield
    except Exception:
        # Whoever called us prints it, when nobody listens any more.
        said.append(traceback.format_exc())
        raise
    finally:
        sys.stdout, sys.stderr = streams
        if lost := shipping.end():
            log.warning("%s", lost)


class _Tee:
    """A text stream that also remembers what this very process writes to it."""

    def __init__(self, stream: Any, said: deque[str]) -> None:
        self._stream = stream
        self._said = said
        self._process = os.getpid()

    def write(self, text: str) -> int:
        written = int(self._stream.write(text) or 0)
        # A forked worker has a copy that nobody empties. (Appending takes no lock that it could inherit.)
        if os.getpid() == self._process:
            self._said.append(text)
        return written

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Shipping(threading.Thread):
    """Puts into the store what was said."""

    def __init__(self, store: Store, source: str, run: str, said: deque[str]) -> None:
        super().__init__(name="log", daemon=True)
        self._store, self._source, self._folder, self._said = store, source, f"{FOLDER}{run}/", said
        self._ended = threading.Event()
        self._text = ""  # said, and in no part yet
        self._part: tuple[str, bytes] | None = None  # one that is to be put, under a name that it keeps
        self._number = 0
        self._bytes = 0
        self._left_out = 0
        self._fault = ""

    def run(self) -> None:
        started, wait = time.monotonic(), _SHORTEST_SECONDS
        while not self._ended.wait(wait):
            self._ship()
            age = time.monotonic() - started
            wait = min(max(age / _SLOWDOWN, _SHORTEST_SECONDS), _LONGEST_SECONDS)
        self._ship()

    def end(self) -> str:
        """Put what is left. Returns a sentence about what could not be; '' when all was."""
        self._ended.set()
        self.join(_PATIENCE_SECONDS)
        if self.is_alive() and not self._fault:
            self._fault = f"it did not answer within {_PATIENCE_SECONDS:.0f} s"
        if not (self.is_alive() or self._part or self._text or self._said):
            return ""
        return f"the end of this log is in the pod alone, not in the store ({self._fault or 'see above'})"

    def _ship(self) -> None:
        try:
            if self._part:
                self._put(*self._part)
            ended = self._ended.is_set()
            self._listen(ended)
            if body := self._next(ended):
                stamp = datetime.now(UTC).strftime(f"{_CLOCK}.%f")
                self._number += 1
                self._part = f"{self._folder}{stamp}/{self._source}/{self._number:05d}.txt", body
                self._put(*self._part)
        except StoreError as error:
            self._fault = error.what

    @s3.faults_named("storing a log")
    def _put(self, name: str, body: bytes) -> None:
        self._store.client.put_object(
            Bucket=self._store.bucket,
            Key=self._store.key(name),
            Body=body,
            ContentType="text/plain; charset=utf-8",
            ChecksumAlgorithm="SHA256",
        )
        self._part = None
        self._bytes += len(body)

    def _listen(self, ended: bool) -> None:
        new = io.StringIO()
        while self._said:
            new.write(self._said.popleft())
        self._text += new.getvalue()
        if ended and self._text and not self._text.endswith("\n"):
            self._text += "\n"
        # A store that is away for long must not fill the memory.
        most = _END_BYTES if self._bytes >= _MOST_BYTES else _MOST_BYTES
        if len(self._text) > most:
            self._left_out += len(self._text) - most
            self._text = self._text[-most:]

    def _next(self, ended: bool) -> bytes:
        """The bytes of the next part: whole lines; none when there are none."""
        if self._bytes >= _MOST_BYTES and not ended:
            return b""
        end = self._text.rfind("\n") + 1
        whole, self._text = self._text[:end], self._text[end:]
        if whole and self._left_out:
            whole = f"... {self._left_out:,} characters are in the pod's own log alone ...\n{whole}"
            self._left_out = 0
        return _settled(whole).encode(errors="replace")


def _settled(text: str) -> str:
    """Without the lines of progress that another one follows at once, of the same work."""
    lines = [*text.splitlines(keepends=True), ""]
    return "".join(
        line
        for line, after in pairwise(lines)
        if not (line.startswith(PREFIX) and line.split("  ")[0] == after.split("  ")[0])
    )
