"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Telemetry:
    """The counters, and gauges that are read off the models when somebody looks.

    Args:
        states: gives for each model in service: name, version, digest, task, waiting, in_flight, ready.
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
            ["model", "route"],
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
        queue = GaugeMetricFamily("tuneyard_queue_length", "Requests that wait", labels=["model"])
        flying = GaugeMetricFamily("tuneyard_in_flight", "Requests being answered", labels=["model"])
        ready = GaugeMetricFamily("tuneyard_model_ready", "1 when the model answers", labels=["model"])
        labels = ["model", "version", "digest", "task"]
        info = GaugeMetricFamily("tuneyard_model_info", "Which model is in service", labels=labels)
        for state in self._states():
            queue.add_metric([state["name"]], state["waiting"])
            flying.add_metric([state["name"]], state["in_flight"])
            ready.add_metric([state["name"]], float(state["ready"]))
            if state["digest"]:
                info.add_metric([state["name"], state["version"], state["digest"], state["task"]], 1)
        yield from (queue, flying, ready, info)
