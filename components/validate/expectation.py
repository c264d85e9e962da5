"""One expectation of a corpus, and how to tell of it; the ones that several dataset types share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# Prose written by people has slips; 1% of rows is also what the quarantine budget forgives. A slip is still
# listed with its file and line. Where one row breaks training or its meaning, nothing is forgiven.
MOSTLY = 0.99
MAX_LABEL_CHARACTERS = 200
# With fewer, the test side has one or two, and the class's F1 is a coin toss.
MIN_LABEL_EXAMPLES = 10
READABLE = r"[^\W_]"

Severity = Literal["fail", "warn"]


@dataclass(frozen=True)
class Expectation:
    """One expectation and how to tell of it.

    Args:
        type: name in Great Expectations.
        kwargs: its arguments.
        meaning: what it expects, in a sentence.
        severity: what a failure does.
        show: columns to show of an example row; those it is about when empty.
        together: example rows with the same value in this column are shown side by side.
        source: `suite`, or `settings` for one of the pipeline file.
    """

    type: str
    kwargs: Mapping[str, Any]
    meaning: str
    severity: Severity = "fail"
    show: tuple[str, ...] = ()
    together: str = ""
    source: Literal["suite", "settings"] = "suite"
    about: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = (self.kwargs.get(key) for key in ("column", "column_A", "column_B"))
        object.__setattr__(self, "about", (*(n for n in names if n), *self.kwargs.get("column_list", ())))


def written(name: str, longest: int) -> list[Expectation]:
    """A column that holds text, readable and of sensible length, in every row."""
    one = {"column": name}
    return [
        Expectation("expect_column_values_to_not_be_null", one, f"every example has a {name}"),
        Expectation(
            "expect_column_values_to_be_of_type", {**one, "type_": "str"}, f"every {name} is a string"
        ),
        Expectation(
            "expect_column_value_lengths_to_be_between",
            {**one, "min_value": 1, "max_value": longest},
            f"no {name} is empty, none longer than {longest:,} characters",
        ),
        Expectation(
            "expect_column_values_to_match_regex",
            {**one, "regex": READABLE, "mostly": MOSTLY},
            f"a {name} holds at least a letter or a digit, not only blanks and punctuation",
        ),
    ]


def uncut(name: str, text: str) -> Expectation:
    """A measure of columns._at_limit holds nowhere."""
    return Expectation(
        "expect_column_values_to_be_in_set",
        {"column": name, "value_set": [False]},
        f"no pile of {text}s ends at exactly the longest length of its file, as where an export cuts them",
        show=(text,),
    )
