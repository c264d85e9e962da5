"""Expectations and budgets of a pipeline file: faults are all found early, and the rest does what it says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from components.shared.errors import TuneyardError
from components.validate import catalogue
from components.validate.config import ValidateConfig

LENGTH = "expect_column_value_lengths_to_be_between"


def test_every_fault_of_the_expectations_is_named_at_once_with_near_names():
    wrong = [
        {"type": "expect_column_value_length_to_be_between", "column": "prompt"},
        {"column": "prompt"},
        {"type": LENGTH, "colum": "prompt", "min_value": "ten", "mostly": 1.5, "severity": "warn"},
        {"type": "unexpected_rows_expectation", "unexpected_rows_query": "select 1"},
    ]
    with pytest.raises(ValidationError) as caught:
        ValidateConfig(expectations=wrong)
    text = str(caught.value)
    for part in (
        f"[0] unknown type 'expect_column_value_length_to_be_between' (near: {LENGTH}",
        "[1] has no type",
        "has no 'colum' (near: column)",
        "needs 'column'",
        "min_value is 'ten', not integer",
        "mostly is 1.5, not number from 0.0 to 1.0",
        "severity is 'warn', not one of critical, warning, info",
        "[3] unknown type 'unexpected_rows_expectation'",
    ):
        assert part in text, part


def test_finer_fractions_than_a_percent_are_taken():
    # The library's own schema says multipleOf 0.01, for a slider; the library itself takes any.
    one = {"type": LENGTH, "column": "prompt", "min_value": 1, "mostly": 0.995}
    assert ValidateConfig(expectations=[one]).expectations == [one]


def test_settings_are_read_without_importing_the_library():
    code = (
        "import sys; from components.validate.config import ValidateConfig as C\n"
        f"C(expectations=[{{'type': '{LENGTH}', 'column': 'a', 'min_value': 1}}])\n"
        "print([m for m in ('great_expectations', 'pandas', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_catalogue_knows_what_the_library_has_for_tables_in_memory():
    import great_expectations  # noqa: F401  (its import fills the registry)
    from great_expectations.expectations import registry

    there = set(registry.list_registered_expectation_implementations())
    assert len(there) > 50 and there > catalogue.SQL_ONLY
    assert set(catalogue.known()) == there - catalogue.SQL_ONLY


def test_columns_and_arguments_that_only_the_data_can_tell_are_all_named_before_the_work(run, corpus):
    wrong = [
        {"type": "expect_column_values_to_match_regex", "column": "promt", "regex": "x"},
        {"type": LENGTH, "column": "prompt"},
    ]
    with pytest.raises(TuneyardError) as caught:
        run("prompt-completion", corpus("prompt-completion", 20), {"expectations": wrong})
    text = str(caught.value)
    assert "no column 'promt' (near: prompt" in text and "there are id, part, prompt, completion" in text
    assert "min_value and max_value cannot both be None" in text


def test_an_expectation_of_ones_own_stops_the_line_and_names_its_rows(run, corpus):
    rows = corpus("prompt-completion", 60)
    own = {
        "type": "expect_column_values_to_match_regex",
        "column": "completion",
        "regex": "第100(?:0[1-9]|5\\d)条",
    }
    result, folder = run("prompt-completion", rows, {"expectations": [own]})
    # Of 1..60, those made from seeds 10001-10009 and 10050-10059 match: 19; so 41 of 60 do not.
    assert "1 expectation failed in 60 examples" in result.stop
    assert (
        "observed 41 of 60 rows do not (68.33%)" in result.stop
        and "corpus.jsonl:10 completion='" in result.stop
    )
    assert result.stop_todo and result.metrics["failed_expectations"] == 1
    assert json.loads((folder / "result.json").read_text())["success"] is False


def test_severity_warning_reports_without_stopping(run, corpus):
    own = {
        "type": LENGTH,
        "column": "prompt",
        "max_value": 1,
        "severity": "warning",
        "description": "prompts are short",
    }
    result, _ = run("prompt-completion", corpus("prompt-completion", 20), {"expectations": [own]})
    assert not result.stop and result.metrics["warned_expectations"] == 1
    assert result.summary["warned"] == ["prompts are short"]


def test_an_own_bound_takes_the_place_of_the_suites(run, corpus):
    rows = corpus("prompt-completion", 40, {n: {"prompt": "定金可以退吗？"} for n in range(1, 20)})
    own = {"type": "expect_column_values_to_be_between", "column": "answers_for_prompt", "max_value": 30}
    assert "answers_for_prompt" in run("prompt-completion", rows)[0].stop
    result, folder = run("prompt-completion", rows, {"expectations": [own]})
    assert not result.stop
    stated = [e for e in json.loads((folder / "result.json").read_text())["expectations"]]
    assert [e["source"] for e in stated if e["columns"] == ["answers_for_prompt"]] == ["settings"]


def test_rows_are_named_rightly_under_a_row_condition(run, corpus):
    own = {
        "type": LENGTH,
        "column": "prompt",
        "max_value": 1,
        "row_condition": "part == 'test'",
        "condition_parser": "pandas",
    }
    rows = corpus("prompt-completion", 20)
    for row in rows[14:17]:
        row["origin"] = {**row["origin"], "part": "test"}
    result, _ = run("prompt-completion", rows, {"expectations": [own]})
    assert "observed 3 of 3 rows do not (100.00%)" in result.stop
    assert [f"corpus.jsonl:{n} prompt" in result.stop for n in (14, 15, 16, 17, 18)] == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_columns_that_ingest_kept_can_be_expected_of(run, corpus):
    rows = [
        {**row, "extra": {"court": "基层" if n else None, "prompt": 1}}
        for n, row in enumerate(corpus("prompt-completion", 20))
    ]
    own = [
        {"type": "expect_column_values_to_not_be_null", "column": "court"},
        {"type": "expect_column_values_to_be_between", "column": "extra.prompt", "max_value": 1},
    ]
    result, _ = run("prompt-completion", rows, {"expectations": own})
    assert (
        "1 expectation failed" in result.stop and "court=" in result.stop and "corpus.jsonl:1 " in result.stop
    )


def test_what_cannot_be_computed_stops_the_line_and_says_why(run, corpus):
    own = {"type": "expect_column_mean_to_be_between", "column": "prompt", "max_value": 1}
    result, _ = run("prompt-completion", corpus("prompt-completion", 20), {"expectations": [own]})
    assert (
        "expect_column_mean_to_be_between on prompt" in result.stop and "cannot be computed: " in result.stop
    )


@pytest.mark.parametrize(
    ("budget", "part"),
    [
        ({"bad_json": 2}, "bad_json is 2.0, not a fraction from 0 to 1"),
        ({"total": -0.1}, "total is -0.1, not a fraction"),
        ({"bad_json": 0.05}, "bad_json may take 0.05, but total ends at 0.01: raise total too"),
    ],
)
def test_a_budget_that_cannot_be_meant_is_refused(budget, part):
    with pytest.raises(ValidationError, match=part):
        ValidateConfig(budget=budget)


def test_a_budget_for_one_reason_leaves_the_other_defaults_in_force():
    assert ValidateConfig(budget={"bad_json": 0}).budget == {"total": 0.01, "torn_file": 0.0, "bad_json": 0.0}
