"""What a person sees of the logs that the stages of a run leave in the store."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from components.shared.recording import record
from pipelines.cluster import watching
from pipelines.watch import Watcher

NOW = datetime(2026, 12, 1, 3, tzinfo=UTC)
RUNNING = {"ingest": "RUNNING", "train": ""}


@pytest.fixture
def leave(store):
    """Leaves a part of a stage's log, as its pod would at a second of the run."""

    def put(stage, pod, number, text, second=0.0):
        stamp = f"{NOW + timedelta(seconds=second):%Y%m%dT%H%M%S.%f}"
        name = f"logs/run-1/{stamp}/{stage}/{pod}/{number:05d}.txt"
        store.client.put_object(Bucket=store.bucket, Key=store.key(name), Body=text.encode())

    return put


@pytest.fixture
def logs(store, tmp_path):
    """(what looks, what was shown so far)"""
    watcher = Watcher(tmp_path / "log.txt", None)
    yield watching.Logs(store, "run-1", watcher), (tmp_path / "log.txt").read_text
    watcher.close()


def test_one_stage_after_the_other_reads_as_on_one_machine(logs, leave):
    look, shown = logs
    leave("ingest", "a", 1, "▸ ingest\n", 1)
    look.look(RUNNING)
    assert shown() == "▸ ingest\n"
    leave("ingest", "a", 2, "✓ ingest  3.0 s\n", 4)
    leave("train", "b", 1, "▸ train\n", 9)
    look.look(RUNNING)
    look.look(RUNNING)
    look.look(RUNNING, ended=True)
    assert shown() == "▸ ingest\n✓ ingest  3.0 s\n▸ train\n"


def test_lines_of_stages_that_run_side_by_side_and_of_a_further_attempt_say_whose_they_are(logs, leave):
    look, shown = logs
    leave("evaluate-slice-1-of-2", "a", 1, "▸ first\n", 1)
    leave("evaluate-slice-2-of-2", "b", 1, "▸ second\n", 2)
    leave("evaluate-slice-1-of-2", "a", 2, "more\n", 3)
    leave("evaluate-slice-1-of-2", "a", 3, "and more\n", 4)
    leave("evaluate-slice-2-of-2", "c", 1, "▸ second\n", 5)
    look.look(RUNNING)
    assert shown().splitlines() == [
        "▸ first",
        "▸ second",
        "-- evaluate-slice-1-of-2",
        "more",
        "and more",
        "-- evaluate-slice-2-of-2, attempt 2",
        "▸ second",
    ]


def test_a_stage_that_needed_no_pod_says_so_once_and_one_that_had_one_says_it_itself(logs, store):
    look, shown = logs
    record(store, "run-1", "train", status="done", cached=True)
    for _ in range(3):
        look.look({"ingest": "SUCCEEDED", "train": "SUCCEEDED", "evaluate": "RUNNING"})
    assert shown() == "✓ ingest  unchanged, done before\n"


def test_what_comes_late_or_with_another_clock_is_shown_once(logs, leave):
    look, shown = logs
    leave("train", "a", 2, "now\n", 4000)
    look.look(RUNNING)
    leave("ingest", "b", 1, "of a clock behind\n", 3800)
    look.look(RUNNING)
    leave("ingest", "b", 2, "of long ago\n", 1)
    look.look(RUNNING)
    assert "of long ago" not in shown()
    look.look(RUNNING, ended=True)
    assert [shown().count(text) for text in ("now", "of a clock behind", "of long ago")] == [1, 1, 1]


def test_a_store_that_is_away_is_told_once_and_then_nothing_is_missing(logs, leave, monkeypatch, caplog):
    look, shown = logs
    leave("train", "a", 1, "before\n", 1)
    look.look(RUNNING)
    with monkeypatch.context() as away:
        away.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        lost = watching.Logs(look._store, "run-1", look._watcher)
        away.setattr(look, "_store", lost._store)
        look.look(RUNNING)
        look.look(RUNNING)
    assert caplog.text.count("no logs; they are shown again when the store answers") == 1
    leave("train", "a", 2, "after\n", 2)
    look.look(RUNNING)
    assert shown() == "before\nafter\n"
