"""A healthy corpus meets its suite; each defect is found by the expectation made for it, with its rows."""

from __future__ import annotations

import json

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from components.validate import columns
from components.validate import validate as stage

KINDS = ("prompt-completion", "conversational", "labelled-text")
NO_ROWS = {"read": 0, "kept": 0, "quarantined": 0, "fraction": 0.0, "total_budget": 0.01, "over_total": False}
ACCOUNT = {**NO_ROWS, "reasons": []}


def unmet(report):
    return {
        (e["expectation"].removeprefix("expect_"), *e["columns"]): e
        for e in report["expectations"]
        if not e["success"]
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_corpus_meets_every_expectation(kind, corpus):
    report = stage.report(kind, corpus(kind), [], ACCOUNT)
    assert report["success"] and not unmet(report)
    assert report["rows"] == 200 and report["duplicates"] == 0
    assert len(report["expectations"]) >= 15


def turns(*roles_and_contents):
    return {"messages": [{"role": role, "content": content} for role, content in roles_and_contents]}


THREE = (3, 4, 5)  # of 200 rows: 1.5%, over the 1% that is forgiven
PC, CO, LT = KINDS
BETWEEN, REGEX = "column_values_to_be_between", "column_values_to_match_regex"
NO_REGEX, LENGTHS = "column_values_to_not_match_regex", "column_value_lengths_to_be_between"
# What is wrong: (dataset type, line -> changed fields, the expectation that must say so, its columns...)
DEFECTS = {
    "null": (PC, {7: {"prompt": None}}, "column_values_to_not_be_null", "prompt"),
    "empty answer": (PC, {7: {"completion": ""}}, LENGTHS, "completion"),
    "swallowed file": (LT, {7: {"text": "a b " * 25_001}}, LENGTHS, "text"),
    "a number": (PC, {7: {"completion": 5}}, "column_values_to_be_of_type", "completion"),
    "only dots": (PC, {n: {"completion": "…" * n} for n in THREE}, REGEX, "completion"),
    "lost bytes": (PC, {n: {"completion": f"回答{n}\ufffd"} for n in THREE}, NO_REGEX, "completion"),
    "read as Windows-1252": (LT, {n: {"text": f"the bank{n}â€™s profit"} for n in THREE}, NO_REGEX, "text"),
    "placeholders": (
        PC,
        {n: {"completion": text} for n, text in zip(THREE, ("TODO", "待补充。", "N/A"), strict=True)},
        f"{NO_REGEX}_list",
        "completion",
    ),
    "refusals": (
        PC,
        {n: {"completion": f"作为一个AI语言模型，我不能回答{n}"} for n in THREE},
        f"{NO_REGEX}_list",
        "completion",
    ),
    "echo": (
        PC,
        {n: {"prompt": f"重复{n}", "completion": f"重复{n}"} for n in THREE},
        "select_column_values_to_be_unique_within_record",
        "prompt",
        "completion",
    ),
    "contradictory answers": (
        PC,
        {n: {"prompt": "定金可以退吗？"} for n in (3, 90, 151)},
        BETWEEN,
        "answers_for_prompt",
    ),
    "contradictory labels": (LT, {n: {"text": "fed sets"} for n in THREE}, BETWEEN, "labels_for_text"),
    "spelling of a label": (LT, {n: {"label": "Acq"} for n in range(3, 40, 3)}, BETWEEN, "label_spellings"),
    "assistant does not end": (
        CO,
        {7: turns(("user", "问"), ("assistant", "答"), ("user", "再问"))},
        REGEX,
        "roles",
    ),
    "user twice": (CO, {7: turns(("user", "问"), ("user", "再问"), ("assistant", "答"))}, REGEX, "roles"),
    "empty message": (
        CO,
        {7: turns(("user", "问"), ("assistant", " "), ("user", "再问"), ("assistant", "答"))},
        BETWEEN,
        "empty_messages",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_fails_its_expectation_and_is_shown_with_its_rows(name, corpus):
    kind, changes, *expected = DEFECTS[name]
    report = stage.report(kind, corpus(kind, changes=changes), [], ACCOUNT)
    failed = {key: e for key, e in unmet(report).items() if e["severity"] == "fail"}
    assert tuple(expected) in failed and not report["success"]
    entry = failed[tuple(expected)]
    if name != "spelling of a label":  # there the rows of the other spelling are shown too
        assert entry["unexpected_count"] == len(changes)
        assert {row["origin"] for row in entry["examples"]} == {
            f"corpus.jsonl:{line}" for line in list(changes)[:5]
        }
    assert entry["expectation"] in stage.faults(report)[list(failed).index(tuple(expected))]
    # Apart from a value that is no string, a defect is one fault and not a heap of them.
    assert len(failed) == 1 or name in ("a number", "empty answer")


def test_one_slip_in_a_hundred_is_forgiven_and_still_shown(corpus):
    report = stage.report(
        "prompt-completion", corpus("prompt-completion", changes={9: {"completion": "TODO"}}), [], ACCOUNT
    )
    assert report["success"]
    (entry,) = [e for e in report["expectations"] if e["expectation"].endswith("not_match_regex_list")]
    assert (entry["success"], entry["unexpected_count"], entry["unexpected_percent"]) == (True, 1, 0.5)
    assert entry["examples"] == [{"origin": "corpus.jsonl:9", "values": {"completion": "TODO"}}]


def test_duplicates_are_counted_exactly_and_warn(corpus):
    same = {"text": "fed sets repurchase", "label": "earn"}
    report = stage.report(
        "labelled-text", corpus("labelled-text", changes=dict.fromkeys((5, 6, 80), same)), [], ACCOUNT
    )
    assert report["success"] and report["duplicates"] == 2
    entry = unmet(report)[("column_values_to_be_unique", "id")]
    assert entry["severity"] == "warn" and entry["unexpected_count"] == 3


def test_examples_in_the_corpus_and_in_its_test_split_are_counted(corpus):
    rows = corpus("labelled-text")
    for row in (dict(rows[3]), dict(rows[4])):
        rows.append({**row, "origin": {"file": "test.jsonl", "line": 1, "part": "test"}})
    assert stage.report("labelled-text", rows, [], ACCOUNT)["in_main_and_test"] == 2


@pytest.mark.parametrize("labels", [("earn",), tuple(f"name {n}" for n in range(200))])
def test_one_label_or_a_label_for_each_row_fails(labels, corpus):
    changes = {n: {"label": labels[n % len(labels)]} for n in range(1, 201)}
    report = stage.report("labelled-text", corpus("labelled-text", changes=changes), [], ACCOUNT)
    assert unmet(report)[("column_unique_value_count_to_be_between", "label")]["observed"] == len(labels)
    assert not report["success"]


def test_an_imbalance_over_ten_to_one_warns_with_the_ratio(corpus):
    changes = {n: {"label": "earn" if n > 12 else "ship"} for n in range(1, 201)}
    report = stage.report("labelled-text", corpus("labelled-text", changes=changes), [], ACCOUNT)
    assert report["success"]
    assert unmet(report)[("column_max_to_be_between", "label_imbalance")]["observed"] == pytest.approx(
        188 / 12
    )
    assert list(report["labels"].items()) == [("earn", 188), ("ship", 12)]


def test_one_answer_for_nearly_all_prompts_fails_and_for_a_fifth_warns(corpus):
    for rows, severity in ((190, "fail"), (40, "warn")):
        changes = {n: {"completion": "请咨询专业律师。"} for n in range(1, rows + 1)}
        report = stage.report("prompt-completion", corpus("prompt-completion", changes=changes), [], ACCOUNT)
        assert report["success"] == (severity == "warn")
        column = "prompts_for_answer_fraction"
        assert unmet(report)[("column_values_to_be_between", column)]["unexpected_count"] == rows
        assert (("column_max_to_be_between", column) in unmet(report)) == (severity == "fail")


def test_answers_that_an_export_cut_fail_even_when_another_file_has_longer_ones(corpus):
    rows = corpus("prompt-completion", 300)
    for row in rows[150:]:
        row["completion"] *= 4
    for row in rows[:150]:
        row["completion"] = (row["completion"] * 3)[:255]
        row["origin"] = {**row["origin"], "file": "june.csv"}
    entry = unmet(stage.report("prompt-completion", rows, [], ACCOUNT))[
        ("column_values_to_be_in_set", "completion_at_limit")
    ]
    assert entry["severity"] == "fail" and entry["unexpected_count"] >= 100
    assert all(row["origin"].startswith("june.csv:") for row in entry["examples"])


@given(st.lists(st.integers(100, 4000), min_size=30, max_size=300), st.integers(120, 2000))
def test_a_limit_is_found_where_texts_are_cut(sizes, limit):
    texts = [f"{n} " + "x" * size for n, size in enumerate(sizes)]
    cut = [text[:limit] for text in texts]
    piled = sum(len(text) >= limit for text in texts)
    below = max((sum(len(t) == limit - step for t in texts) for step in range(1, 11)), default=0)
    found = columns._at_limit(cut, [{"origin": {"file": "a"}}] * len(cut))
    if piled >= max(5, 3 * below):
        assert sum(found) == piled
    else:
        assert not any(found)


def test_web_markup_in_answers_warns(corpus):
    changes = {
        3: {"completion": "<p>可以退。</p>"},
        4: {"completion": "定金&nbsp;不退 a<b"},
        5: {"completion": "若 a<b 则 c>d"},
    }
    report = stage.report("prompt-completion", corpus("prompt-completion", changes=changes), [], ACCOUNT)
    entry = unmet(report)[("column_values_to_be_between", "completion_markup")]
    assert report["success"] and [row["origin"] for row in entry["examples"]] == [
        "corpus.jsonl:3",
        "corpus.jsonl:4",
    ]


def test_rows_that_contradict_each_other_are_shown_side_by_side(corpus):
    changes = {n: {"prompt": f"问题{n % 2}？"} for n in (10, 11, 12, 13)}
    report = stage.report("prompt-completion", corpus("prompt-completion", changes=changes), [], ACCOUNT)
    entry = unmet(report)[("column_values_to_be_between", "answers_for_prompt")]
    assert [row["origin"].split(":")[1] for row in entry["examples"]] == ["10", "12", "11", "13"]


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_too_few_examples_fail(rows, corpus):
    report = stage.report("labelled-text", corpus("labelled-text", rows), [], ACCOUNT)
    assert unmet(report)[("table_row_count_to_be_between",)]["observed"] == rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


# Not shrunk: each try costs a run of the library, and the rows are small already.
@settings(max_examples=6, deadline=None, phases=[Phase.generate])
@given(st.sampled_from(KINDS), st.lists(JSON, min_size=1, max_size=12))
def test_whatever_a_field_holds_there_is_a_report_and_not_a_traceback(kind, values):
    first = {"prompt-completion": "completion", "conversational": "messages", "labelled-text": "text"}[kind]
    other = {"prompt": "问", "label": "a"}
    rows = [
        {**other, first: v, "id": str(n), "origin": {"file": "f", "line": n}} for n, v in enumerate(values)
    ]
    report = stage.report(kind, rows, [], ACCOUNT)
    assert not report["success"] or len(rows) >= 10
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("healthy", [True, False])
def test_results_of_tools_follow_a_call_of_the_assistant(corpus, healthy):
    rows = corpus(CO)
    call = {"type": "function", "function": {"name": "find", "arguments": {}}}
    for row in rows[:9]:
        last = row["messages"].pop()
        calls = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "content": "Article 722"}
        row["messages"] += [calls, result, last] if healthy else [result, calls, last]
    found = unmet(stage.report(CO, rows, [], ACCOUNT))
    assert not found if healthy else list(found) == [(REGEX, "roles")]
