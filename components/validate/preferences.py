"""The suites of preference and prompt-only data, beside what every corpus keeps (suite.py)."""

from __future__ import annotations

from components.validate.expectation import MOSTLY, PLACEHOLDERS, Expectation, uncut

# Of the 560 decided pairs of the sample corpus the longer answer won 62%; beyond this share a verdict says
# little else.
MAX_LONGER = 0.80


def of_pairs() -> list[Expectation]:
    """Of two answers to one prompt."""
    between = "expect_column_values_to_be_between"
    both = ("prompt", "chosen", "rejected")
    return [
        Expectation(
            "expect_select_column_values_to_be_unique_within_record",
            {"column_list": ["chosen", "rejected"], "mostly": MOSTLY},
            "the chosen answer is another one than the rejected: equal ones prefer nothing",
            show=both,
        ),
        Expectation(
            between,
            {"column": "opposite_verdicts", "max_value": 0, "mostly": MOSTLY},
            "no pair was also judged the other way round, so that its two verdicts cancel out",
            show=both,
            together="prompt",
        ),
        Expectation(
            between,
            {"column": "score_lead", "min_value": 0, "mostly": MOSTLY},
            "where answers have scores, the chosen one's is not the lower",
            show=(*both, "chosen_score", "rejected_score"),
        ),
        Expectation(
            "expect_column_values_to_not_match_regex_list",
            {"column": "chosen", "regex_list": list(PLACEHOLDERS), "mostly": MOSTLY},
            "no chosen answer is a placeholder or a chat bot's refusal",
            severity="warn",
        ),
        Expectation(
            "expect_column_mean_to_be_between",
            {"column": "chosen_longer", "min_value": 1 - MAX_LONGER, "max_value": MAX_LONGER},
            f"the longer answer is chosen in {1 - MAX_LONGER:.0%} to {MAX_LONGER:.0%} of the pairs, "
            "else a model learns length",
            severity="warn",
        ),
        Expectation(
            between,
            {"column": "chosen_markup", "max_value": 0},
            "no chosen answer holds tags or entities of a web page, which the model would learn to write",
            severity="warn",
            show=("chosen",),
        ),
        uncut("chosen_at_limit", "chosen"),
    ]


def of_prompts() -> list[Expectation]:
    """Of prompts that a model will answer itself."""
    return [
        Expectation(
            "expect_column_values_to_not_match_regex_list",
            {"column": "prompt", "regex_list": list(PLACEHOLDERS), "mostly": MOSTLY},
            "no prompt is a placeholder",
        ),
    ]
