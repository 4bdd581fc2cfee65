"""Exports the metrics through OpenTelemetry as well, in a process where its SDK is set up."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..plumbing._util.tasks import cancel_and_wait
from ..plumbing._util.telemetry import METER, TASKS_SUBMITTED
from ..plumbing.worker.reporter import Reporter
from .cursors import queue_of
from .exposition import BOUNDARIES

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation
    from prometheus_client import Metric

logger = logging.getLogger(__name__)

#: Figures are never older than this, nor than half the time between two exports.
_LONGEST_PAUSE_SECONDS, _SHORTEST_PAUSE_SECONDS = 15.0, 0.2
#: Gauges of Prometheus that make sense when they are added up: OpenTelemetry tells them apart.
_UP_DOWN_COUNTERS = {"tasks_in_progress"}
_UNITS = {"_seconds": "s", "_bytes": "By"}


@asynccontextmanager
async def exported(
    collect: Callable[[], Awaitable[Sequence[Metric]]], reporter: Reporter | None = None
) -> AsyncIterator[None]:
    """Export to OpenTelemetry what is collected, inside the block.

    Args:
        collect: the metrics, as of now. It runs in this event loop, for the SDK calls from threads of its own.
        reporter: of a worker: records the times of executions one by one, as OpenTelemetry needs them.
    """
    bridge = _Bridge()
    if reporter is not None:
        reporter.timed = bridge.recorder()
    refreshing = asyncio.create_task(_refresh(bridge, collect))
    try:
        yield
    finally:
        await cancel_and_wait(refreshing)
        with suppress(Exception):  # the last of what was counted, if it can still be had
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
    """An instrument for each metric, made when the metric is first seen."""

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
            # Times are recorded one by one, submissions where they are made.
            if metric.type != "histogram" and _name_of(metric) != TASKS_SUBMITTED
        }
        self._shown = shown
        for metric in metrics:
            if _name_of(metric) in shown and _name_of(metric) not in self._made:
                self._make(metric)

    def _make(self, metric: Metric) -> None:
        name = _name_of(metric)
        create: Callable[..., Any] = self._meter.create_observable_gauge
        if metric.type == "counter":
            create = self._meter.create_observable_counter
        elif name in _UP_DOWN_COUNTERS:
            create = self._meter.create_observable_up_down_counter

        def observe(_: CallbackOptions) -> list[Observation]:
            return self._shown.get(name, [])

        self._made.add(name)
        unit = next((unit for end, unit in _UNITS.items() if name.endswith(end)), "")
        create(name, callbacks=[observe], unit=unit, description=metric.documentation)

    def recorder(self) -> Callable[[str, str, float, float], None]:
        """Return what records the run time and the time in the queue of an execution."""
        run_times, queue_times = (
            self._meter.create_histogram(
                name, unit="s", description=about, explicit_bucket_boundaries_advisory=BOUNDARIES
            )
            for name, about in (
                ("task_duration_seconds", "Time that executions took."),
                ("task_queue_wait_seconds", "Time from the queue to the beginning."),
            )
        )

        def record(name: str, stream: str, run_seconds: float, queue_seconds: float) -> None:
            priority, size = queue_of(stream).split(":")
            attributes = {"task_name": name, "priority": priority, "size": size}
            run_times.record(run_seconds, attributes)
            queue_times.record(queue_seconds, attributes)

        return record
