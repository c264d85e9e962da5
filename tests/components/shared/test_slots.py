"""A slot of a schedule has one run, whoever asks how often."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from components.shared import slots
from components.shared.errors import StageStopped


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
    for pipeline, slot in [("five", "1"), ("five", "2"), ("six", "1"), ("five", ""), ("five", "")]:
        slots.claim({"id": f"run-{pipeline}-{slot}", "pipeline": pipeline, "slot": slot}, store)
    with pytest.raises(StageStopped, match="which run run-five-1 has"):
        slots.claim({"id": "other", "pipeline": "five", "slot": "1"}, store)
    assert len(store.names("slots/")) == 3
