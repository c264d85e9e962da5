"""A slot of a schedule has one run, whoever asks how often."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from components.shared import slots
from components.shared.errors import StageStopped, TuneyardError

MONTHLY = slots.asked("UTC", "0 3 1 * *")
MINUTELY = slots.asked("UTC", "* * * * *")


def test_of_many_runs_of_one_slot_exactly_one_has_it_for_good(store):
    _ = store.client

    def ask(number):
        try:
            slots.claim({"id": f"run-{number}", "pipeline": "five", "slot": "20261201030000"}, store)
        except StageStopped as stopped:
            return str(stopped)
        return number

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [n % 12 for n in range(48)]))
    winners = {answer for answer in answers if isinstance(answer, int)}
    assert len(winners) == 1
    assert answers.count(winners.pop()) == 4  # each of its stages asks again


def test_slots_and_pipelines_do_not_mix_and_an_unscheduled_run_needs_none(store):
    first, second = "20261201030000", "20270101030000"
    for pipeline, slot in [("five", first), ("five", second), ("six", first), ("five", ""), ("five", "")]:
        slots.claim({"id": f"run-{pipeline}-{slot}", "pipeline": pipeline, "slot": slot}, store)
    with pytest.raises(StageStopped, match=f"which run run-five-{first} has"):
        slots.claim({"id": "other", "pipeline": "five", "slot": first}, store)
    assert len(store.names("slots/")) == 3


def run(number, slot, due=""):
    return {"id": f"run-{number}", "pipeline": "five", "slot": slot, "due": due}


def test_a_schedule_fires_again_and_again_whether_or_not_its_time_is_written_in(store):
    written_in = MONTHLY.replace("[[ScheduledTime]]", "20270101030000")
    slots.claim(run(1, MONTHLY, "2026-12-01T03:00:04Z"), store)
    slots.claim(run(2, written_in, "2027-01-01T03:00:04Z"), store)
    slots.claim(run(3, MONTHLY, "2027-02-01T03:00:00Z"), store)  # the scheduled time itself
    claimed = [name for name in store.names("slots/five/2")]
    assert claimed == [
        f"slots/five/{slot}.json" for slot in ("20261201030000", "20270101030000", "20270201030000")
    ]
    assert not [name for name in store.names("slots/") if "[" in name]
    late = [(1, MONTHLY, "2026-12-09T00:00:00Z"), (2, written_in, ""), (3, MONTHLY, "2027-02-01T03:09:00Z")]
    for holder, slot, due in late:
        with pytest.raises(StageStopped, match=f"which run run-{holder} has"):
            slots.claim(run(10 + holder, slot, due), store)


def test_a_run_keeps_the_slot_it_found_when_it_is_retried_later(store):
    slots.claim(run(1, MINUTELY, "2026-12-01T03:00:04Z"), store)
    slots.claim(run(2, MINUTELY, "2026-12-01T03:01:03Z"), store)
    # Its Workflow was collected, so KFP made another one.
    slots.claim(run(1, MINUTELY, "2026-12-01T03:01:30Z"), store)
    assert slots.of_run(run(1, MINUTELY, "2026-12-01T03:07:30Z"), store) == "20261201030000"
    assert slots.of_run(run(2, MINUTELY), store) == "20261201030100"


def test_the_slot_is_read_in_the_zone_of_the_scheduler_and_written_in_utc(store):
    there = slots.asked("Asia/Shanghai", "0 0,1 * * *")
    assert slots.of_run(run(1, there, "2026-11-30T16:00:03Z"), store) == "20261130160000"
    assert slots.of_run(run(2, there, "2026-12-01T01:00:03+08:00"), store) == "20261130170000"


@pytest.mark.parametrize("due", ["", "{{$.pipeline_job_schedule_time_utc}}"])
def test_a_server_that_does_not_say_when_is_named_and_the_slot_is_the_last_before_now(store, due, caplog):
    before = datetime.now(UTC)
    slot = datetime.strptime(slots.of_run(run(1, MINUTELY, due), store), "%Y%m%d%H%M%S").replace(tzinfo=UTC)
    assert -1 < (datetime.now(UTC) - slot).total_seconds() < 62 and (before - slot).total_seconds() < 61
    assert "did not say for when this run was scheduled" in caplog.text


@pytest.mark.parametrize("slot", ["[[ScheduledTime]]", "2026-12-01", "[[ScheduledTime]] UTC 0 3 1 *"])
def test_a_text_that_is_no_slot_is_never_claimed(store, slot):
    with pytest.raises(TuneyardError, match="tuneyard schedule"):
        slots.claim(run(1, slot, "2026-12-01T03:00:04Z"), store)
    assert store.names("slots/") == []
