"""The promotion ledger of a registered model: who put which version in service, when, why, on what evidence.

`ledger/<name>/00000001.json`, ... in the store, append-only. Entry N+1 is written with If-None-Match, so of
two processes that decided on the same past only one gets the number; the other reads again and decides
again. That conditional write is the arbiter, on one machine or on many; MLflow's aliases follow it (16
processes that compared and set aliases directly left a worse champion in two of three tries).

Each entry carries the hash of the one before and its own, so that a changed or missing entry is named; the
head's hash is also noted in MLflow, so that a ledger that lost its end is noticed too.
"""

from __future__ import annotations

import json
import logging
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from components.shared import digest, registry
from components.shared.errors import TuneyardError
from components.shared.mlflow_database import locked
from components.shared.store import Store

log = logging.getLogger("tuneyard.ledger")

GENESIS = "0" * 64
_ATTEMPTS = 50

Action = Literal["register", "promote", "rollback"]


@dataclass(frozen=True)
class Change:
    """What someone wants to write.

    Args:
        action: `register` adds a version, `promote` and `rollback` make one the champion.
        version: of the registered model.
        digest: of that version's model manifest.
        who: a person, or a stage of a run.
        why: one sentence.
        evidence: JSON that the decision rests on (metrics, what they were judged on, evaluation digest, run).
    """

    action: Action
    version: int
    digest: str
    who: str
    why: str
    evidence: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A written change. `at` is UTC; `hash` covers every other field; `previous_champion` may be None."""

    number: int
    previous_hash: str
    at: str
    who: str
    why: str
    action: Action
    version: int
    digest: str
    evidence: dict[str, Any]
    previous_champion: int | None
    hash: str


def read(name: str, store: Store) -> list[Entry]:
    """All entries, oldest first, their chain verified.

    Raises:
        TuneyardError: names the first broken entry and what is wrong with it.
    """
    folder = _folder(name)
    entries: list[Entry] = []
    for document in (d for d in store.names(folder) if re.fullmatch(r"\d{8}\.json", d[len(folder) :])):
        expected = _document(name, len(entries) + 1)
        if document != expected:
            raise _broken(expected, "is missing")
        try:
            raw = store.read_json(document)
            entry = Entry(**raw) if raw is not None else None
        except (ValueError, TypeError) as error:
            raise _broken(document, f"is no ledger entry ({error})") from error
        if entry is None:
            raise _broken(document, "was removed while it was read")
        if entry.hash != _hash(asdict(entry)):
            raise _broken(
                document,
                f"was changed: its content has hash {_hash(asdict(entry))[:12]}, not {entry.hash[:12]}",
            )
        if entry.number != len(entries) + 1 or entry.previous_hash != (
            entries[-1].hash if entries else GENESIS
        ):
            raise _broken(document, "does not follow the entry before it")
        entries.append(entry)
    return entries


def verify(name: str, store: Store) -> list[Entry]:
    """`read`, and also compare with the head that MLflow noted.

    Raises:
        TuneyardError: names the first broken entry.
    """
    # The witness first: what is appended between the two readings is then no contradiction.
    return _verified(name, registry.witness(name), store)


def _verified(name: str, witness: str, store: Store) -> list[Entry]:
    number, _, noted = witness.partition(":")
    entries = read(name, store)
    if number and (int(number) > len(entries) or entries[int(number) - 1].hash != noted):
        document = _document(name, min(int(number), len(entries) + 1))
        raise _broken(
            document,
            f"is not what MLflow noted as entry {number} ({noted[:12]}): it was removed or rewritten",
        )
    return entries


def append(name: str, store: Store, decide: Callable[[list[Entry]], Change | None]) -> Entry | None:
    """Write the next entry, decided on the entries that precede it.

    Args:
        name: of the registered model.
        store: where the ledger is.
        decide: gets the entries so far; called again when a rival was first; None leaves all as it is.

    Returns:
        The entry, or None when nothing was to be written.

    Raises:
        TuneyardError: the ledger is broken, or rivals were first fifty times.
    """
    for _ in range(_ATTEMPTS):
        entries = verify(name, store)
        change = decide(entries)
        if change is None:
            return None
        entry = _sealed(change, entries)
        document = _document(name, entry.number)
        if store.write_json(document, asdict(entry), once=True):
            return entry
        # The S3 client repeats a request whose answer was lost; the repetition is then refused for what the
        # first one wrote.
        if (store.read_json(document) or {}).get("hash") == entry.hash:
            return entry
        time.sleep(random.uniform(0.0, 0.1))
    raise TuneyardError(
        f"{_folder(name)}: rivals were first {_ATTEMPTS} times", "see who writes to this ledger"
    )


def change(name: str, store: Store, decide: Callable[[list[Entry]], Change | None]) -> Entry | None:
    """`append`, then make MLflow's aliases agree, under a lock that spares this machine's processes the race.

    Raises:
        TuneyardError: as `append` and `reconcile`.
    """
    with locked(f"ledger-{name}"):
        entry = append(name, store, decide)
        reconcile(name, store)
    return entry


def reconcile(name: str, store: Store) -> dict[str, int]:
    """Set the aliases candidate and champion to what the ledger says; returns them.

    Needed after a kill between the ledger's entry and the alias: until then the old champion serves.

    Raises:
        TuneyardError: the ledger is broken, or MLflow's version is not the model that the ledger names.
    """
    while True:
        witness = registry.witness(name)
        entries = _verified(name, witness, store)
        wanted = aliases(entries)
        present = registry.aliases(name)
        for alias in (registry.CANDIDATE, registry.CHAMPION):
            version = wanted.get(alias)
            if version == present.get(alias):
                continue
            if version is None:
                log.warning("%s: alias %s was not set by the ledger; removed", name, alias)
                registry.delete_alias(name, alias)
            else:
                _same_model(name, version, entries)
                registry.set_alias(name, alias, version)
        if entries:
            head = f"{entries[-1].number}:{entries[-1].hash}"
            if witness != head:
                registry.set_witness(name, head)
        # Another machine may have appended and set its alias before we set ours to something older.
        if store.read_json(_document(name, len(entries) + 1)) is None:
            return wanted


def aliases(entries: Sequence[Entry]) -> dict[str, int]:
    """Which version should carry which alias; without MLflow, so in milliseconds."""
    versions = {registry.CANDIDATE: candidate(entries), registry.CHAMPION: champion(entries)}
    return {alias: version for alias, version in versions.items() if version is not None}


def champion(entries: Sequence[Entry]) -> int | None:
    """The version in service after these entries."""
    entry = champion_entry(entries)
    return None if entry is None else entry.version


def champion_entry(entries: Sequence[Entry]) -> Entry | None:
    """The entry that made the champion champion."""
    return next((e for e in reversed(entries) if e.action != "register"), None)


def candidate(entries: Sequence[Entry]) -> int | None:
    """The newest accepted version."""
    return max((e.version for e in entries if e.action == "register"), default=None)


def registration(entries: Sequence[Entry], version: int | None) -> Entry | None:
    """The entry that registered a version."""
    return next((e for e in entries if e.action == "register" and e.version == version), None)


def rollback_target(entries: Sequence[Entry]) -> Entry | None:
    """The entry that last made the champion's predecessor champion: with other bytes, so that it helps.

    A rollback takes its champion off the pile, so that a second rollback goes further back instead of forth.
    """
    pile: list[Entry] = []
    for entry in entries:
        if entry.action == "promote":
            pile.append(entry)
        elif entry.action == "rollback":
            while pile and pile[-1].version != entry.version:
                pile.pop()
    return next((e for e in reversed(pile) if e.digest != pile[-1].digest), None)


def _same_model(name: str, version: int, entries: Sequence[Entry]) -> None:
    """Refuse to point an alias at a version of another database that happens to have the same number."""
    stated = next(e.digest for e in reversed(entries) if e.version == version)
    found = registry.get(name, version).digest
    if found != stated:
        raise TuneyardError(
            f"{name} version {version} is model {found[:12]} in MLflow but {stated[:12]} in the ledger",
            f"this is not the MLflow database that {_folder(name)} was written with: restore that one",
        )


def _sealed(change: Change, entries: Sequence[Entry]) -> Entry:
    body = {
        "number": len(entries) + 1,
        "previous_hash": entries[-1].hash if entries else GENESIS,
        "at": datetime.now(UTC).isoformat(timespec="microseconds"),
        "who": _text(change.who),
        "why": _text(change.why),
        "action": change.action,
        "version": change.version,
        "digest": change.digest,
        # What JSON makes of it, since the hash must be the same after reading it back.
        "evidence": json.loads(json.dumps(change.evidence, allow_nan=False)),
        "previous_champion": champion(entries),
    }
    return Entry(**body, hash=_hash(body))


def _text(value: str) -> str:
    """Command lines may hold bytes that are no UTF-8 (as lone surrogates); S3 takes UTF-8."""
    return value.encode("utf-8", "replace").decode()


def _hash(document: Mapping[str, Any]) -> str:
    return digest.of_value({key: value for key, value in document.items() if key != "hash"})


def _folder(name: str) -> str:
    return f"ledger/{registry.check_name(name)}/"


def _document(name: str, number: int) -> str:
    return f"{_folder(name)}{number:08d}.json"


def _broken(document: str, fault: str) -> TuneyardError:
    return TuneyardError(
        f"{document} {fault}",
        "restore it from a backup of the store; promotions stay refused until the chain is whole",
    )
