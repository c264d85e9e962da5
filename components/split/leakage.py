"""Domain text that holds what the model will be judged by: found by its words, verbatim or with small edits.

A text of an example stands in a document when, within a stretch of the document that is little longer than
the text, runs of words that both have cover four fifths of the text. (Touvron et al. 2023, arXiv:2307.09288,
appendix A.6, call an example contaminated by the same share, in runs of ten tokens; runs are shorter here, so
that an edit every dozen words hides nothing, and the stretch keeps a whole library from covering a text with
its commonplaces.) A word of a script without spaces is one character.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.shared import examples

# Words in a run.
_RUN = 5
# A text of fewer words stands in any large corpus by chance; a character of a script without spaces is half.
_FEWEST = 13
_COVERED = 0.8
# Length of the stretch over that of the text: edits may also add words.
_STRETCH = 1.5
# Runs of a text that the index knows, those of smallest hash; one of them in a document makes it look closer.
# Where 80% is covered in runs of just five, every sixth run is whole, and 5 of 32 are expected.
_KNOWN = 32
# Of Knuth's 64-bit generator.
_MULTIPLIER = 6364136223846793005
# Kana, ideographs and their extensions, Hangul: each character is a word.
_WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
    "|[^\\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]+"
)
# What an example says of itself and not of its content.
_NOT_CONTENT = ("system", "tools", "label", "task", "entities")


def words(text: str) -> list[str]:
    """The words of a text, whatever its width, case, blanks and punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def texts(example: Mapping[str, Any]) -> Iterator[list[str]]:
    """The texts of an example that a document must not hold, as words.

    Each field or message that is long enough to be told from chance, or where none is all of them as one.
    """
    said = [value for name, value in examples.content(example).items() if name not in _NOT_CONTENT]
    found = [words(text) for value in said for text in _strings(value)]
    long = [text for text in found if _telling(text)]
    whole = [word for text in found for word in text]
    yield from long or ([whole] if _telling(whole) else [])


def _telling(text: Sequence[str]) -> bool:
    """Whether a text is long enough to be told from chance."""
    return sum(1.0 if len(word) > 1 or word.isascii() else 0.5 for word in text) >= _FEWEST


def _strings(value: Any) -> Iterator[str]:
    """The texts in a field: itself, or what its messages say."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        said = (message for message in value if message["role"] not in _NOT_CONTENT)
        yield from (message["content"] for message in said if isinstance(message.get("content"), str))


@dataclass(frozen=True)
class Leak:
    """An example that a document holds, and what share (0-1) of its text the document covers."""

    example: Mapping[str, Any]
    covered: float


class Judged:
    """The examples of the sides that judge, ready to be looked for in documents.

    Args:
        rows: of eval and test.

    Attributes:
        short: how many are too short to be told from chance.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        import numpy

        self._texts: list[tuple[Mapping[str, Any], Any]] = []
        self.short = 0
        for row in rows:
            found = [(row, runs(text)) for text in texts(row)]
            self.short += not found
            self._texts += found
        self._known: dict[int, list[int]] = {}
        for at, (_, of_text) in enumerate(self._texts):
            for run in numpy.unique(of_text)[:_KNOWN].tolist():
                self._known.setdefault(run, []).append(at)
        self._every = numpy.array(sorted(self._known), dtype=numpy.uint64)

    def held(self, document: Sequence[str]) -> Leak | None:
        """The example that a document, given as words, holds most of; None where it holds none."""
        of_document = runs(document)
        seen = set(of_document[_among(of_document, self._every)].tolist())
        found = [
            Leak(self._texts[at][0], covered(self._texts[at][1], of_document))
            for at in sorted({at for run in seen for at in self._known[run]})
        ]
        worst = max(found, key=lambda leak: leak.covered, default=None)
        return worst if worst is not None and worst.covered >= _COVERED else None


def runs(text: Sequence[str]) -> Any:
    """A 64-bit hash of each run of words, in order."""
    import numpy

    numbers = numpy.array([_number(word) for word in text], dtype=numpy.uint64)
    found = numpy.zeros(max(0, len(numbers) - _RUN + 1), dtype=numpy.uint64)
    for at in range(_RUN if len(found) else 0):
        found = (found + numbers[at : at + len(found)]) * _MULTIPLIER
    return found


@functools.cache
def _number(word: str) -> int:
    """64 bits that depend on a word alone, in every process."""
    raw = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "big")


def _among(found: Any, known: Any) -> Any:
    """Which of these numbers are among the known ones, which are in order."""
    import numpy

    if not len(known):
        return numpy.zeros(len(found), dtype=bool)
    return known[numpy.minimum(numpy.searchsorted(known, found), len(known) - 1)] == found


def covered(text: Any, document: Any) -> float:
    """The largest share of a text's words that its runs within one stretch of a document cover.

    Args:
        text: its runs.
        document: its runs.
    """
    import numpy

    places: dict[int, list[int]] = {}
    for at, run in enumerate(text.tolist()):
        places.setdefault(run, []).append(at)
    length = len(text) + _RUN - 1
    hits = numpy.flatnonzero(_among(document, numpy.unique(text)))
    found = [places[run] for run in document[hits].tolist()]
    if _share(found, length) < _COVERED:
        return 0.0
    most, due = 0.0, -1
    for low, place in enumerate(hits.tolist()):
        if place < due:
            continue  # a stretch that begins within a quarter of the text before it has been looked at
        due = place + max(1, length // 4)
        high = int(numpy.searchsorted(hits, place + int(_STRETCH * length)))
        most = max(most, _share(found[low:high], length))
    return most


def _share(places: Iterable[Sequence[int]], length: int) -> float:
    """The share of a text's words that are within runs at these places of it."""
    return len({word for each in places for at in each for word in range(at, at + _RUN)}) / length
