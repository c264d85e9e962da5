"""Ingest: every row is accounted for, whatever it looks like."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.ingest.config import IngestConfig, Normalise
from components.ingest.fields import normalise
from components.ingest.ingest import to_example
from components.ingest.reading import Fault, read
from components.shared.errors import StageStopped, TuneyardError

COLUMNS = {"prompt": "q", "completion": "a"}
GOOD = {"q": "什么是合同？", "a": "合同是协议。"}


BAD_LINES = {
    b'{"q": "x"': "bad_json",
    b'{"q": "\xff\xfe", "a": "y"}': "bad_encoding",
    b'{"q": "\\ud800", "a": "y"}': "bad_encoding",
    b'["q", "a"]': "not_an_object",
    b'{"q": "x"}': "missing_field",
    b'{"q": "x", "a": null}': "missing_field",
    b'{"q": "x", "a": 5}': "wrong_type",
    b'{"q": "x", "a": " \\u200b "}': "empty_field",
    b'{"q": NaN, "a": "y"}': "bad_json",
    b"[" * 2000: "bad_json",
}


def test_each_malformed_line_is_named_with_its_line_and_reason(run, tmp_path):
    good = json.dumps(GOOD, ensure_ascii=False).encode()
    lines = [good]
    for bad in BAD_LINES:
        lines += [bad, good]
    source = tmp_path / "corpus.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    result, kept, quarantine = run(source)
    assert [row["reason"] for row in quarantine] == list(BAD_LINES.values())
    assert [row["line"] for row in quarantine] == list(range(2, 2 * len(BAD_LINES) + 1, 2))
    assert all(row["file"] == str(source) for row in quarantine)
    assert [row["origin"]["line"] for row in kept] == list(range(1, len(lines) + 1, 2))
    assert result.summary["read"] == len(lines) == result.summary["kept"] + result.summary["quarantined"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=60), min_size=1, max_size=12))
def test_any_bytes_are_kept_or_quarantined_and_never_lost(run, tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("wild")
    good = json.dumps(GOOD).encode()
    body = [good, *(line.replace(b"\n", b" ").replace(b"\r", b" ") for line in lines)]
    (folder / "wild.jsonl").write_bytes(b"\n".join(body))
    result, _, _ = run(folder / "wild.jsonl")
    blank = sum(not line.strip() for line in body)
    assert result.summary["read"] + blank == len(body)


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".tsv", ".csv.gz", ".parquet"]
)
def test_every_format_gives_the_same_examples(run, tmp_path, suffix):
    source = tmp_path / f"corpus{suffix}"
    data = [GOOD, {"q": 'says "hi",\nthen\tleaves', "a": "好"}]
    if suffix == ".parquet":
        import polars

        polars.DataFrame(data).write_parquet(source)
    else:
        text = io.StringIO()
        if ".jsonl" in suffix:
            text.write("\n".join(json.dumps(row) for row in data))
        else:
            writer = csv.DictWriter(text, ["q", "a"], delimiter="\t" if ".tsv" in suffix else ",")
            writer.writeheader()
            writer.writerows(data)
        raw = text.getvalue().encode()
        if suffix.endswith(".gz"):
            raw = gzip.compress(raw)
        elif suffix.endswith(".zst"):
            import zstandard

            raw = zstandard.compress(raw)
        source.write_bytes(raw)
    _, examples, _ = run(source)
    assert [(row["prompt"], row["completion"]) for row in examples] == [(r["q"], r["a"]) for r in data]


def test_a_torn_gzip_keeps_what_came_before_and_says_so(run, tmp_path):
    whole = "\n".join(json.dumps({"q": f"question {i}", "a": f"answer {i}"}) for i in range(2000)).encode()
    source = tmp_path / "corpus.jsonl.gz"
    source.write_bytes(gzip.compress(whole)[:-2000])
    result, _, _ = run(source)
    assert 0 < result.summary["kept"] < 2000
    assert "torn_file" in result.summary["by_reason"]


def test_a_csv_row_with_too_few_cells_is_named_by_its_line(run, tmp_path):
    source = tmp_path / "corpus.csv"
    source.write_text('q,a\n"two\nlines",x\nonly one\nlast,y\n')
    _, examples, (bad,) = run(source)
    assert (bad["line"], bad["reason"]) == (4, "bad_csv")
    assert [row["origin"]["line"] for row in examples] == [2, 5]


@given(st.text(max_size=80))
def test_normalisation_is_idempotent(text):
    once = normalise(text, Normalise())
    assert normalise(once, Normalise()) == once


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_what_normalisation_changed_can_be_had_back(text):
    example = to_example({"q": text, "a": "answer"}, IngestConfig(source="x", columns=COLUMNS))
    if isinstance(example, Fault):
        assert example.reason == "empty_field"
    else:
        assert example.get("original", {}).get("prompt", example["prompt"]) == text


def test_equal_content_has_an_equal_id_wherever_it_stands(run, tmp_path):
    source = tmp_path / "corpus.jsonl"
    source.write_text(
        "\n".join(json.dumps(r) for r in (GOOD, GOOD | {"q": " 什么是合同？\r\n"}, GOOD | {"a": "别的"}))
    )
    _, examples, _ = run(source)
    first, second, third = (row["id"] for row in examples)
    assert first == second != third


def test_unmapped_columns_stop_the_line_and_name_the_columns_there_are(run, tmp_path):
    source = tmp_path / "corpus.jsonl"
    source.write_text('{"question": "x", "answer": "y"}\n')
    with pytest.raises(StageStopped, match=r"corpus.jsonl:1: missing_field .*'answer', 'question'"):
        run(source)


def test_an_unknown_format_says_which_are_known(run, tmp_path):
    (tmp_path / "corpus.docx").write_bytes(b"x")
    with pytest.raises(TuneyardError, match="jsonl"):
        run(tmp_path / "corpus.docx")
    with pytest.raises(TuneyardError, match="zst"):
        next(read(tmp_path / "corpus.docx"))


CALL = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"topic": "rent"}'}}
TOOL = {"name": "find", "parameters": {"type": "object"}}


def test_tools_their_calls_and_their_results_are_read_in_one_form(run, tmp_path):
    talk = [
        {"role": "user", "content": "Which statute?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "722", "tool_call_id": "1", "name": None},
        {"role": "assistant", "content": " Article 722. ", "tool_calls": None},
    ]
    source = tmp_path / "talk.jsonl"
    rows = [{"messages": talk, "tools": [TOOL]}, {"messages": talk, "tools": json.dumps([TOOL])}]
    source.write_text("\n".join(map(json.dumps, [*rows, {"messages": talk}])))
    _, examples, quarantine = run(source, format="conversational", columns={})
    assert not quarantine and "tools" not in examples[2]
    assert examples[0]["tools"] == examples[1]["tools"] == [{"type": "function", "function": TOOL}]
    assert examples[0]["id"] == examples[1]["id"] != examples[2]["id"]
    function = {"name": "find", "arguments": {"topic": "rent"}}
    assert examples[0]["messages"] == [
        talk[0],
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "722", "tool_call_id": "1"},
        {"role": "assistant", "content": "Article 722."},
    ]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "find"}}]}, "messages[1].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"function": "find"}]}, "messages[1].tool_calls[0]"),
        ({"role": "assistant", "content": None}, "messages[1].content"),
        ({"role": "judge", "content": "a"}, "messages[1]"),
    ],
)
def test_a_call_that_cannot_be_one_is_named(run, tmp_path, change, where):
    source = tmp_path / "talk.jsonl"
    fine = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    broken = {"messages": [fine["messages"][0], change]}
    source.write_text("\n".join(map(json.dumps, [fine, broken, fine | {"tools": "none"}])))
    _, examples, quarantine = run(source, format="conversational", columns={})
    assert len(examples) == 1
    assert [(row["line"], row["field"]) for row in quarantine] == [(2, where), (3, "tools")]


@pytest.mark.parametrize(
    ("form", "row", "example"),
    [
        ("scored-text", {"text": " a ", "score": "3.5"}, {"text": "a", "score": 3.5}),
        (
            "tagged-text",
            {"text": "  Acme\u200b pays", "entities": [{"start": 2, "end": 6, "label": "FIRM"}]},
            {"text": "Acme pays", "entities": [{"start": 0, "end": 4, "label": "FIRM"}]},
        ),
        (
            "text-pair",
            {"anchor": "a", "positive": "b", "negative": None},
            {"anchor": "a", "positive": "b"},
        ),
        (
            "task-text",
            {"task": "price", "text": "a", "label": 3},
            {"task": "price", "text": "a", "label": "3"},
        ),
    ],
)
def test_rows_of_encoders_become_examples(run, tmp_path, form, row, example):
    source = tmp_path / "corpus.jsonl"
    source.write_text(json.dumps(row))
    _, (kept,), quarantine = run(source, format=form, columns={})
    assert {name: kept[name] for name in example} == example and not quarantine
    assert set(kept) - set(example) <= {"id", "origin", "original"}


@pytest.mark.parametrize(
    ("form", "row", "field", "reason"),
    [
        ("scored-text", {"text": "a", "score": "high"}, "score", "wrong_type"),
        ("scored-text", {"text": "a", "score": True}, "score", "wrong_type"),
        ("scored-text", {"text": "a", "score": "nan"}, "score", "wrong_type"),
        (
            "tagged-text",
            {"text": "Acme", "entities": [{"start": 0, "end": 9, "label": "F"}]},
            "entities[0]",
            "bad_span",
        ),
        (
            "tagged-text",
            {
                "text": "Acme pays",
                "entities": [{"start": 0, "end": 4, "label": "F"}, {"start": 3, "end": 6, "label": "G"}],
            },
            "entities",
            "bad_span",
        ),
        ("tagged-text", {"text": "Acme", "entities": "Acme"}, "entities", "wrong_type"),
        ("text-pair", {"anchor": "a"}, "positive", "missing_field"),
        ("task-text", {"task": "", "text": "a", "label": "b"}, "task", "empty_field"),
    ],
)
def test_a_row_that_is_no_example_of_an_encoder_is_quarantined(run, tmp_path, form, row, field, reason):
    good = {
        "scored-text": {"text": "a", "score": 1},
        "tagged-text": {"text": "a", "entities": []},
        "text-pair": {"anchor": "a", "positive": "b"},
        "task-text": {"task": "t", "text": "a", "label": "b"},
    }[form]
    source = tmp_path / "corpus.jsonl"
    source.write_text(f"{json.dumps(good)}\n{json.dumps(row)}")
    _, kept, (bad,) = run(source, format=form, columns={})
    assert len(kept) == 1 and (bad["line"], bad["field"], bad["reason"]) == (2, field, reason)
