"""When a canary passes, when it fails, and when nothing can be said yet."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from components.deploy.config import CanaryConfig
from components.deploy.verdict import Meter, Tally, judge

ASKED = CanaryConfig(weight=0.1, requests=100, max_error_ratio=0.02, max_p99_ratio=1.5, within_minutes=30)
INFINITE = float("inf")


def tally(requests, errors=0, slow=0, seconds=1.0):
    """All but the slow requests take half of `seconds` to `seconds`; the slow ones up to ten times that."""
    buckets = {seconds / 2: 0, seconds: requests - slow, 10 * seconds: requests, INFINITE: requests}
    made = Tally(requests, errors)
    made.buckets.update(buckets)
    return made


def test_a_quantile_is_where_prometheus_puts_it():
    # The 99th of 100, where 90 are below 1 s and 10 in (1, 2]: nine tenths through that bucket.
    made = Tally(100)
    made.buckets.update({1.0: 90, 2.0: 100, INFINITE: 100})
    assert made.p99() == pytest.approx(1.9)
    beyond = Tally(10)
    beyond.buckets.update({1.0: 5, 2.0: 5, INFINITE: 10})
    assert beyond.p99() == 2.0
    assert Tally().p99() == 0.0


def test_nothing_is_said_before_there_are_enough_requests():
    assert judge(tally(99), tally(900), ASKED, over=False) is None
    assert judge(tally(100), tally(900), ASKED, over=False).passed


def test_too_few_when_the_time_is_up_are_no_pass():
    verdict = judge(tally(99), tally(900), ASKED, over=True)
    assert not verdict.passed
    assert "99 of 100 requests in 30 minutes" in verdict.why
    assert judge(tally(100), tally(900), ASKED, over=True).passed


def test_more_failures_than_may_be_end_it_at_once():
    assert judge(tally(40, errors=2), tally(900), ASKED, over=False) is None
    verdict = judge(tally(40, errors=3), tally(900), ASKED, over=False)
    assert not verdict.passed
    assert "3 of its 40 requests failed" in verdict.why
    assert judge(tally(100, errors=2), tally(900), ASKED, over=False).passed
    # With more requests more may fail.
    assert judge(tally(200, errors=4), tally(900), ASKED, over=False).passed


def test_a_slower_p99_than_that_beside_it_is_a_failure():
    assert judge(tally(1000, slow=5), tally(1000), ASKED, over=False).passed
    verdict = judge(tally(1000, slow=20), tally(1000), ASKED, over=False)
    assert not verdict.passed
    assert "more than max_p99_ratio 1.5 times" in verdict.why
    # Both are slow: it is not the version.
    assert judge(tally(1000, slow=20), tally(1000, slow=20), ASKED, over=False).passed
    # Nothing to compare with.
    assert judge(tally(1000, slow=20), tally(0), ASKED, over=False).passed


class Replica:
    """What a server process counts, in its own form."""

    def __init__(self):
        self.registry = CollectorRegistry()
        labels = ["model", "version", "route", "status"]
        self.requests = Counter("tuneyard_requests", "n", labels, registry=self.registry)
        self.seconds = Histogram(
            "tuneyard_request_seconds", "s", labels[:3], registry=self.registry, buckets=(1, 2)
        )

    def answer(self, count, version="2", status="200", model="legal", seconds=0.5):
        for _ in range(count):
            self.requests.labels(model, version, "/v1/completions", status).inc()
            self.seconds.labels(model, version, "/v1/completions").observe(seconds)

    @property
    def text(self):
        return generate_latest(self.registry).decode()


def test_what_was_counted_before_somebody_looked_is_not_the_canarys():
    meter, one, two = Meter("legal"), Replica(), Replica()
    one.answer(50, status="500")
    meter.read("a", one.text)
    meter.read("b", two.text)
    assert meter.tally(2) == Tally()
    one.answer(3)
    one.answer(1, status="503", seconds=5)
    one.answer(7, version="1")
    one.answer(9, model="news")
    two.answer(4, status="400")
    meter.read("a", one.text)
    meter.read("b", two.text)
    found = meter.tally(2)
    assert (found.requests, found.errors) == (8, 1)
    assert found.buckets == {1.0: 7, 2.0: 7, INFINITE: 8}
    assert meter.tally(1).requests == 7


def test_a_replica_that_starts_anew_goes_on_from_nothing():
    meter, one = Meter("legal"), Replica()
    meter.read("a", one.text)
    one.answer(10)
    meter.read("a", one.text)
    again = Replica()
    again.answer(4)
    meter.read("a", again.text)
    assert meter.tally(2).requests == 14
