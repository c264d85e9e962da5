"""Domain text, which is trained on before the task: each document once, and none that holds what judges.

It is done here because no stage after this one has test, but for the one that judges by it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.shared import jsonl
from components.shared.examples import DOMAIN
from components.shared.progress import Progress
from components.split.config import SplitConfig
from components.split.leakage import Judged, words

log = logging.getLogger("tuneyard.split")

_SHOWN = 5


def divide(
    documents: Sequence[dict[str, Any]],
    sides: Mapping[str, Sequence[Mapping[str, Any]]],
    side_of: Callable[[Mapping[str, Any]], str],
    out: Path,
) -> dict[str, Any]:
    """Write `domain.jsonl` of train and eval, and beside that of train what was left out, with origins.

    Args:
        documents: of domain text.
        sides: `eval` and `test` -> examples.
        side_of: document -> train or eval.
        out: of the stage.

    Returns:
        Counts that add up, `read` = `duplicates` + `leaks` + `train` + `eval`, with `examples_too_short` to
        be looked for, and `first`, a sentence for each of the first leaks.
    """
    judged = {row["id"]: side for side in ("eval", "test") for row in sides[side]}
    known = Judged([row for side in ("eval", "test") for row in sides[side]])
    whole, leaks, duplicates = _looked_through(documents, known, judged)
    kept: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for document in whole:
        kept[side_of(document)].append(document)
    for side, rows in kept.items():
        jsonl.write(out / side / DOMAIN, rows)
    jsonl.write(out / "train" / "domain_leaks.jsonl", leaks)
    jsonl.write(out / "train" / "domain_duplicates.jsonl", duplicates)
    if known.short:
        log.warning(
            "split: %d examples of eval and test are too short to be looked for in domain text", known.short
        )
    return {
        "read": len(documents),
        "duplicates": len(duplicates),
        "leaks": len(leaks),
        **{side: len(rows) for side, rows in kept.items()},
        "examples_too_short": known.short,
        "first": [_sentence(leak) for leak in leaks[:_SHOWN]],
    }


def _looked_through(
    documents: Sequence[dict[str, Any]], known: Judged, judged: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """(documents to keep, leaks, duplicates): each document is in one of them.

    Args:
        documents: in their order.
        known: what they must not hold.
        judged: id of an example -> its side.
    """
    kept, leaks, duplicates = [], [], []
    seen: dict[bytes, dict[str, Any]] = {}
    progress = Progress("leakage", len(documents), "documents")
    for document in documents:
        progress.advance()
        said = words(document["text"])
        twin = seen.setdefault(hashlib.sha256("\x1f".join(said).encode()).digest(), document["origin"])
        about = {"id": document["id"], "origin": document["origin"]}
        leak = known.held(said) if twin is document["origin"] else None
        if twin is not document["origin"]:
            duplicates.append({**about, "like": twin})
        elif leak is not None:
            example = {name: leak.example[name] for name in ("id", "origin")}
            side, covered = judged[leak.example["id"]], round(leak.covered, 3)
            leaks.append({**about, "side": side, "example": example, "covered": covered})
        else:
            kept.append(document)
    return kept, leaks, duplicates


def _sentence(leak: Mapping[str, Any]) -> str:
    place, example = leak["origin"], leak["example"]["origin"]
    return (
        f"{place['file']}:{place['line']} holds {leak['covered']:.0%} of an example of {leak['side']}, "
        f"{example['file']}:{example['line']}"
    )


def notes(found: Mapping[str, Any]) -> list[str]:
    """What the page says of it."""
    return [
        f"Domain text: {found['read']} documents read, {found['duplicates']} like an earlier one, "
        f"{found['leaks']} left out because they hold an example of eval or test, {found['train']} to "
        f"train on, {found['eval']} watched.",
        f"{found['examples_too_short']} examples of eval and test are too short to be looked for.",
        *found["first"],
    ]


def faults(found: Mapping[str, Any], config: SplitConfig) -> tuple[str, str]:
    """What stops the line, and what to do about it; empty where nothing does."""
    share = found["leaks"] / found["read"] if found["read"] else 0.0
    if share > config.max_domain_leaks:
        more = "; ..." if found["leaks"] > _SHOWN else ""
        return (
            f"split: {found['leaks']} of {found['read']} documents of domain text ({share:.1%}) hold an "
            f"example of eval or test, over {config.max_domain_leaks:.1%}: {'; '.join(found['first'])}{more}",
            "take them out of train.first.source, or raise split.max_domain_leaks; they are left out anyway",
        )
    empty = [side for side in ("train", "eval") if not found[side]]
    if empty:
        return (
            f"split: no document of domain text is left for {' or '.join(empty)} "
            f"({found['read']} read, {found['duplicates']} duplicates, {found['leaks']} leaks)",
            "give train.first.source more documents (an article each, not a whole code), or a split.seed",
        )
    return "", ""
