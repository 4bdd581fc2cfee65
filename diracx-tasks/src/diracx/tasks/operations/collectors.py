"""Collects metrics that need database queries: dead letters, and metrics of other distributions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from ..plumbing.plugins import load_plugin
from .exposition import MetricsSource, gauge
from .single_flight import SingleFlightCache

if TYPE_CHECKING:
    from prometheus_client import Metric

    from ..plumbing.persistence import TaskDB

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "diracx.tasks_metrics"
#: How long metrics are cached, and timeout of each collector.
_MAX_AGE_SECONDS, _TIMEOUT_SECONDS = 30.0, 3.0

Collect = Callable[[], Awaitable[Sequence["Metric"]]]


class Collectors:
    """Runs all collectors concurrently. The metrics of a failing one are omitted, and its error is logged once."""

    def __init__(self, collectors: Mapping[str, Collect]) -> None:
        self._collectors = collectors
        self._failing: set[str] = set()
        self._cache = SingleFlightCache()

    async def metrics(self) -> list[Metric]:
        """Return all metrics, at most 30 s old."""
        return await self._cache.get("metrics", self._collect, _MAX_AGE_SECONDS) if self._collectors else []

    async def _collect(self) -> list[Metric]:
        collected = await asyncio.gather(*(self._run(name) for name in self._collectors))
        up = [({"source": name}, 0 if name in self._failing else 1) for name in self._collectors]
        return [
            *(metric for part in collected for metric in part),
            gauge("metrics_source_up", "1 if the database behind these figures responds.", up),
        ]

    async def _run(self, name: str) -> Sequence[Metric]:
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                metrics = await self._collectors[name]()
        except Exception as error:
            if name not in self._failing:
                logger.warning("no metrics of %s: %s", name, str(error) or type(error).__name__)
            self._failing.add(name)
            return []
        if name in self._failing:
            logger.warning("metrics of %s are available again", name)
        self._failing.discard(name)
        return metrics


@asynccontextmanager
async def open_collectors(task_db: TaskDB | None) -> AsyncIterator[Collectors]:
    """Open all collectors, including that of `task_db`; log a warning for each that cannot be opened."""
    collectors: dict[str, Collect] = {}
    if task_db is not None:
        collectors["dead_letters"] = _dead_letters_of(task_db)
    async with AsyncExitStack() as stack:
        for name, entry in sorted({entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}.items()):
            try:
                source: MetricsSource = load_plugin(entry.load)
                collect = await stack.enter_async_context(source())
            except Exception as error:
                logger.warning("no metrics of %s: %s", name, f"{type(error).__name__}: {error}")
                continue
            if collect is not None:
                collectors[name] = collect
        yield Collectors(collectors)


def _dead_letters_of(db: TaskDB) -> Collect:
    async def collect() -> list[Metric]:
        counts = await db.count_by_task()
        samples = [
            ({"task_name": name, "status": str(status)}, number) for (name, status), number in counts.items()
        ]
        return [gauge("dead_letter_queue_tasks", "Dead letters in the database.", samples)]

    return collect
