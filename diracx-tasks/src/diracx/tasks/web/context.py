"""Data source of dashboard and HTTP API: broker, registry, settings, database of dead letters."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from redis.asyncio import Redis

from .. import operations as monitor
from ..operations import Point, Snapshot
from ..operations.health import Health, HealthChecks, health_checks
from ..operations.single_flight import SingleFlightCache
from ..plumbing.broker import RedisStreamBroker
from ..plumbing.config import TasksConfig
from ..plumbing.config.reader import ConfigReader, in_thread
from ..plumbing.registry import TaskRegistry

if TYPE_CHECKING:
    from ..plumbing.persistence import TaskDB

#: How long a snapshot is cached.
_SHARED_SECONDS = 1.0
#: How long settings, health checks and history are cached.
_SLOW_SECONDS = 5.0
#: Number of points in the chart of the load.
_KEPT_LOADS = 900


@dataclass(frozen=True, slots=True)
class Settings:
    """Current settings of tasks."""

    tasks: TasksConfig
    """The last valid settings."""
    vos: tuple[str, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """Number of waiting and running tasks at one moment."""

    at: float
    """Seconds since the epoch, by the server's clock."""
    waiting: int
    running: int


class AppContext:
    """Data source of one task system.

    Args:
        broker: the broker, open.
        registry: the installed tasks. Less is known of other tasks: positions in place of names of arguments.
        reader: reads the configuration.
        task_db: the database of dead letters, open; None if not configured.
        label: name of the system on the pages.
    """

    def __init__(
        self,
        broker: RedisStreamBroker,
        registry: TaskRegistry,
        reader: ConfigReader,
        task_db: TaskDB | None = None,
        label: str = "",
    ) -> None:
        self.broker = broker
        self.registry = registry
        self.task_db = task_db
        self.label = label
        self.loads: deque[Load] = deque(maxlen=_KEPT_LOADS)
        """The load of the last snapshots."""
        self.reader = reader
        self._settings = Settings(TasksConfig(), ())
        self._opening = asyncio.Lock()
        self._checks: HealthChecks | None = None
        self._stack = AsyncExitStack()
        self.responses = SingleFlightCache()
        """Responses that equal requests share."""

    @property
    def redis(self) -> Redis:
        """Client of the server."""
        return self.broker.redis

    async def settings(self) -> Settings:
        """Return the current settings, the last valid ones while the configuration is wrong."""

        async def read() -> Settings:
            found = await in_thread(self.reader.read, "dashboard-configuration")
            tasks = self._settings.tasks if found.tasks is None else found.tasks
            vos = self._settings.vos if found.vos is None else found.vos
            self._settings = Settings(tasks, vos, found.problems)
            return self._settings

        return await self.responses.get("settings", read, _SLOW_SECONDS)

    async def health(self) -> Health:
        """Return the cached results of the health checks; a server that does not respond is an alert.

        Raises:
            TaskConfigError: a threshold in the environment is invalid.
        """
        async with self._opening:
            if self._checks is None:
                self._checks = await self._stack.enter_async_context(health_checks(self.redis, self.task_db))
        return await self.responses.get("health", self._checks.run, _SLOW_SECONDS)

    async def aclose(self) -> None:
        """Close the resources of the health checks."""
        await self._stack.aclose()

    async def snapshot(self) -> Snapshot:
        """Return a snapshot of the system, at most a second old."""

        async def read() -> Snapshot:
            found = await monitor.snapshot(self.redis)
            waiting = sum(queue.backlog for queue in found.queues)
            running = sum(queue.running for queue in found.queues)
            self.loads.append(Load(found.at.timestamp(), waiting, running))
            return found

        return await self.responses.get("snapshot", read, _SHARED_SECONDS)

    async def history(self) -> list[Point]:
        """Return counters of the past hour by minute."""
        return await self.responses.get("history", lambda: monitor.history(self.redis), _SLOW_SECONDS)
