"""Citations of Chinese statutes, 《law》第N条, and whether an answer gives those of its reference."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

Citation = tuple[str, str]

_DIGITS = {
    c: v for v, cs in enumerate(("零〇○", "一", "二两", "三", "四", "五", "六", "七", "八", "九")) for c in cs
}
_UNITS = {"十": 10, "百": 100, "千": 1000}
_NUMBER = r"[零〇○一二两三四五六七八九十百千\d]+"
_ARTICLE = rf"第\s*(?:{_NUMBER})\s*条(?:之(?:{_NUMBER}))?"
# A title may hold one more title: 《关于适用《民法典》的解释》.
_LAW = r"《((?:[^《》]|《[^《》]*》)+)》"
# What may stand between a law and its article: (2018年修正), 的, 规定:, 第三章, a closing tag.
_BETWEEN = rf"(?:[（(][^（）()]{{0,24}}[）)]|</?\w+>|[的之中\s:：,，“\"]|规定|第{_NUMBER}[编章节])*"
_CLAUSE = rf"(?:第?[（(]?{_NUMBER}[）)]?[款项])*"
_FURTHER = rf"(?:{_CLAUSE}[、，,和及与或以至到\s]+{_ARTICLE})*"
_CITED = re.compile(rf"{_LAW}{_BETWEEN}({_ARTICLE}{_FURTHER})")
_ARTICLE_PARTS = re.compile(rf"第\s*({_NUMBER})\s*条(?:之({_NUMBER}))?")
# Without title marks a law's name must begin where a name can begin: 合同法第十条 is not in 劳动合同法第十条.
_BEFORE_BARE = r"(?:^|[\s，。；：、:;,（(“\"]|根据|依据|依照|按照|违反|适用|我国|的|和|与|及)"


def number(text: str) -> int:
    """Value of a Chinese or Arabic numeral below 10000: 一千零八十七, 十二, 二〇, ５９.

    Raises:
        ValueError: it is none.
    """
    if all(c.isdecimal() or c in _DIGITS for c in text):
        return int("".join(str(_DIGITS[c]) if c in _DIGITS else c for c in text))
    total, digit = 0, 0
    for character in text:
        if character in _UNITS:
            # 十二: no digit before the first unit means one of it
            total += (digit or (0 if total else 1)) * _UNITS[character]
            digit = 0
        elif character in _DIGITS:
            digit = _DIGITS[character]
        else:
            raise ValueError(f"{text!r} is no numeral")
    return total + digit


def law_name(title: str) -> str:
    """A title as it is compared: without 中华人民共和国, title marks, notes in parentheses and spaces."""
    title = re.sub(r"[（(].*?[）)]|</?\w+>", "", unicodedata.normalize("NFKC", title))
    return re.sub(r"中华人民共和国|[《》〈〉<>\s]", "", title)


def _articles(run: str) -> list[str]:
    return [
        f"{number(main)}" + (f"之{number(sub)}" if sub else "")
        for main, sub in _ARTICLE_PARTS.findall(run)
        if main
    ]


def citations(text: str) -> set[Citation]:
    """Every (law, article) that a text cites as 《law》第N条, lists of articles included."""
    found: set[Citation] = set()
    for law, run in _CITED.findall(text):
        for article in _articles(run):
            found.add((law_name(law), article))
    return found


def cites(answer: str, citation: Citation) -> bool:
    """Whether an answer gives this citation, with or without the title marks."""
    if citation in citations(answer):
        return True
    law, article = citation
    plain = re.sub("[《》〈〉<>]", " ", unicodedata.normalize("NFKC", answer).replace("中华人民共和国", " "))
    bare = re.compile(rf"{_BEFORE_BARE}{re.escape(law)}{_BETWEEN}({_ARTICLE}{_FURTHER})")
    return any(article in _articles(run) for run in bare.findall(plain))


def accuracy(references: Sequence[str], answers: Sequence[str]) -> tuple[float | None, int]:
    """How many of the references that cite a statute have it cited in their answer.

    Args:
        references: what should have been said.
        answers: what was said, in the same order.

    Returns:
        The mean over citing references of the share of their citations that the answer gives (0-1; nearly
        all cite one, so this is the fraction answered rightly), None when none cites; and how many cite.
    """
    shares = []
    for reference, answer in zip(references, answers, strict=True):
        wanted = citations(reference)
        if wanted:
            shares.append(sum(cites(answer, citation) for citation in wanted) / len(wanted))
    return (sum(shares) / len(shares) if shares else None), len(shares)
