"""What any honest corpus of scored or tagged texts, of pairs, or of several tasks keeps; see suite.py."""

from __future__ import annotations

from components.validate.expectation import (
    MAX_LABEL_CHARACTERS,
    MIN_LABEL_EXAMPLES,
    MOSTLY,
    READABLE,
    Expectation,
    uncut,
    written,
)

_BETWEEN = "expect_column_values_to_be_between"
# A normal score is that far out once in 10^9; one that is has lost its decimal point.
_FAR_DEVIATIONS = 6
# As for answers (suite.py): one positive for many anchors may be meant, one for nearly all is a constant.
_WARN_SHARED_POSITIVE = 0.10
_MAX_SHARED_POSITIVE = 0.90


def scores() -> list[Expectation]:
    """Of scored-text."""
    return [
        Expectation("expect_column_values_to_not_be_null", {"column": "score"}, "every example has a score"),
        Expectation(
            "expect_column_unique_value_count_to_be_between",
            {"column": "score", "min_value": 2},
            "there are at least 2 different scores, else there is nothing to learn",
        ),
        Expectation(
            _BETWEEN,
            {"column": "scores_for_text", "max_value": 1, "mostly": MOSTLY},
            "an identical text has one score, not several that contradict each other",
            show=("text", "score"),
            together="text",
        ),
        Expectation(
            _BETWEEN,
            {"column": "score_deviations", "max_value": _FAR_DEVIATIONS},
            f"no score is more than {_FAR_DEVIATIONS} standard deviations from the mean",
            severity="warn",
            show=("score", "text"),
        ),
        uncut("text_at_limit", "text"),
    ]


def entities() -> list[Expectation]:
    """Of tagged-text."""
    return [
        Expectation(
            "expect_column_max_to_be_between",
            {"column": "entity_count", "min_value": 1},
            "some example holds an entity",
        ),
        Expectation(
            _BETWEEN,
            {"column": "entities_for_text", "max_value": 1, "mostly": MOSTLY},
            "an identical text has the same entities each time",
            show=("text", "entities"),
            together="text",
        ),
        Expectation(
            _BETWEEN,
            {"column": "entity_label_examples", "min_value": MIN_LABEL_EXAMPLES},
            f"every label has at least {MIN_LABEL_EXAMPLES} entities",
            severity="warn",
            show=("entities",),
        ),
        Expectation(
            _BETWEEN,
            {"column": "entity_unmarked", "max_value": 0},
            "an entity is marked wherever its text stands in an example, not once alone",
            severity="warn",
            show=("entities", "text"),
        ),
        uncut("text_at_limit", "text"),
    ]


def pairs(negatives: bool) -> list[Expectation]:
    """Of text-pair; `negatives`: whether there are hard negatives."""
    shared = "anchors_for_positive_fraction"
    found = [
        Expectation(
            "expect_select_column_values_to_be_unique_within_record",
            {"column_list": ["anchor", "positive"], "mostly": MOSTLY},
            "no positive just repeats its anchor, which teaches nothing",
        ),
        Expectation(
            _BETWEEN,
            {"column": shared, "max_value": _WARN_SHARED_POSITIVE},
            f"no positive belongs to more than {_WARN_SHARED_POSITIVE:.0%} of the anchors",
            severity="warn",
            show=("positive", "anchor"),
            together="positive",
        ),
        Expectation(
            "expect_column_max_to_be_between",
            {"column": shared, "max_value": _MAX_SHARED_POSITIVE},
            f"the commonest positive belongs to at most {_MAX_SHARED_POSITIVE:.0%} of the anchors",
        ),
        uncut("positive_at_limit", "positive"),
    ]
    if negatives:
        found += [
            Expectation(
                "expect_column_values_to_be_in_set",
                {"column": "negative_belongs", "value_set": [False]},
                "no negative is a positive of the same anchor: it would be pulled and pushed at once",
                show=("anchor", "positive", "negative"),
                together="anchor",
            )
        ]
    return found


def tasks() -> list[Expectation]:
    """Of task-text."""
    every = [e for name in ("task", "label") for e in written(name, MAX_LABEL_CHARACTERS)]
    names = [e for e in every if e.kwargs.get("regex") != READABLE]  # "+" and "-" are labels
    return [
        *names,
        Expectation(
            _BETWEEN,
            {"column": "labels_of_task", "min_value": 2},
            "every task has at least 2 different labels",
            show=("task", "label"),
            together="task",
        ),
        Expectation(
            _BETWEEN,
            {"column": "labels_for_text", "max_value": 1, "mostly": MOSTLY},
            "an identical text has one label in a task, not several that contradict each other",
            show=("task", "text", "label"),
            together="text",
        ),
        Expectation(
            _BETWEEN,
            {"column": "label_spellings", "max_value": 1},
            "no two labels of a task differ in case, width or blanks alone",
            show=("task", "label"),
        ),
        Expectation(
            _BETWEEN,
            {"column": "task_examples", "min_value": MIN_LABEL_EXAMPLES},
            f"every task has at least {MIN_LABEL_EXAMPLES} examples",
            severity="warn",
            show=("task",),
        ),
        uncut("text_at_limit", "text"),
    ]
