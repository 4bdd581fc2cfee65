"""Metrics in the data model of `prometheus_client`, which writes them for Prometheus.

Importing this module imports `prometheus_client` (70 ms, 3 MB): only where metrics are asked for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector

from ..plumbing._util.histogram import end_of_bucket

#: Of what `as_text` returns.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Samples: TypeAlias = Iterable[tuple[Mapping[str, str], float]]
"""Labels and value; each set of labels once."""
#: Every fourth of our buckets, from 8 ms to 70 min: each is twice as long as the one before.
_LAST_OF_BUCKETS = range(12, 92, 4)
#: Upper ends of those buckets, in s.
BOUNDARIES = tuple(end_of_bucket(last) for last in _LAST_OF_BUCKETS)

#: Metrics that another distribution adds, by an entry point in the group `diracx.tasks_metrics`. It names a
#: function without arguments: its context opens what is needed and yields what collects the metrics, or None where
#: that is not possible. They are collected every 30 s at most, by the scheduler that leads.
MetricsSource: TypeAlias = Callable[
    [], AbstractAsyncContextManager[Callable[[], Awaitable[Sequence[Metric]]] | None]
]


def counter(name: str, about: str, samples: Samples) -> Metric:
    """Return a counter, whose name ends with `_total`."""
    return _filled(Metric(name.removesuffix("_total"), about, "counter"), name, samples)


def gauge(name: str, about: str, samples: Samples) -> Metric:
    """Return a gauge."""
    return _filled(Metric(name, about, "gauge"), name, samples)


def _filled(metric: Metric, name: str, samples: Samples) -> Metric:
    for labels, value in samples:
        metric.add_sample(name, dict(labels), value)
    return metric


def histogram(name: str, about: str, samples: Iterable[tuple[Mapping[str, str], Sequence[int], float]]) -> Metric:
    """Return a histogram from counts in our buckets.

    Args:
        samples: labels, counts and sum (s).
    """
    metric = Metric(name, about, "histogram")
    for labels, counts, total in samples:
        for last, end in zip(_LAST_OF_BUCKETS, BOUNDARIES, strict=True):
            metric.add_sample(f"{name}_bucket", {**labels, "le": f"{end:g}"}, sum(counts[: last + 1]))
        metric.add_sample(f"{name}_bucket", {**labels, "le": "+Inf"}, sum(counts))
        metric.add_sample(f"{name}_count", dict(labels), sum(counts))
        metric.add_sample(f"{name}_sum", dict(labels), total)
    return metric


class _Collected(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def as_text(metrics: Iterable[Metric]) -> bytes:
    """Write metrics in the text format of Prometheus."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(list(metrics)))
    return generate_latest(registry)
