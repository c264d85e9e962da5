"""What of the store is still wanted: all that an alias, a deployment, a hold or something young leads to.

From these roots the search follows names. A document leads to each manifest, commit and object whose digest
stands anywhere in it, so a commit leads to its outputs, a manifest to its files, to the commit that made it
and to what it was made from: a model that is kept keeps its lineage, down to the examples it was judged on.
Whatever another part of the house comes to write into a document is thereby reached as well; a digest too
many keeps a file too many, and never loses one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from components.shared import ledger, registry
from components.shared.errors import TuneyardError
from components.shared.logparts import FOLDER as LOGS
from components.shared.mlflow_database import attempt, client, tracking_uri
from components.shared.objects import DAMAGED, FOLDER
from components.shared.store import Listed, Store
from components.shared.uses import USES
from pipelines import holds

DAY_SECONDS = 86400.0
# Younger than this nothing is removed, whatever reaches it: its manifest, commit or run may be yet to come.
GRACE_DAYS = 1.0
# Only these are ever removed, in this order; what else lies in the store (ledgers, holds...) is not.
KINDS = {
    "stages/": "commits",
    "manifests/": "manifests",
    FOLDER: "objects",
    "runs/": "run records",
    LOGS: "logs",
    "work/": "checkpoints and slices",
    "slots/": "slots",
    USES: "uses",
    DAMAGED: "damaged",
}
# What goes when its run goes.
_OF_RUNS = ("runs/", LOGS)
_DIGEST = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_READERS = 8
_PAGE = 1000


@dataclass(frozen=True)
class Survey:
    """What the store holds of one kind each, and which names of it are wanted."""

    listed: Mapping[str, Listed]
    wanted: frozenset[str]

    def unwanted(self) -> list[Listed]:
        """What can go, by name."""
        return [self.listed[name] for name in sorted(self.listed.keys() - self.wanted)]


def kind_of(name: str) -> str:
    """The kind of a name that `survey` listed."""
    return next(kind for prefix, kind in KINDS.items() if name.startswith(prefix))


def survey(store: Store, keep_days: float, alive: Callable[[], None] = lambda: None) -> Survey:
    """List the store and find out what is wanted.

    Args:
        store: to look through.
        keep_days: how long runs, commits and uses keep what they lead to; at least `GRACE_DAYS`.
        alive: called now and then.

    Raises:
        TuneyardError: the store or MLflow does not answer, or a ledger is broken: then nothing can be said.
    """
    listed = {item.name: item for prefix in KINDS for item in store.listing(prefix)}
    keep = max(keep_days, GRACE_DAYS) * DAY_SECONDS
    wanted = {
        name
        for name, item in listed.items()
        if item.age_seconds < (keep if _kept_by_age(name) else GRACE_DAYS * DAY_SECONDS)
    }
    young_runs = {_run_of(name) for name in wanted if name.startswith(_OF_RUNS)}
    wanted |= {name for name in listed if name.startswith(_OF_RUNS) and _run_of(name) in young_runs}
    roots = [*_ledger_roots(store), *_mlflow_roots(), *_documents(store, "deployments/")]
    roots += [json.dumps(hold) for hold in holds.standing(store)]
    _follow(store, listed, wanted, roots, alive)
    return Survey(listed, frozenset(wanted))


def _kept_by_age(name: str) -> bool:
    return not name.startswith((FOLDER, "manifests/"))


def _run_of(name: str) -> str:
    return name.split("/")[1]


def _follow(
    store: Store,
    listed: Mapping[str, Listed],
    wanted: set[str],
    roots: Sequence[str],
    alive: Callable[[], None],
) -> None:
    """Add to `wanted` all that it and the roots lead to."""
    index: dict[str, list[str]] = {}
    runs: dict[str, list[str]] = {}
    for name in listed:
        if name.startswith(_OF_RUNS):
            runs.setdefault(_run_of(name), []).append(name)
        elif not name.startswith((USES, DAMAGED)):
            index.setdefault(name.rsplit("/", 1)[1].removesuffix(".json"), []).append(name)
    texts: Iterable[str] = roots
    frontier = [name for name in wanted if _leads_on(name)]
    with ThreadPoolExecutor(_READERS) as pool:
        while True:
            found = {name for text in texts for each in _DIGEST.findall(text) for name in index.get(each, ())}
            frontier += [name for name in found - wanted if _leads_on(name)]
            wanted |= found
            if not frontier:
                return
            alive()
            # In portions, so that a long list of them neither fills the memory nor outlasts a sign of life.
            portion, frontier = frontier[:1000], frontier[1000:]
            documents = list(pool.map(partial(_read, store), portion))
            # A commit that is kept keeps the account of its run, but not what else that run came across.
            for name, document in zip(portion, documents, strict=True):
                if name.startswith("stages/"):
                    wanted.update(runs.get(str(document.get("run")), ()))
            texts = [json.dumps(document) for document in documents]


def _leads_on(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(DAMAGED)


def _read(store: Store, name: str) -> dict[str, Any]:
    try:
        return store.read_json(name) or {}
    except ValueError as error:
        raise TuneyardError(
            f"{store.root}/{name} is not JSON ({error}), so what it leads to is unknown",
            "restore it from a backup of the store, or remove it; nothing was removed",
        ) from error


def _documents(store: Store, prefix: str) -> list[str]:
    return [json.dumps(_read(store, name)) for name in store.names(prefix)]


def _ledger_roots(store: Store) -> list[str]:
    """The entries of each candidate and champion, and of the one that a rollback would bring back."""
    names = sorted({name.split("/")[1] for name in store.names("ledger/")})
    roots = []
    for name in names:
        entries = ledger.read(name, store)
        versions = set(ledger.aliases(entries).values())
        if target := ledger.rollback_target(entries):
            versions.add(target.version)
        roots += [
            json.dumps([entry.digest, dict(entry.evidence)]) for entry in entries if entry.version in versions
        ]
    return roots


def _mlflow_roots() -> list[str]:
    """Versions with any alias in MLflow, also one that somebody set by hand."""
    if not tracking_uri():
        return []
    mlflow = client()
    roots: list[str] = []
    token = None
    while True:
        search = partial(mlflow.search_registered_models, max_results=_PAGE, page_token=token)
        page = attempt("listing registered models", search)
        for model in page:
            for version in sorted({int(v) for v in model.aliases.values()}):
                found = registry.get(model.name, version)
                roots.append(json.dumps([found.manifest_uri, found.tags]))
        token = page.token
        if not token:
            return roots
