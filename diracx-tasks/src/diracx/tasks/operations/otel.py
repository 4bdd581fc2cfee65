"""The same metrics through OpenTelemetry, in a process where its SDK is set up."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..plumbing._util.tasks import end
from ..plumbing._util.telemetry import METER, TASKS_SUBMITTED
from .cursors import queue_of
from .families import BOUNDARIES, Family, Histogram

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation

    from ..plumbing.worker.reporter import Reporter

logger = logging.getLogger(__name__)

#: Figures are never older than this, nor than half the time between two exports.
_LONGEST_PAUSE_SECONDS, _SHORTEST_PAUSE_SECONDS = 15.0, 0.2
_UNITS = {"_seconds": "s", "_bytes": "By"}


@asynccontextmanager
async def exported(
    collect: Callable[[], Awaitable[Sequence[Family | Histogram]]], reporter: Reporter | None = None
) -> AsyncIterator[None]:
    """Tell OpenTelemetry what is collected, inside the block.

    Args:
        collect: the metrics, as of now. It is called in this event loop, for the SDK asks from threads of its own.
        reporter: of a worker: tells how long executions took, one by one, as histograms there need it.
    """
    bridge = _Bridge()
    if reporter is not None:
        reporter.timed = bridge.recorder()
    refreshing = asyncio.create_task(_refresh(bridge, collect))
    try:
        yield
    finally:
        await end(refreshing)
        with suppress(Exception):  # the last of what was counted, if it can still be had
            bridge.show(await collect())


async def _refresh(bridge: _Bridge, collect: Callable[[], Awaitable[Sequence[Family | Histogram]]]) -> None:
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


class _Bridge:
    """An instrument for each metric, made when the metric is first seen."""

    def __init__(self) -> None:
        from opentelemetry import metrics

        self._meter = metrics.get_meter(METER)
        self._made: set[str] = set()
        self._shown: dict[str, list[Observation]] = {}

    def show(self, families: Sequence[Family | Histogram]) -> None:
        """From now on these are the values."""
        from opentelemetry.metrics import Observation

        shown = {
            family.name: [Observation(value, dict(labels)) for labels, value in family.samples]
            for family in families
            # Histograms are told one by one, submissions by whoever submits.
            if isinstance(family, Family) and family.name != TASKS_SUBMITTED
        }
        self._shown = shown
        for family in families:
            if isinstance(family, Family) and family.name in shown and family.name not in self._made:
                self._make(family)

    def _make(self, family: Family) -> None:
        name = family.name
        create: dict[str, Callable[..., Any]] = {
            "counter": self._meter.create_observable_counter,
            "gauge": self._meter.create_observable_gauge,
            "level": self._meter.create_observable_up_down_counter,
        }

        def observe(_: CallbackOptions) -> list[Observation]:
            return self._shown.get(name, [])

        self._made.add(name)
        unit = next((unit for end, unit in _UNITS.items() if name.endswith(end)), "")
        create[family.kind](name, callbacks=[observe], unit=unit, description=family.about)

    def recorder(self) -> Callable[[str, str, float, float], None]:
        """What records the run time and the time in the queue of an execution."""
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
