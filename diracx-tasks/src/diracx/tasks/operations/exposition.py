"""Makes metrics of `prometheus_client`, and their text format.

Imports `prometheus_client` (70 ms, 3 MB): import this module only where metrics are collected.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Metric, generate_latest

from ..plumbing.broker.telemetry import end_of_bucket

#: Content type of `as_text`.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Samples: TypeAlias = Iterable[tuple[Mapping[str, str], float]]
"""Labels and value; labels are unique."""
#: Every fourth of our buckets, from 8 ms to 70 min, each twice as long as the previous one.
_LAST_OF_BUCKETS = range(12, 92, 4)
#: Upper ends of those buckets, in s.
BOUNDARIES = tuple(end_of_bucket(last) for last in _LAST_OF_BUCKETS)

#: Function without arguments, an entry point in the group `diracx.tasks_metrics` of another distribution. Its
#: context opens resources and yields a function that collects metrics, or None if not configured. The leading
#: scheduler collects at most every 30 s.
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
    """Return a histogram of samples: labels, counts in our buckets and sum (s)."""
    metric = Metric(name, about, "histogram")
    for labels, counts, total in samples:
        for last, end in zip(_LAST_OF_BUCKETS, BOUNDARIES, strict=True):
            metric.add_sample(f"{name}_bucket", {**labels, "le": f"{end:g}"}, sum(counts[: last + 1]))
        metric.add_sample(f"{name}_bucket", {**labels, "le": "+Inf"}, sum(counts))
        metric.add_sample(f"{name}_count", dict(labels), sum(counts))
        metric.add_sample(f"{name}_sum", dict(labels), total)
    return metric


class _Collected(CollectorRegistry):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        super().__init__()
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def as_text(metrics: Iterable[Metric]) -> bytes:
    """Write metrics in the text format of Prometheus."""
    return generate_latest(_Collected(metrics))
