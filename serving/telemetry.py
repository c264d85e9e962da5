"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

# Half as much again from one to the next: the p99 of two versions is compared (components/deploy/verdict.py).
_SECONDS = (
    *(0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120),
)


class Telemetry:
    """The counters, and gauges that are read off the models when somebody looks.

    Args:
        states: gives what arms.state tells of each model in service.
    """

    def __init__(self, states: Callable[[], list[dict[str, Any]]]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tuneyard_requests",
            "Requests answered",
            ["model", "version", "route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "tuneyard_request_seconds",
            "Seconds from a request to the end of its answer",
            ["model", "version", "route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter(
            "tuneyard_generated_tokens", "Tokens generated", ["model", "version"], registry=self.registry
        )
        self.truncated = Counter(
            "tuneyard_truncated_inputs",
            "Texts cut at the model's length",
            ["model", "version"],
            registry=self.registry,
        )
        self.registry.register(_Gauges(states))


class _Gauges(Collector):
    def __init__(self, states: Callable[[], list[dict[str, Any]]]) -> None:
        self._states = states

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The state of the models now."""
        one, each = ["model"], ["model", "version"]
        queue = GaugeMetricFamily("tuneyard_queue_length", "Requests that wait", labels=one)
        flying = GaugeMetricFamily("tuneyard_in_flight", "Requests being answered", labels=one)
        ready = GaugeMetricFamily("tuneyard_model_ready", "1 when the model answers", labels=one)
        weight = GaugeMetricFamily("tuneyard_canary_weight", "Share of the requests", labels=each)
        told = "Population stability index of the last requests against the training, 0 when alike"
        drift = GaugeMetricFamily("tuneyard_input_drift", told, labels=[*each, "signal"])
        labels = [*each, "digest", "task", "role"]
        info = GaugeMetricFamily("tuneyard_model_info", "Which versions are in service", labels=labels)
        for state in self._states():
            name, arms = state["name"], {"stable": state, "canary": state["canary"]}
            ready.add_metric([name], float(state["ready"]))
            here = {role: arm for role, arm in arms.items() if arm is not None}
            queue.add_metric([name], sum(arm["waiting"] for arm in here.values()))
            flying.add_metric([name], sum(arm["in_flight"] for arm in here.values()))
            for role, arm in here.items():
                version = arm["version"]
                if arm["digest"]:
                    info.add_metric([name, version, arm["digest"], arm["task"], role], 1)
                if role == "canary":
                    weight.add_metric([name, version], arm["weight"])
                for signal, value in arm["drift"].items():
                    drift.add_metric([name, version, signal], value)
        yield from (queue, flying, ready, weight, drift, info)
