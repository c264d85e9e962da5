"""Holds: an artifact that must be kept, for a reason that is no alias (a lawsuit, an audit), by whom and why.

`holds/<digest>-<4 hex>.json` in the store, one for each hold. A hold that is ended stays on record.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from components.shared import ledger, registry
from components.shared.errors import TuneyardError, UsageError
from components.shared.store import Store

FOLDER = "holds/"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_HOW = "name a registered version (sft_legal/3), a manifest's digest or its s3:// URI"


@dataclass(frozen=True)
class Hold:
    """One hold.

    Args:
        what: as it was named.
        digest: of the manifest that is held, with its files and what it was made from.
        who: put it there.
        why: one sentence.
        at: when, UTC.
    """

    what: str
    digest: str
    who: str
    why: str
    at: str


def add(what: str, why: str, who: str, store: Store) -> Hold:
    """Hold an artifact.

    Raises:
        UsageError: there is no such artifact, or no reason is given.
        TuneyardError: some of its files are gone already.
    """
    if not why.strip():
        raise UsageError("a hold needs a reason: it stays on record", "say it with --why")
    digest = digest_of(what, store)
    hold = Hold(what, digest, who, why.strip(), datetime.now(UTC).isoformat(timespec="seconds"))
    name = f"{FOLDER}{digest}-{secrets.token_hex(2)}.json"
    store.write_json(name, asdict(hold), once=True)
    # Looked for after the hold is written: a `tuneyard gc` under way has then ended, or knows it.
    if not store.has_tree(store.read_manifest(f"{store.root}/manifests/{digest}.json")):
        store.remove(name)
        raise TuneyardError(
            f"{what}: files of manifest {digest[:12]} are gone, so it cannot be held",
            "submit its pipeline again first",
        )
    return hold


def end(what: str, why: str, who: str, store: Store) -> list[Hold]:
    """End every hold of an artifact; who ended it and why stays on record.

    Raises:
        UsageError: it is not held, or no reason is given.
    """
    if not why.strip():
        raise UsageError("to end a hold needs a reason: it stays on record", "say it with --why")
    digest = digest_of(what, store)
    ended = []
    for name in store.names(f"{FOLDER}{digest}-"):
        document = store.read_json(name)
        if document is None or "ended" in document:
            continue
        at = datetime.now(UTC).isoformat(timespec="seconds")
        store.write_json(name, document | {"ended": {"who": who, "why": why.strip(), "at": at}})
        ended.append(Hold(**document))
    if not ended:
        raise UsageError(f"{what} (manifest {digest[:12]}) is not held", "see `tuneyard hold list`")
    return ended


def standing(store: Store) -> list[dict[str, Any]]:
    """The holds that have not ended, as they were written, oldest first."""
    documents = [store.read_json(name) for name in store.names(FOLDER)]
    return sorted((d for d in documents if d and "ended" not in d), key=lambda d: (d["at"], d["digest"]))


def digest_of(what: str, store: Store) -> str:
    """Digest of the manifest that somebody names.

    Args:
        what: `<model>/<version>`, a digest, or the URI of a manifest.
        store: has it.

    Raises:
        UsageError: there is none.
    """
    found = what.rsplit("/", 1)[-1].removesuffix(".json")
    if not _DIGEST.fullmatch(found):
        model, _, version = what.partition("/")
        if not version.isdigit():
            raise UsageError(f"{what!r} names no artifact", _HOW)
        entry = ledger.registration(ledger.read(model, store), int(version))
        found = entry.digest if entry else registry.get(model, int(version)).digest
    if store.read_json(f"manifests/{found}.json") is None:
        raise UsageError(f"{what}: {store.root} has no manifest {found[:12]}", _HOW)
    return found
