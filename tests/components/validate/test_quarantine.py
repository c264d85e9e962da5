"""Rows of ingest add up, and its quarantine keeps its budget."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.ingest.config import IngestConfig
from components.ingest.ingest import ingest
from components.shared import examples, jsonl
from components.shared.errors import TuneyardError
from components.shared.manifest import Manifest, describe
from components.shared.stage import Artifact, Context
from components.validate import quarantine
from components.validate.config import ValidateConfig
from components.validate.validate import validate

REASONS = st.lists(st.sampled_from(["bad_json", "empty_field", "wrong_type"]), max_size=30)


def write(folder, reasons, summary):
    rows = [
        {"file": "a.jsonl", "line": n, "field": "", "reason": r, "detail": ""}
        for n, r in enumerate(reasons, 1)
    ]
    jsonl.write(folder / "quarantine.jsonl", rows)
    (folder / "summary.json").write_text(json.dumps(summary))


def honest(reasons, kept):
    by_reason = {reason: reasons.count(reason) for reason in set(reasons)}
    return {"read": kept + len(reasons), "kept": kept, "quarantined": len(reasons), "by_reason": by_reason}


@given(REASONS, st.integers(1, 50), st.floats(0, 1))
def test_an_honest_summary_is_accepted_and_the_budget_is_exact(tmp_path_factory, reasons, kept, budget):
    folder = tmp_path_factory.mktemp("quarantine")
    write(folder, reasons, honest(reasons, kept))
    found = quarantine.account(folder, kept, {"total": budget, "bad_json": budget / 2})
    assert found["fraction"] == len(reasons) / (kept + len(reasons))
    assert found["over_total"] == (found["fraction"] > budget)
    bad = reasons.count("bad_json") / found["read"]
    assert len(quarantine.faults(found)) == (found["fraction"] > budget) + (bad > budget / 2)
    assert sum(reason["count"] for reason in found["reasons"]) == len(reasons)


@given(REASONS, st.integers(1, 50), st.sampled_from(["read", "kept", "quarantined"]), st.integers(-3, 3))
def test_a_row_too_few_or_too_many_is_an_error_with_the_numbers(tmp_path_factory, reasons, kept, what, by):
    folder = tmp_path_factory.mktemp("quarantine")
    summary = honest(reasons, kept)
    write(folder, reasons, {**summary, what: summary[what] + by})
    if by == 0:
        assert quarantine.account(folder, kept, {"total": 1.0})["kept"] == kept
        return
    with pytest.raises(TuneyardError, match="do not add up") as caught:
        quarantine.account(folder, kept, {"total": 1.0})
    assert str(summary[what] + by) in caught.value.what


def test_examples_lost_after_ingest_are_noticed(tmp_path):
    write(tmp_path, ["bad_json"], honest(["bad_json"], 100))
    with pytest.raises(TuneyardError, match=r"101 read, but 99 examples \+ 1 quarantined = 100"):
        quarantine.account(tmp_path, 99, {"total": 1.0})


def test_a_quarantine_over_budget_stops_the_line_with_fraction_bound_and_rows(run, corpus, quarantined):
    rows = quarantined(3) + quarantined(1, "empty_field")
    result, folder = run(
        "prompt-completion", corpus("prompt-completion", 96), {"budget": {"bad_json": 0.01}}, rows
    )
    assert "2 quarantine budgets exceeded in 96 examples" in result.stop
    assert "quarantine budget bad_json: 3 of 100 rows read (3.00%), over 1.00%" in result.stop
    assert "quarantine budget total: 4 of 100 rows read (4.00%), over 1.00%" in result.stop
    assert "corpus.jsonl:900 bad_json" in result.stop
    assert result.metrics["quarantined_fraction"] == 0.04 and result.metrics["failed_expectations"] == 0
    assert "over its budget" in (folder / "page.html").read_text("utf-8")


def test_one_malformed_row_in_a_hundred_is_forgiven_and_a_torn_file_never(run, corpus, quarantined):
    rows = corpus("prompt-completion", 199)
    assert not run("prompt-completion", rows, quarantined=quarantined(1))[0].stop
    stop = run("prompt-completion", rows, quarantined=quarantined(1, "torn_file"))[0].stop
    assert "quarantine budget torn_file: 1 of 200 rows read (0.50%), over 0.00%" in stop


@pytest.mark.parametrize("bad", [2, 3])
def test_of_a_file_one_percent_may_be_malformed(tmp_path, corpus, bad):
    """From the file on: ingest says which rows and why, and the default budget decides."""
    good = map(examples.content, corpus("prompt-completion", 200)[bad:])
    lines = [json.dumps(row, ensure_ascii=False) for row in good]
    wrong = ['{"prompt": "torn', '{"prompt": "no answer"}', '{"prompt": "a number", "completion": 5}'][:bad]
    for at, line in enumerate(wrong):
        lines.insert(50 * at, line)
    source = tmp_path / "corpus.jsonl"
    source.write_text("\n".join(lines))

    def context(stage):
        return Context("run", "test", stage, "key", None, tmp_path / stage, tmp_path / "work")

    context("ingest").out.mkdir()
    taken = ingest(IngestConfig(source=str(source)), {}, context("ingest"))
    folders = {name: tmp_path / "ingest" / name for name in ("examples", "quarantine")}
    inputs = {
        name: Artifact(Manifest("dataset", describe(folder), taken.metadata[name]), folder)
        for name, folder in folders.items()
    }
    rows = list(jsonl.read(inputs["quarantine"].path / "quarantine.jsonl"))
    expected = [(1, "", "bad_json"), (51, "completion", "missing_field"), (101, "completion", "wrong_type")]
    assert [(row["line"], row["field"], row["reason"]) for row in rows] == expected[:bad]
    assert {row["file"] for row in rows} == {str(source)}
    result = validate(ValidateConfig(), inputs, context("validate"))
    assert result.metrics["failed_expectations"] == 0
    assert ("quarantine budget total: 3 of 200 rows read (1.50%), over 1.00%" in result.stop) == (bad == 3)
    assert bool(result.stop) == (bad == 3)


def test_a_summary_that_lies_stops_the_stage(run, corpus):
    with pytest.raises(TuneyardError, match="do not add up"):
        run("prompt-completion", corpus("prompt-completion", 20), summary={"read": 21})
