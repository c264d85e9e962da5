"""Examples are tokenised once: the token ids are kept on the node, by the content of all they depend on.

`<cache>/tokens/<key>/` holds the encoded examples of a side with their ledger (shards.py). One process makes
them while the others that want them wait; then all of them read. A folder is written aside and renamed, and
verified by digest whenever it is opened: one that is damaged is named, thrown away and made again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from components.shared import cache, digest, examples, placing, tasks
from components.shared.errors import StageStopped
from components.train import shards
from components.train.config import TrainConfig
from components.train.data import Ledger, fit_lengths
from components.train.objectives.base import Objective

log = logging.getLogger("tuneyard.train")

# Of all that is kept on a node; the longest unused goes first. 4 bytes a token: two thousand million of them.
MOST_BYTES = 8 * 2**30
_TORN_SECONDS = 86400.0
# What a tokenizer may be made from, and what it never is.
_TEXTS = (".json", ".txt", ".model", ".jinja")

Rows = Sequence[Mapping[str, Any]]


def encoded(
    objective: Objective,
    rows: Mapping[str, Rows],
    config: TrainConfig,
    folder: Path,
    kept: Path | None,
    longest_judged: int = 0,
) -> tuple[dict[str, Sequence[Any]], dict[str, Ledger]]:
    """Each side as token ids under the over-length policy, and its ledger.

    Args:
        objective: encodes.
        rows: side -> examples.
        config: settings.
        folder: of the base model, with the tokenizer's files.
        kept: cache of this node; None for none. Examples that name files keep nothing there: their paths are
            of one attempt, and what is read of them is no token ids.
        longest_judged: tokens of an eval example at most; 0 for max_length.

    Raises:
        StageStopped: too many examples are over-long, or none of a side is left.
    """
    if examples.media_field(tasks.OBJECTIVES[config.objective.kind].formats[0]):
        kept = None
    common = _depends_on(objective, rows["train"], config, folder) if kept else {}
    sides: dict[str, Sequence[Any]] = {}
    ledgers: dict[str, Ledger] = {}
    for side, own_rows in rows.items():
        held = side == "eval" and longest_judged
        fitted = config.model_copy(update={"max_length": longest_judged}) if held else config
        own = {"rows": _content(own_rows), "max_length": fitted.max_length} if kept else {}
        place = kept / "tokens" / digest.of_value(common | own) if kept else None
        sides[side], ledgers[side] = _side(objective, own_rows, fitted, place)
        if not sides[side]:
            todo = "see train.max_length and train.over_length"
            raise StageStopped(f"no example of {side} is left to use", todo)
    return sides, ledgers


def _side(
    objective: Objective, rows: Rows, config: TrainConfig, place: Path | None
) -> tuple[Sequence[Any], Ledger]:
    if place is None:
        return _tokenised(objective, rows, config)
    lock = place.parent / f".{place.name}.lock"
    with cache.alone(lock):
        try:
            found = _opened(place)
            if found is not None:
                log.info("train: %d examples were tokenised before", sum(found[1].counts.values()))
                return found
            made = _tokenised(objective, rows, config)
            return (_opened(place) if _keep(*made, place) else None) or made
        finally:
            lock.unlink()


def _tokenised(objective: Objective, rows: Rows, config: TrainConfig) -> tuple[list[Any], Ledger]:
    every = iter(objective.encode_all(rows))
    found, ledger = fit_lengths(rows, lambda _: next(every), objective.shorten, config, objective.pieces)
    ledger.parts = objective.account(rows, found)
    return found, ledger


def _keep(examples: Sequence[Any], ledger: Ledger, place: Path) -> bool:
    """Keep what was tokenised; False where there is no form for it."""
    facts: dict[str, Any] = {"counts": ledger.counts, "tokens": ledger.tokens, "rows": ledger.rows}
    facts |= {"pieces": ledger.pieces, "parts": ledger.parts}
    stored = False

    def make(aside: Path) -> None:
        nonlocal stored
        aside.mkdir()
        stored = shards.write(examples, aside, {"ledger": facts})
        if not stored:
            raise _NoForm

    try:
        placing.into_place(place, make)
    except _NoForm:
        return False
    bound(place.parent, place)
    return True


class _NoForm(Exception):
    """Examples of this objective are not kept."""


def _opened(place: Path) -> tuple[Sequence[Any], Ledger] | None:
    """What is kept there, verified; None where nothing is, or what is there is thrown away."""
    if not place.exists():
        return None
    try:
        found, about = shards.read(place)
        facts = about["ledger"]
        counts, tokens = Counter(facts["counts"]), Counter(facts["tokens"])
        ledger = Ledger(counts, tokens, facts["rows"], facts["pieces"], facts["parts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("train: the token ids in %s are damaged (%s); tokenising again", place, error)
        shutil.rmtree(place, ignore_errors=True)
        return None
    os.utime(place)
    return found, ledger


def bound(folder: Path, newest: Path | None = None, most: int | None = None) -> None:
    """Remove what was not used for longest until no more than `most` bytes (MOST_BYTES) are kept.

    Who has a removed one open reads on.
    """
    most = MOST_BYTES if most is None else most
    for torn in folder.glob(".*"):  # what a process that was killed had written aside
        if torn.is_dir() and time.time() - torn.stat().st_mtime > _TORN_SECONDS:
            shutil.rmtree(torn, ignore_errors=True)
    places = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    sizes = {p: sum(f.stat().st_size for f in p.iterdir()) for p in places}
    for place in sorted((p for p in places if p != newest), key=lambda p: p.stat().st_mtime_ns):
        if sum(sizes.values()) <= most:
            return
        shutil.rmtree(place, ignore_errors=True)
        del sizes[place]


def _content(rows: Rows) -> str:
    """Digest of examples as they are; more than their ids, so that whatever an objective looks at counts."""
    found = hashlib.sha256()
    for row in rows:
        found.update(orjson.dumps(row, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE))
    return found.hexdigest()


def _depends_on(objective: Objective, train: Rows, config: TrainConfig, folder: Path) -> dict[str, Any]:
    """All that token ids depend on besides the rows of their side; train's rows tell labels and scales."""
    tokenizer = objective.tokenizer
    files = {p.name: digest.of_file(p) for p in sorted(folder.iterdir()) if p.suffix in _TEXTS}
    return {
        "code": digest.of_code("train"),
        "libraries": [version(name) for name in ("transformers", "tokenizers")],
        "tokenizer": [type(tokenizer).__name__, files, tokenizer.chat_template],
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "objective": config.objective.model_dump(mode="json"),
        "train": _content(train),
        "lengths": [config.over_length, config.max_over_length],
    }
