"""The way to MLflow: one client for each process, retries while the database is busy, one kind of error.

MLflow 3.17 on SQLite needs three things that it does not do itself (each was measured with 8 processes):
the first use of an empty file runs some seconds of migrations, and two processes doing it at once break each
other (7 of 8 failed), so it happens under a lock; a busy or contended database raises SQLAlchemy's errors
through a dozen calls, so `attempt` retries them and turns the rest into a TuneyardError; telemetry is on
unless the environment says otherwise before the first import.

Every `mlflow.<anything>` import runs the whole package (2.5 s of CPU, whichever part is named; the SQL store
adds 2 s), so nothing here is imported before it is needed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from components.shared import digest
from components.shared.errors import TuneyardError

_ATTEMPTS = 6
_LOCK_SECONDS = 120.0

T = TypeVar("T")


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lock among the processes of this machine that share TUNEYARD_HOME. Not to be nested by name.

    The kernel releases it when its holder dies, however it dies.

    Raises:
        TuneyardError: another process has held it for two minutes.
    """
    path = Path(os.environ.get("TUNEYARD_HOME", ".tuneyard")) / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _LOCK_SECONDS
    with path.open("a+") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    stream.seek(0)
                    holder = stream.read().strip() or "?"
                    raise TuneyardError(
                        f"{path} has been held by process {holder} for {_LOCK_SECONDS:.0f} s",
                        "see what that process does; end it if it hangs, then try again",
                    ) from error
            time.sleep(random.uniform(0.01, 0.03))
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or '' when there is none."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def client() -> Any:
    """The MlflowClient of MLFLOW_TRACKING_URI, its database made or found at the right version.

    Raises:
        TuneyardError: MLFLOW_TRACKING_URI is not set, or the database cannot be used.
    """
    uri = tracking_uri()
    if not uri:
        raise TuneyardError(
            "MLFLOW_TRACKING_URI is not set",
            "start through `tuneyard submit`, which sets it, or name a cluster's (docs/kubernetes.md)",
        )
    return _connect(uri)


@cache
def _connect(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    from mlflow.tracking import MlflowClient

    # It prints a traceback for each error that it also raises; `attempt` retries or reports those.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

    def connect() -> Any:
        made = MlflowClient(tracking_uri=uri, registry_uri=uri)
        made.search_registered_models(max_results=1)
        return made

    if not uri.startswith("sqlite:"):
        return attempt("connecting", connect)
    with locked(f"mlflow-{digest.of_value(uri)[:16]}"):
        return attempt("opening the database", connect)


def attempt(what: str, call: Callable[[], T]) -> T:
    """Call MLflow, again (for about 3 s, besides SQLite's own 20 s of waiting) while the database is busy.

    Args:
        what: for the error message, e.g. `setting alias champion`.
        call: safe to repeat, since MLflow rolls back what failed.

    Raises:
        TuneyardError: it failed, or the database stayed busy. No error of SQLAlchemy or MLflow gets through.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    for number in range(_ATTEMPTS):
        try:
            return call()
        except (MlflowException, SQLAlchemyError) as error:
            if number + 1 < _ATTEMPTS and _will_pass(error):
                time.sleep(random.uniform(0.5, 1.0) * 0.1 * 2**number)
                continue
            line = str(error).strip().splitlines()[0]
            raise TuneyardError(
                f"MLflow at {_shown(tracking_uri())}: {what} failed: {line}", _todo(line)
            ) from error
    raise AssertionError("unreachable")


def _will_pass(error: Exception) -> bool:
    """Whether a rival's transaction is the likely reason: busy, or it took the row that we wanted to add."""
    from sqlalchemy.exc import IntegrityError

    text = str(error)
    return (
        getattr(error, "error_code", "") == "TEMPORARILY_UNAVAILABLE"
        or isinstance(error.__cause__ or error, IntegrityError)
        or "database is locked" in text
        or "Giving up after" in text
    )


def _todo(line: str) -> str:
    if "out-of-date database schema" in line:
        return "stop everything, copy mlflow.db aside, run `mlflow db upgrade` on it, start again"
    return "see that MLFLOW_TRACKING_URI is right, that its disk has room and that nothing else locks it"


def _shown(uri: str) -> str:
    parts = urlsplit(uri)
    return uri.replace(f"{parts.username}:{parts.password}@", "***@") if parts.password else uri
