"""Rows as JSON lines, one reader and one writer for the whole house."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from components.shared.errors import TuneyardError


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that one of our own stages wrote.

    Raises:
        TuneyardError: a line is not a JSON object; names file and line.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise TuneyardError(
                    f"{path}:{number}: not JSON ({error})", "submit again to remake it"
                ) from error
            if not isinstance(row, dict):
                raise TuneyardError(f"{path}:{number}: {type(row).__name__}, not an object", "submit again")
            yield row


def write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows, sorted keys so that equal rows give equal bytes. Returns how many."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        for row in rows:
            stream.write(orjson.dumps(row, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE))
            count += 1
    return count
