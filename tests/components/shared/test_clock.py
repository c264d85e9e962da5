"""What is measured of a stage, and what is given back while it computes."""

from __future__ import annotations

import os
import time

import pytest

from components.shared import clock


def test_memory_is_given_back_after_arithmetic_for_a_small_share_of_the_time(monkeypatch):
    spent = []

    def costly():
        time.sleep(0.005)
        spent.append(0.005)

    monkeypatch.setattr(clock, "give_back_memory", costly)
    monkeypatch.setattr(clock, "_tidied_at", 0.0)
    monkeypatch.setattr(clock, "_tidying_seconds", 0.0)
    began = time.perf_counter()
    before = clock.arithmetic_seconds()
    while time.perf_counter() - began < 1.0:
        with clock.arithmetic(), clock.arithmetic():
            time.sleep(0.001)
    # One begins at once; each is waited for as long as its share of the time says.
    assert 2 <= len(spent) <= 2 + 1.0 / (0.005 / clock._TIDYING_SHARE)
    assert clock.arithmetic_seconds() - before < time.perf_counter() - began - sum(spent)


@pytest.mark.parametrize(("own", "expected"), [(None, "64"), ("1024", "1024")])
def test_kernels_are_few_unless_somebody_says_how_many(monkeypatch, own, expected):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, own or "")
    if own is None:
        monkeypatch.delenv(name)
    clock.keep_few_kernels()
    assert os.environ[name] == expected
