"""How a run ended, told to a webhook: the exit handler of a cluster run, and the end of a local submit."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from components.notify.config import Event, NotifyConfig
from components.shared import logparts, slots
from components.shared.commit import commit_name
from components.shared.errors import TuneyardError
from components.shared.store import Store

log = logging.getLogger("tuneyard.notify")

URL_VARIABLE = "TUNEYARD_NOTIFY_URL"
_TRIES = 4
_TIMEOUT_SECONDS = 15.0
# Slack cuts a message at 40,000 characters; who is woken up reads fewer.
_CHARACTERS = 3000


@dataclass(frozen=True)
class Ending:
    """How a run ended: the event that `notify.on` may name, and what to say of it."""

    event: Event
    text: str


def ending(run: str, pipeline: str, slot: str, stages: Sequence[str], store: Store) -> Ending:
    """Read the records that the stages of a run left in the store.

    The stages' own records and not KFP's status: they say why, with a gate told from a failure. A stage that
    was killed is the one whose record never went beyond `running`; one that never got a pod left none.

    Args:
        run: its id.
        pipeline: its pipeline.
        slot: of the schedule; '' for none.
        stages: that had to leave a record, in order.
        store: with the records.

    Raises:
        StoreError: the store does not answer.
    """
    names = [name for name in store.names(f"runs/{run}/") if not name.endswith("/run.json")]
    records = {name.rsplit("/", 1)[1][:-5]: store.read_json(name) or {} for name in names}
    title = f"{pipeline}, run {run}" + (f", slot {slot}" if slot else "")
    for stage, record in records.items():
        if record.get("status") == "running":
            why = "it was killed (out of memory, a lost node, a time-out?) or could not record how it ended"
            return Ending("failed", f"{title}: failed at {stage}\n{why}")
    for stage, record in records.items():
        status = record.get("status")
        if status in ("failed", "interrupted"):
            return Ending("failed", f"{title}: {status} at {stage}\n{_why(record)}")
    for stage, record in records.items():
        if record.get("status") == "stopped":
            return Ending("stopped", f"{title}: stopped at {stage}\n{_why(record)}")
    absent = [stage for stage in stages if stage not in records]
    if absent and not (absent == ["deploy"] and _needs_no_deploy(records, store)):
        why = "it left no record: was its image pulled, could its pod be placed, did its driver run?"
        return Ending("failed", f"{title}: failed before {absent[0]} began\n{why}")
    register = records.get("register")
    if slot and register and register.get("cached"):
        why = "corpus, settings and code are what they were when its newest version was registered"
        return Ending("no-version", f"{title}: registered no new version\n{why}")
    # Slices of a stage leave records too; they ran side by side.
    ended = [record for stage, record in records.items() if "-slice-" not in stage]
    seconds = sum(float(record.get("seconds", 0)) for record in ended)
    return Ending("done", f"{title}: done, {len(ended)} stages in {seconds:,.0f} s")


def _needs_no_deploy(records: Mapping[str, Mapping[str, Any]], store: Store) -> bool:
    """Whether the version that this run registered is not champion, or was registered by an earlier one."""
    record = records.get("register")
    if record is None:
        return True
    commit = store.read_json(commit_name("register", record["key"]))
    return commit is not None and not commit["summary"]["champion"]


def _why(record: Mapping[str, Any]) -> str:
    error = record.get("error") or {}
    return str(TuneyardError(error.get("what", "its record says no more"), error.get("todo", "")))


def tell(config: NotifyConfig, ended: Ending) -> bool:
    """Post how a run ended, if it is one of the ends that the settings name. Returns whether it was posted.

    Raises:
        TuneyardError: the webhook does not take it.
    """
    if ended.event not in config.on:
        return False
    url = os.environ.get(URL_VARIABLE, "").strip()
    if not url:
        log.warning("notify: %s is not set, so nobody is told: %s", URL_VARIABLE, ended.text)
        return False
    _post(url, ended.text[:_CHARACTERS])
    return True


def _post(url: str, text: str) -> None:
    """POST `{"text": ...}`, which Slack, Mattermost, Rocket.Chat and Google Chat take."""
    import httpx

    # It logs each request with its whole address.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    fault = ""
    for attempt in range(_TRIES):
        time.sleep(0.0 if attempt == 0 else 2.0**attempt)
        try:
            answer = httpx.post(url, json={"text": text}, timeout=_TIMEOUT_SECONDS)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            fault = type(error).__name__
            continue
        if answer.is_success:
            return
        fault = f"status {answer.status_code}"
        if answer.status_code < 500 and answer.status_code != 429:
            break
    # The host alone: whoever has the whole address can post.
    raise TuneyardError(
        f"notify: the webhook at {urlsplit(url).hostname} did not take the message ({fault})",
        f"check the address in {URL_VARIABLE} (on a cluster: the Secret tuneyard-notify)",
    )


def _slot(run: Mapping[str, str], store: Store) -> str:
    """The slot of a run; '' where it cannot be told, which is no reason to tell nothing."""
    try:
        return slots.of_run(run, store)
    except TuneyardError as error:
        log.warning("%s", error)
        return ""


def main(config: NotifyConfig, run: Mapping[str, str], stages: Sequence[str]) -> None:
    """The body of the exit handler. A webhook that is down must not turn a good run into a failed one.

    Args:
        config: which ends are told.
        run: `id`, `pipeline`, `slot` and `due`, as a stage has them.
        stages: that had to leave a record, in order.
    """
    with logparts.shipped(run["id"], "notify"):
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
        try:
            store = Store.from_environment()
            ended = ending(run["id"], run["pipeline"], _slot(run, store), stages, store)
        except TuneyardError as error:
            title = f"{run['pipeline']}, run {run['id']}"
            ended = Ending("failed", f"{title}: nobody can say how it ended\n{error}")
        try:
            log.info("notify: %s", "told" if tell(config, ended) else "nothing to tell")
        except TuneyardError as error:
            log.error("%s", error)
