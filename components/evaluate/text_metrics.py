"""How close an answer is to its reference, in Chinese, English and other scripts.

The usual tools each fail in one: rouge_score keeps only a-z and 0-9, so that two identical Chinese strings
score 0.0, and BLEU on words sees a Chinese sentence as a single word. Here text of scripts without spaces
counts by character, all other by word, and `self_test` holds that on the corpus itself before a number is
believed.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from components.shared.errors import TuneyardError

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_UNRELATED_AT_MOST = 0.05
_SELF_TESTED = 40  # references; enough to meet a corpus's script, and it takes a second


@cache
def _word() -> Any:
    import regex

    # V1: set difference. A mark (accent, vowel sign) belongs to the letter before it.
    return regex.compile(rf"(?V1)[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{_UNSPACED}]]+")


@cache
def _unspaced() -> Any:
    import regex

    return regex.compile(f"[{_UNSPACED}]")


def words(text: str) -> list[str]:
    """What ROUGE-L and TF-IDF count: characters of unspaced scripts, lower-case words of all others."""
    return _word().findall(unicodedata.normalize("NFKC", text).lower())


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited" (2004), figure 2: a zero bit in the row
    marks where the length grows.
    """
    where: dict[str, int] = {}
    for position, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << position
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        matches = row & where.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L F1, 0-1 (Lin, "ROUGE: a package for automatic evaluation of summaries", 2004, section 3).

    Two texts without any word (punctuation alone) score 1 when they are equal, else 0.
    """
    ours, theirs = words(reference), words(answer)
    if not ours and not theirs:
        return float(reference.strip() == answer.strip())
    # 2PR / (P + R) with P = lcs / |answer| and R = lcs / |reference|
    return 2 * lcs_length(ours, theirs) / (len(ours) + len(theirs))


def exact_match(reference: str, answer: str) -> bool:
    """Whether they are equal after Unicode NFKC and with white space collapsed."""
    return _squeezed(reference) == _squeezed(answer)


def _squeezed(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def bleu_tokenizer(references: Sequence[str]) -> str:
    """The sacrebleu tokenizer for the language of the references: `zh`, `char` or `13a`."""
    import regex

    letters = [c for text in references for c in text if c.isalpha()]
    unspaced = [c for c in letters if _unspaced().match(c)]
    if len(unspaced) * 2 < len(letters) or not letters:
        return "13a"
    han = sum(1 for c in unspaced if regex.match(r"\p{Han}", c))
    # Japanese is a third to half kana, which the zh tokenizer leaves in one piece.
    return "zh" if han > 0.9 * len(unspaced) else "char"


def bleu(references: Sequence[str], answers: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU, 0-1, and sacrebleu's signature of how it was computed.

    Effective order: answers shorter than four words would otherwise score 0 however right they are.
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=bleu_tokenizer(references), effective_order=True, force=True)
    score = metric.corpus_score(list(answers), [list(references)]).score / 100
    return min(score, 1.0), str(metric.get_signature())


def _foreign_words(vocabulary: set[str]) -> Iterator[tuple[str, str]]:
    """Endless pairs (a character, a word) that the vocabulary lacks."""
    characters = [c for c in map(chr, range(0x4E00, 0x9FA6)) if c not in vocabulary] or ["\u9fbb"]
    number = 0
    while True:
        word = f"zq{number}qz"
        if word not in vocabulary:
            yield characters[number % len(characters)], word
        number += 1


def unrelated(text: str, vocabulary: set[str]) -> str:
    """A text of the same length and kind of script that shares no word with the vocabulary."""
    foreign = _foreign_words(vocabulary)
    pairs = ((word, next(foreign)) for word in words(text))
    return "".join(
        character if _unspaced().match(word) else f" {other} " for word, (character, other) in pairs
    )


def self_test(references: Sequence[str]) -> None:
    """Check the metrics on the corpus itself: identical texts score 1, unrelated ones near 0.

    Raises:
        TuneyardError: a metric does not hold for this language; names it, its score and the text.
    """
    texts = [text for text in references if words(text)][:_SELF_TESTED]
    if not texts:
        raise TuneyardError(
            f"none of {len(references)} references holds a letter or digit: ROUGE-L and BLEU mean nothing",
            "check the columns of the corpus",
        )
    vocabulary = {word for text in texts for word in words(text)}
    strangers = [unrelated(text, vocabulary) for text in texts]
    faults = [
        f"ROUGE-L of {t[:40]!r} with itself is {rouge_l(t, t):.3f}" for t in texts if rouge_l(t, t) != 1
    ]
    if not all(exact_match(text, text) for text in texts):
        faults.append("a text does not match itself exactly")
    if (same := bleu(texts, texts)[0]) < 0.999:
        faults.append(f"BLEU of the references with themselves is {same:.3f}")
    worst = max(rouge_l(text, other) for text, other in zip(texts, strangers, strict=True))
    if worst > _UNRELATED_AT_MOST:
        faults.append(f"ROUGE-L of unrelated texts reaches {worst:.3f}")
    if (other := bleu(texts, strangers)[0]) > _UNRELATED_AT_MOST:
        faults.append(f"BLEU of unrelated texts is {other:.3f}")
    if faults:
        raise TuneyardError(
            f"the text metrics do not hold for this corpus: {'; '.join(faults[:5])}",
            "its script needs a tokeniser of its own in components/evaluate/text_metrics.py",
        )
