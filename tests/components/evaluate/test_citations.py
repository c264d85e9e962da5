from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.evaluate import citations

DIGITS = "零一二三四五六七八九"


def chinese(value: int) -> str:
    """The usual way to write 1 to 9999 in Chinese, independent of the code under test."""
    parts, pending_zero = [], False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = value // unit % 10
        if digit:
            parts.append(("零" if pending_zero else "") + DIGITS[digit] + name)
            pending_zero = False
        else:
            pending_zero = bool(parts)
    text = "".join(parts)
    return text[1:] if text.startswith("一十") else text


@given(st.integers(1, 9999))
def test_numerals_of_any_article(value):
    assert citations.number(chinese(value)) == value
    assert citations.number(str(value)) == value


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("《中华人民共和国民法典》第一千零八十七条离婚时", {("民法典", "1087")}),
        ("根据《行政诉讼法》第59条第一款第（一）项", {("行政诉讼法", "59")}),
        ("《刑法》第一百二十条之一规定", {("刑法", "120之1")}),
        ("《刑事诉讼法》（2018年修正）的第十二条", {("刑事诉讼法", "12")}),
        ("《民法典》第五百七十七条、第五百七十八条", {("民法典", "577"), ("民法典", "578")}),
        ("《关于适用《民法典》的解释》第三条", {("关于适用民法典的解释", "3")}),
        (
            "《最高人民法院关于适用〈中华人民共和国民法典〉的解释》第３条",
            {("最高人民法院关于适用民法典的解释", "3")},
        ),
        ("《学生管理规定》</span>第四十五条", {("学生管理规定", "45")}),
        ("《劳动法》保护劳动者，见合同第三条", set()),
        ("根据证券法第十条", set()),
        ("", set()),
    ],
)
def test_citations_of_a_text(text, found):
    assert citations.citations(text) == found


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("见《合同法》第44条。", True),
        ("见《中华人民共和国合同法》第四十四条。", True),
        ("根据合同法的第四十四条", True),
        ("根据劳动合同法第四十四条", False),
        ("《劳动合同法》第四十四条", False),
        ("《合同法》第四条、第四十四条", True),
        ("《合同法》第四百四十四条", False),
        ("《合同法》，又及：《民法典》第四十四条", False),
        ("", False),
    ],
)
def test_an_answer_gives_a_citation(answer, right):
    assert citations.cites(answer, ("合同法", "44")) is right


def test_accuracy_counts_only_references_that_cite():
    references = ["依《民法典》第一条", "没有依据", "依《刑法》第二条、第三条"]
    answers = ["《民法典》第1条", "《民法典》第1条", "《刑法》第三条"]
    assert citations.accuracy(references, answers) == (0.75, 2)
    assert citations.accuracy(["no statute"], ["《民法典》第1条"]) == (None, 0)
