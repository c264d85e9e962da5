"""Spans of characters and BIO tags of words: both ways, by the tokenizer's offsets alone.

A tag belongs to a word, and is that of the word's first token; what continues a word has none. A script
without spaces has no words to find, so there each token that begins a character has its own tag. Tags and
spans are those of the CoNLL-2003 shared task (Tjong Kim Sang and De Meulder 2003, section 2.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

OUTSIDE = "O"


@dataclass(frozen=True, order=True)
class Span:
    """An entity: characters start to end of its text, and its label."""

    start: int
    end: int
    label: str


@dataclass
class Word:
    """What one tag is given to: tokens first to last, characters start to end."""

    first: int
    last: int
    start: int
    end: int


@cache
def _joined() -> Any:
    import regex

    unspaced = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
    # V1: set difference.
    return regex.compile(rf"(?V1)[[\p{{L}}\p{{N}}\p{{M}}]--[{unspaced}]]{{2}}")


def inside_word(text: str, at: int) -> bool:
    """Whether the characters before and at a place belong to one word."""
    return 0 < at < len(text) and bool(_joined().match(text, at - 1))


def words(text: str, offsets: Sequence[tuple[int, int]]) -> list[Word]:
    """The words of a tokenised text.

    Args:
        text: as it was tokenised.
        offsets: characters of each token; an empty range for a special one.
    """
    found: list[Word] = []
    for token, (start, end) in enumerate(offsets):
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        if start >= end:
            continue
        # Tokens of one byte each overlap within a character.
        if found and (start < found[-1].end or (start == found[-1].end and inside_word(text, start))):
            found[-1].last, found[-1].end = token, max(end, found[-1].end)
        else:
            found.append(Word(token, token, start, end))
    return found


def spans_of(example: Mapping[str, Any]) -> list[Span]:
    """The entities of a tagged-text example, in order, without blanks at their edges."""
    text, found = example["text"], []
    for entity in example["entities"]:
        start, end = entity["start"], entity["end"]
        inside = text[start:end]
        start, end = start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())
        if start < end:
            found.append(Span(start, end, entity["label"]))
    return sorted(found)


def tag_names(labels: Iterable[str]) -> list[str]:
    """Every tag over these labels: O, and B- and I- of each label, sorted."""
    return [OUTSIDE, *(f"{edge}-{label}" for label in sorted(set(labels)) for edge in "BI")]


def tags(found: Sequence[Word], spans: Sequence[Span]) -> tuple[list[str | None], list[tuple[int, int]]]:
    """The tag of each word, and the words (first, last) of each span that tags can say.

    A span that ends within a word cannot be said: its words get None, so that no wrong tag is learnt.
    """
    named: list[str | None] = [OUTSIDE] * len(found)
    said = []
    for span in spans:
        touched = [i for i, word in enumerate(found) if word.start < span.end and word.end > span.start]
        exact = touched and found[touched[0]].start == span.start and found[touched[-1]].end == span.end
        for i in touched:
            named[i] = f"{'B' if i == touched[0] else 'I'}-{span.label}" if exact else None
        if exact:
            said.append((touched[0], touched[-1]))
    return named, said


def spans(found: Sequence[Word], named: Sequence[str]) -> list[Span]:
    """The spans that tags say; an I- that continues nothing begins a span, as conlleval has it."""
    read: list[Span] = []
    before = OUTSIDE
    for word, tag in zip(found, named, strict=True):
        edge, _, label = tag.partition("-")
        if edge == "I" and before[2:] == label and before != OUTSIDE:
            read[-1] = Span(read[-1].start, word.end, label)
        elif edge != OUTSIDE:
            read.append(Span(word.start, word.end, label))
        before = tag
    return read
