"""How far a transcript is from what was said: word and character error rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from components.evaluate import intervals
from components.evaluate.text_metrics import words


def edits(said: Sequence[str], written: Sequence[str]) -> int:
    """Fewest substitutions, deletions and insertions from one sequence to the other (Levenshtein 1966)."""
    row = list(range(len(written) + 1))
    for number, one in enumerate(said, 1):
        diagonal, row[0] = row[0], number
        for at, other in enumerate(written, 1):
            diagonal, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, diagonal + (one != other))
    return row[-1]


def score(references: Sequence[str], transcripts: Sequence[str]) -> dict[str, Any]:
    """Error rates over all of the speech: edits over what was said, so a long recording weighs more.

    Case, width and punctuation do not count. A script without spaces has a word for each character, so for
    Chinese `wer` is `cer`, but for what is written in Latin letters among it.

    Args:
        references: what was said.
        transcripts: what was written.

    Returns:
        `wer`, `cer` (0 is right; above 1 where more was written than said; None where nothing was said),
        `intervals`, and `wrong_words`, the edits of each transcript.
    """
    found: dict[str, Any] = {"intervals": {}}
    for name, units in (("wer", words), ("cer", characters)):
        pairs = [(units(said), units(written)) for said, written in zip(references, transcripts, strict=True)]
        wrong = [edits(*pair) for pair in pairs]
        lengths = [len(said) for said, _ in pairs]
        total = sum(lengths)
        found[name] = sum(wrong) / total if total else None
        if all(lengths):
            found["intervals"][name] = intervals.of_ratio(wrong, lengths)
        if name == "wer":
            found["wrong_words"] = wrong
    return found


def characters(text: str) -> list[str]:
    """The letters and digits of a text, in lower case."""
    return list("".join(words(text)))
