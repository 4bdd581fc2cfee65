"""Exports the metrics through OpenTelemetry, in a process where its SDK is set up."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from ..plumbing._util.tasks import cancel_and_wait
from ..plumbing._util.telemetry import METER, TASKS_SUBMITTED
from ..plumbing.worker.reporter import Reporter
from .cursors import queue_of
from .exposition import BOUNDARIES

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation
    from prometheus_client import Metric

logger = logging.getLogger(__name__)

#: Bounds of the refresh interval, which is half of the export interval.
_LONGEST_PAUSE_SECONDS, _SHORTEST_PAUSE_SECONDS = 15.0, 0.2
#: Gauges that can be added up, which OpenTelemetry calls up-down counters.
_UP_DOWN_COUNTERS = {"tasks_in_progress"}
_UNITS = {"_seconds": "s", "_bytes": "By"}


@asynccontextmanager
async def exported(
    collect: Callable[[], Awaitable[Sequence[Metric]]], reporter: Reporter | None = None
) -> AsyncIterator[None]:
    """Export the collected metrics to OpenTelemetry inside the block.

    Args:
        collect: collects the metrics. It is called in this event loop, not in the threads of the SDK.
        reporter: reporter of a worker, whose execution times are recorded one by one.
    """
    bridge = _Bridge()
    if reporter is not None:
        reporter.timed = bridge.recorder()
    refreshing = asyncio.create_task(_refresh(bridge, collect))
    try:
        yield
    finally:
        await cancel_and_wait(refreshing)
        with suppress(Exception):  # the last values, if the server responds
            bridge.show(await collect())


async def _refresh(bridge: _Bridge, collect: Callable[[], Awaitable[Sequence[Metric]]]) -> None:
    pause = min(max(_export_seconds() / 2, _SHORTEST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
    while True:
        try:
            bridge.show(await collect())
        except Exception:
            logger.debug("no metrics", exc_info=True)
        await asyncio.sleep(pause)


def _export_seconds() -> float:
    try:
        return float(os.environ["OTEL_METRIC_EXPORT_INTERVAL"]) / 1000
    except (KeyError, ValueError):
        return 60.0


def _name_of(metric: Metric) -> str:
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


class _Bridge:
    """Keeps one OpenTelemetry instrument per metric, made at its first export."""

    def __init__(self) -> None:
        from opentelemetry import metrics

        self._meter = metrics.get_meter(METER)
        self._made: set[str] = set()
        self._shown: dict[str, list[Observation]] = {}

    def show(self, metrics: Sequence[Metric]) -> None:
        """Set the values of all instruments."""
        from opentelemetry.metrics import Observation

        shown = {
            _name_of(metric): [Observation(sample.value, sample.labels) for sample in metric.samples]
            for metric in metrics
            # Times and submissions are recorded one by one.
            if metric.type != "histogram" and _name_of(metric) != TASKS_SUBMITTED
        }
        self._shown = shown
        for metric in metrics:
            if _name_of(metric) in shown and _name_of(metric) not in self._made:
                self._make(metric)

    def _make(self, metric: Metric) -> None:
        name = _name_of(metric)
        kind = "counter" if metric.type == "counter" else "gauge"
        if name in _UP_DOWN_COUNTERS:
            kind = "up_down_counter"

        def observe(_: CallbackOptions) -> list[Observation]:
            return self._shown.get(name, [])

        self._made.add(name)
        unit = next((unit for end, unit in _UNITS.items() if name.endswith(end)), "")
        create = getattr(self._meter, f"create_observable_{kind}")
        create(name, callbacks=[observe], unit=unit, description=metric.documentation)

    def recorder(self) -> Callable[[str, str, float, float], None]:
        """Return a function that records run time and time in the queue of an execution."""
        run_times, queue_times = (
            self._meter.create_histogram(
                name, unit="s", description=about, explicit_bucket_boundaries_advisory=BOUNDARIES
            )
            for name, about in (
                ("task_duration_seconds", "Run time of executions."),
                ("task_queue_wait_seconds", "Time from submission or due time to the start."),
            )
        )

        def record(name: str, stream: str, run_seconds: float, queue_seconds: float) -> None:
            priority, size = queue_of(stream).split(":")
            attributes = {"task_name": name, "priority": priority, "size": size}
            run_times.record(run_seconds, attributes)
            queue_times.record(queue_seconds, attributes)

        return record
