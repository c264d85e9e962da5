"""LawBench task 2-6, whose answers name entities, as texts with marked spans.

An answer is `label:one、another;label:...`, without saying where. An entity is marked wherever its text
stands; where two would overlap the longer one stays.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from components.shared.errors import TuneyardError

_PREFIX = "句子:"


def convert(source: Path, target: Path, rows: int, entities: int) -> None:
    """Rewrite a file.

    Args:
        source: JSONL with `query` and `response`, which may begin with a byte order mark.
        target: JSONL with `text` and `entities`.
        rows: that must come out.
        entities: marked in all of them.

    Raises:
        TuneyardError: other counts came out, or an entity does not stand in its text.
    """
    lines = source.read_text(encoding="utf-8-sig").splitlines()
    found = [row(json.loads(line), f"{source.name}:{n}") for n, line in enumerate(lines, 1)]
    marked = sum(len(one["entities"]) for one in found)
    if (len(found), marked) != (rows, entities):
        raise TuneyardError(
            f"{source.name}: {len(found)} rows with {marked} entities came out, the catalogue expects "
            f"{rows} with {entities}"
        )
    # newline: on every system the same bytes.
    with target.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in found)


def row(asked: dict[str, str], where: str) -> dict[str, Any]:
    """One question and answer as text and spans.

    Raises:
        TuneyardError: an entity of the answer does not stand in the text.
    """
    text = asked["query"].removeprefix(_PREFIX)
    named: list[tuple[str, str]] = []
    for part in re.split("[;；]", asked["response"]):
        label, colon, names = part.partition(":")
        named += [(name, label.strip()) for name in names.split("、") if colon and name.strip()]
    absent = [name for name, _ in named if name not in text]
    if absent:
        raise TuneyardError(f"{where}: the answer names {absent}, which the text does not hold")
    taken = [False] * len(text)
    spans = []
    for name, label in sorted(dict.fromkeys(named), key=lambda pair: -len(pair[0])):
        for match in re.finditer(re.escape(name), text):
            start, end = match.span()
            if not any(taken[start:end]):
                taken[start:end] = [True] * (end - start)
                spans.append({"start": start, "end": end, "label": label})
    return {"text": text, "entities": sorted(spans, key=lambda span: span["start"])}
