"""Scored and tagged texts, pairs and several tasks: a healthy corpus meets its suite, a defect is found."""

from __future__ import annotations

import pytest

from components.validate import columns
from components.validate import validate as stage

KINDS = ("scored-text", "tagged-text", "text-pair", "task-text", "labelled-image")
NO_ROWS = {"read": 0, "kept": 0, "quarantined": 0, "fraction": 0.0, "total_budget": 0.01, "over_total": False}
ACCOUNT = {**NO_ROWS, "reasons": []}
BETWEEN = "column_values_to_be_between"


def unmet(report, severity):
    return {
        (e["expectation"].removeprefix("expect_"), *e["columns"]): e
        for e in report["expectations"]
        if not e["success"] and e["severity"] == severity
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_corpus_meets_every_expectation(kind, corpus):
    report = stage.report(kind, corpus(kind), [], ACCOUNT)
    assert report["success"] and not unmet(report, "fail") and not unmet(report, "warn")
    assert len(report["expectations"]) >= 10


THREE = (3, 4, 5)  # of 200 rows: 1.5%, over the 1% that is forgiven
SPAN = {"start": 0, "end": 4, "label": "WORD"}
# dataset type, line -> changed fields, severity, the expectation that must say so, its columns
DEFECTS = {
    "no score": ("scored-text", {7: {"score": None}}, "fail", "column_values_to_not_be_null", "score"),
    "contradictory scores": (
        "scored-text",
        {n: {"text": "同"} for n in THREE},
        "fail",
        BETWEEN,
        "scores_for_text",
    ),
    "lost decimal point": ("scored-text", {7: {"score": 5500.0}}, "warn", BETWEEN, "score_deviations"),
    "contradictory entities": (
        "tagged-text",
        {n: {"text": "甲乙丙丁", "entities": [] if n == 4 else [SPAN]} for n in THREE},
        "fail",
        BETWEEN,
        "entities_for_text",
    ),
    "rare label": (
        "tagged-text",
        {7: {"entities": [{**SPAN, "label": "ODD"}]}},
        "warn",
        BETWEEN,
        "entity_label_examples",
    ),
    "marked once alone": (
        "tagged-text",
        {7: {"text": "甲乙丙丁在甲乙", "entities": [{"start": 0, "end": 2, "label": "WORD"}]}},
        "warn",
        BETWEEN,
        "entity_unmarked",
    ),
    "echo": (
        "text-pair",
        {n: {"anchor": f"同{n}", "positive": f"同{n}"} for n in THREE},
        "fail",
        "select_column_values_to_be_unique_within_record",
        "anchor",
        "positive",
    ),
    "negative that belongs": (
        "text-pair",
        {7: {"anchor": "问", "positive": "答", "negative": "另"}, 9: {"anchor": "问", "positive": "另"}},
        "fail",
        "column_values_to_be_in_set",
        "negative_belongs",
    ),
    "one positive for many": (
        "text-pair",
        {n: {"positive": "同一个回答"} for n in range(1, 40)},
        "warn",
        BETWEEN,
        "anchors_for_positive_fraction",
    ),
    "task of one label": (
        "task-text",
        {n: {"task": "odd", "label": "same"} for n in THREE},
        "fail",
        BETWEEN,
        "labels_of_task",
    ),
    "rare task": (
        "task-text",
        {n: {"task": "odd", "label": "+-+"[n - 3]} for n in THREE},
        "warn",
        BETWEEN,
        "task_examples",
    ),
    "contradictory labels": (
        "task-text",
        {n: {"task": "mood", "text": "同", "label": "+-+"[n - 3]} for n in THREE},
        "fail",
        BETWEEN,
        "labels_for_text",
    ),
    "two labels for one picture": (
        "labelled-image",
        {n: {"pixels": "same", "label": ("cat", "dog")[n % 2]} for n in THREE},
        "fail",
        BETWEEN,
        "labels_for_image",
    ),
    "picture of some dots": ("labelled-image", {7: {"width": 4}}, "fail", BETWEEN, "width"),
    "blank pictures": ("labelled-image", {n: {"spread": 0.0} for n in THREE}, "fail", BETWEEN, "spread"),
    "strip": ("labelled-image", {7: {"height": 300}}, "warn", BETWEEN, "aspect"),
    "spelling of a class": (
        "labelled-image",
        {2: {"label": "bird"}, 4: {"label": "Bird"}},
        "fail",
        BETWEEN,
        "label_spellings",
    ),
    "spelling": ("task-text", {2: {"label": "up"}, 4: {"label": "Up"}}, "fail", BETWEEN, "label_spellings"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_fails_its_expectation_and_is_shown_with_its_rows(name, corpus):
    kind, changes, severity, *expected = DEFECTS[name]
    report = stage.report(kind, corpus(kind, changes=changes), [], ACCOUNT)
    failed = unmet(report, severity)
    assert tuple(expected) in failed and report["success"] == (severity == "warn")
    lines = {int(row["origin"].split(":")[1]) for row in failed[tuple(expected)]["examples"]}
    assert lines and lines <= set(changes)


def test_two_tasks_may_spell_a_label_in_two_ways(corpus):
    spelled = {"one": ("Up", "Down"), "other": ("up", "down")}
    changes = {
        n: {"task": task, "label": spelled[task][n % 4 // 2]}
        for n in range(1, 41)
        for task in [("one", "other")[n % 2]]
    }
    rows = corpus("task-text", changes=changes)
    report = stage.report("task-text", rows, [], ACCOUNT)
    assert report["success"] and not unmet(report, "warn")


def test_a_corpus_without_entities_or_with_one_score_stops_the_line(corpus):
    none = corpus("tagged-text", changes={n: {"entities": []} for n in range(1, 201)})
    assert ("column_max_to_be_between", "entity_count") in unmet(
        stage.report("tagged-text", none, [], ACCOUNT), "fail"
    )
    same = corpus("scored-text", changes={n: {"score": 1.0} for n in range(1, 201)})
    failed = unmet(stage.report("scored-text", same, [], ACCOUNT), "fail")
    assert ("column_unique_value_count_to_be_between", "score") in failed


def test_entities_are_shown_as_a_reader_writes_them(corpus):
    table = columns.table("tagged-text", corpus("tagged-text", rows=10))
    assert table["entities"][0] == "WORD: 甲乙; NEXT: 丙丁" and table["entity_count"][0] == 2


def test_grey_among_coloured_pictures_is_said(corpus):
    report = stage.report(
        "labelled-image", corpus("labelled-image", changes={7: {"channels": 1}}), [], ACCOUNT
    )
    assert ("column_unique_value_count_to_be_between", "channels") in unmet(report, "warn")
