"""The suite of each dataset type: what any honest corpus of it keeps, and why each threshold is what it is.

Two severities. `fail` stops the line: training on it would teach a defect or break. `warn` is reported: a
corpus may be like that on purpose, and its owner should know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from components.shared import examples
from components.validate import columns, encoder_suite, media_suite, preferences
from components.validate.expectation import (
    MAX_LABEL_CHARACTERS,
    MIN_LABEL_EXAMPLES,
    MOSTLY,
    PLACEHOLDERS,
    Expectation,
    uncut,
    written,
)

if TYPE_CHECKING:
    import pandas as pd

# A test side of 15% holds one example of ten; below that no number of evaluate means anything.
MIN_ROWS = 10
# Longer than any answer or ruling: a lost quotation mark has swallowed the rest of a CSV file.
MAX_CHARACTERS = 100_000
MAX_DOCUMENT_CHARACTERS = 5_000_000  # a whole code of law; training splits it
MAX_IMBALANCE = 10
# Tasks with a few fixed answers (LawBench's dispute focus: 0.23 of prompts share one) are legitimate, so this
# warns; one answer for nine prompts of ten teaches a constant, which loss rewards.
WARN_SHARED_ANSWER = 0.10
MAX_SHARED_ANSWER = 0.90

# U+FFFD is what a decoder writes for bytes it lost; then those bytes once more through GBK; then quotation
# marks, accented letters and a byte order mark of UTF-8 that were read as Windows-1252 and saved again.
DAMAGED = (
    "\ufffd|\u951f\u65a4\u62f7|\u00e2\u20ac[\u2122\u0153\u02dc\u0161\u201c\u201d\u00a6\u00a2]"
    "|\u00c3[\u0080-\u00bf]|\u00ef\u00bb\u00bf"
)
# `calls`: the assistant calls tools, whose results follow.
ROLES = (
    r"^(?:system )?(?:user (?:calls (?:tool )+)*assistant )*user (?:calls (?:tool )+)*(?:assistant|calls)$"
)


def of(dataset_type: str, table: pd.DataFrame) -> list[Expectation]:
    """The suite of a dataset type, for this table (see columns.table)."""
    enough = Expectation(
        "expect_table_row_count_to_be_between",
        {"min_value": MIN_ROWS},
        f"there are at least {MIN_ROWS} examples",
    )
    if table.empty:  # every other expectation would hold of nothing
        return [enough]
    present = [name for name in columns.text_columns(dataset_type) if table[name].notna().any()]
    required = _required(dataset_type)
    longest = MAX_DOCUMENT_CHARACTERS if dataset_type == "language-modeling" else MAX_CHARACTERS
    found = [
        enough,
        *(e for name in required for e in written(name, longest)),
        *map(_undamaged, present),
    ]
    match dataset_type:
        case "labelled-text":
            found += _labels(len(table), "text")
            found += [uncut("text_at_limit", "text")]
        case "labelled-image":
            found += _labels(len(table), "image") + media_suite.pictures()
        case "transcribed-audio":
            found += media_suite.recordings()
        case "prompt-completion":
            found += _answers()
        case "conversational":
            found += _answers() + _turns()
        case "scored-text":
            found += encoder_suite.scores()
        case "tagged-text":
            found += encoder_suite.entities()
        case "text-pair":
            found += encoder_suite.pairs(table["negative"].notna().any())
        case "task-text":
            found += encoder_suite.tasks()
        case "preference":
            found += preferences.of_pairs()
        case "prompt-only":
            found += preferences.of_prompts()
    return [*found, _repeated(dataset_type)]


def _undamaged(name: str) -> Expectation:
    return Expectation(
        "expect_column_values_to_not_match_regex",
        {"column": name, "regex": DAMAGED, "mostly": MOSTLY},
        f"no {name} was damaged by a wrong encoding (U+FFFD and the like)",
    )


def _answers() -> list[Expectation]:
    shared = "prompts_for_answer_fraction"
    return [
        Expectation(
            "expect_column_values_to_not_match_regex_list",
            {"column": "completion", "regex_list": list(PLACEHOLDERS), "mostly": MOSTLY},
            "no completion is a placeholder or a chat bot's refusal",
        ),
        Expectation(
            "expect_select_column_values_to_be_unique_within_record",
            {"column_list": ["prompt", "completion"], "mostly": MOSTLY},
            "no completion just repeats its prompt",
        ),
        Expectation(
            "expect_column_values_to_be_between",
            {"column": "answers_for_prompt", "max_value": 1, "mostly": MOSTLY},
            "an identical prompt has one answer, not several that contradict each other",
            show=("prompt", "completion"),
            together="prompt",
        ),
        Expectation(
            "expect_column_values_to_be_between",
            {"column": shared, "max_value": WARN_SHARED_ANSWER},
            f"no answer is given to more than {WARN_SHARED_ANSWER:.0%} of the prompts",
            severity="warn",
            show=("completion", "prompt"),
            together="completion",
        ),
        Expectation(
            "expect_column_max_to_be_between",
            {"column": shared, "max_value": MAX_SHARED_ANSWER},
            f"the commonest answer is given to at most {MAX_SHARED_ANSWER:.0%} of the prompts",
        ),
        Expectation(
            "expect_column_values_to_be_between",
            {"column": "completion_markup", "max_value": 0},
            "no completion holds tags or entities of a web page, which the model would learn to write",
            severity="warn",
            show=("completion",),
        ),
        uncut("completion_at_limit", "completion"),
    ]


def _turns() -> list[Expectation]:
    return [
        Expectation(
            "expect_column_values_to_match_regex",
            {"column": "roles", "regex": ROLES},
            "user and assistant take turns, after a system message or none, the assistant ends, and results "
            "of tools follow their call",
            show=("roles", "prompt"),
        ),
        Expectation(
            "expect_column_values_to_be_between",
            {"column": "empty_messages", "max_value": 0},
            "no message of a conversation is empty",
            show=("roles", "prompt", "completion"),
        ),
    ]


def _labels(rows: int, what: str) -> list[Expectation]:
    """Of labels; `what` they are given to."""
    most = max(2, rows // 2)
    readable = "expect_column_values_to_match_regex"
    names = [
        e for e in written("label", MAX_LABEL_CHARACTERS) if e.type != readable
    ]  # "+" and "-" are labels
    return [
        *names,
        Expectation(
            "expect_column_unique_value_count_to_be_between",
            {"column": "label", "min_value": 2, "max_value": most},
            f"there are at least 2 labels, and at most {most:,} (half the rows), else they are ids",
        ),
        Expectation(
            "expect_column_values_to_be_between",
            {"column": "label_spellings", "max_value": 1},
            "no two labels differ in case, width or blanks alone",
            show=("label",),
        ),
        Expectation(
            "expect_column_values_to_be_between",
            {"column": f"labels_for_{what}", "max_value": 1, "mostly": MOSTLY},
            f"an identical {what} has one label, not several that contradict each other",
            show=(what, "label"),
            together="text" if what == "text" else "pixels",
        ),
        Expectation(
            "expect_column_values_to_be_between",
            {"column": "label_examples", "min_value": MIN_LABEL_EXAMPLES},
            f"every label has at least {MIN_LABEL_EXAMPLES} examples",
            severity="warn",
            show=("label", what),
        ),
        Expectation(
            "expect_column_max_to_be_between",
            {"column": "label_imbalance", "max_value": MAX_IMBALANCE},
            f"the largest label has at most {MAX_IMBALANCE} times the examples of the smallest",
            severity="warn",
        ),
    ]


def _repeated(dataset_type: str) -> Expectation:
    return Expectation(
        "expect_column_values_to_be_unique",
        {"column": "id"},
        "no example occurs twice (split keeps copies on one side, yet they count double in training)",
        severity="warn",
        show=(next(reversed(_required(dataset_type)), "label"),),
        together="id",
    )


def _required(dataset_type: str) -> list[str]:
    """The columns of prose that every example of the type has."""
    optional = examples.OPTIONAL.get(dataset_type, ())
    return [name for name in columns.text_columns(dataset_type) if name not in optional]
