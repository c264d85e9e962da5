"""Whether a canary may take over: what the replicas counted of it, against the version in service."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from components.deploy.config import CanaryConfig

_REQUESTS = "tuneyard_requests_total"
_BUCKETS = "tuneyard_request_seconds_bucket"


@dataclass
class Tally:
    """What a version did while it was watched.

    Args:
        requests: that it answered, well or not.
        errors: 5xx among them; an answer that broke off is one.
        buckets: upper bound in seconds -> requests that took as long or less.
    """

    requests: int = 0
    errors: int = 0
    buckets: Counter[float] = field(default_factory=Counter)

    def p99(self) -> float:
        """Seconds within which 99 in 100 requests were answered, linear inside a bucket as Prometheus has it.

        0.0 without requests; the largest finite bound when the answer lies beyond it.
        """
        bounds = sorted(self.buckets)
        rank = 0.99 * self.buckets[bounds[-1]] if bounds else 0.0
        lower, below = 0.0, 0
        for bound in bounds:
            if self.buckets[bound] >= rank > 0:
                inside = self.buckets[bound] - below
                return lower if bound == float("inf") else lower + (bound - lower) * (rank - below) / inside
            lower, below = bound, self.buckets[bound]
        return 0.0

    def facts(self) -> dict[str, Any]:
        """For the ledger."""
        return {"requests": self.requests, "errors": self.errors, "p99_seconds": round(self.p99(), 4)}


@dataclass(frozen=True)
class Verdict:
    """The end of a canary.

    Args:
        passed: whether it takes over.
        why: one sentence with the numbers.
    """

    passed: bool
    why: str


class Meter:
    """Adds up what the replicas counted since each was first read.

    Args:
        name: of the model.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._last: dict[str, dict[tuple[str, str, str, str], float]] = {}
        self._tallies: defaultdict[str, Tally] = defaultdict(Tally)

    def tally(self, version: int) -> Tally:
        """What a version did."""
        return self._tallies[str(version)]

    def read(self, replica: str, text: str) -> None:
        """Take in what a replica tells Prometheus. One that started anew has begun at 0 again.

        Args:
            replica: its address.
            text: of /metrics.
        """
        now = _samples(text, self._name)
        before = self._last.get(replica)
        self._last[replica] = now
        if before is None:
            return
        for key, value in now.items():
            was = before.get(key, 0.0)
            self._add(key, value - was if value >= was else value)

    def _add(self, key: tuple[str, str, str, str], increase: float) -> None:
        sample, version, _, detail = key
        tally = self._tallies[version]
        if sample == _BUCKETS:
            tally.buckets[float(detail)] += int(increase)
        else:
            tally.requests += int(increase)
            tally.errors += int(increase) if detail.startswith("5") else 0


def _samples(text: str, name: str) -> dict[tuple[str, str, str, str], float]:
    """(sample, version, route, status or bound) -> count, of one model."""
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in (_REQUESTS, _BUCKETS) and sample.labels["model"] == name:
                labels = sample.labels
                detail = labels["le"] if sample.name == _BUCKETS else labels["status"]
                found[sample.name, labels["version"], labels["route"], detail] = sample.value
    return found


def judge(canary: Tally, stable: Tally, asked: CanaryConfig, over: bool) -> Verdict | None:
    """Whether the canary takes over; None while it cannot be said.

    Args:
        canary: what it did.
        stable: what the version in service did in the same time.
        asked: the bounds.
        over: whether the time is up.
    """
    # Before all requests are in: more may fail in no case than of all of them.
    if canary.errors > asked.max_error_ratio * max(canary.requests, asked.requests):
        return Verdict(
            False,
            f"{canary.errors} of its {canary.requests} requests failed, more than max_error_ratio "
            f"{asked.max_error_ratio:g} of {max(canary.requests, asked.requests)}",
        )
    if canary.requests < asked.requests:
        few = f"{canary.requests} of {asked.requests} requests in {asked.within_minutes:g} minutes"
        return Verdict(False, f"too little is known of it: {few}") if over else None
    seconds, before = canary.p99(), stable.p99()
    told = f"{canary.requests} requests, {canary.errors} failed, p99 {seconds:.3g} s beside {before:.3g} s"
    if stable.requests and seconds > asked.max_p99_ratio * before:
        return Verdict(False, f"{told}, more than max_p99_ratio {asked.max_p99_ratio:g} times as much")
    return Verdict(True, told)
