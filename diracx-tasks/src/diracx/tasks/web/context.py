"""Data source of dashboard and HTTP interface: one broker, its tasks, their settings, and the dead letters."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from redis.asyncio import Redis

from .. import operations as monitor
from ..operations import Point, Snapshot
from ..operations.health import Health, HealthChecks, health_checks
from ..operations.single_flight import SingleFlightCache
from ..plumbing.base_task import BaseTask
from ..plumbing.broker import RedisStreamBroker
from ..plumbing.config import TasksConfig
from ..plumbing.config.sources import ConfigReader, ConfigSnapshot, in_thread
from ..plumbing.registry import TaskRegistry

if TYPE_CHECKING:
    from ..plumbing.persistence import TaskDB

#: How long a snapshot is shared.
_SHARED_SECONDS = 1.0
#: What changes slowly, or costs more.
_SLOW_SECONDS = 5.0
#: How often the settings are read again, at most.
_READ_SECONDS = 5.0
#: Looks that are kept for the chart of the load.
_KEPT_LOOKS = 900


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings that the operator has written, as of some seconds ago."""

    tasks: TasksConfig
    """The last good ones."""
    vos: tuple[str, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """Load at one moment."""

    at: float
    """Seconds since the epoch, by the server's clock."""
    waiting: int
    running: int


class AppContext:
    """One task system.

    Args:
        broker: the way to its server.
        registry: the tasks that are installed here; others are seen as well, but not all about them is known.
        reader: reads what the operator has written.
        task_db: the database of dead letters, open; None where there is none.
        label: what it is called on the pages.
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
        self.loads: deque[Load] = deque(maxlen=_KEPT_LOOKS)
        """The load of the last snapshots."""
        self._reader = reader
        self._read_at = 0.0
        self._settings = Settings(TasksConfig(), ())
        self._reading = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._checks: HealthChecks | None = None
        self._stack = AsyncExitStack()
        self.answers = SingleFlightCache()
        """Answers that equal requests share."""

    @property
    def redis(self) -> Redis:
        """The server."""
        return self.broker.redis

    @property
    def config_source(self) -> str:
        """Source of the settings."""
        return self._reader.source

    def task_class(self, name: str) -> type[BaseTask] | None:
        """The class of a registry name; None when it is not installed here."""
        return self.registry.get(name)

    async def settings(self) -> Settings:
        """The settings as they are written, the last good ones while they are wrong."""
        async with self._reading:
            if not self._read_at or (self._reader.can_change and time.monotonic() - self._read_at > _READ_SECONDS):
                reading = await in_thread(self._reader.read, "dashboard-configuration")
                self._settings = _settings(reading, self._settings)
                self._read_at = time.monotonic()
            return self._settings

    async def health(self) -> Health:
        """Results of the health checks, of some seconds ago at most; nothing is raised when a server is away.

        Raises:
            TaskConfigError: a threshold in the environment is wrong.
        """
        async with self._opening:
            if self._checks is None:
                self._checks = await self._stack.enter_async_context(health_checks(self.redis, self.task_db))
        return await self.answers.get("health", self._checks.run, _SLOW_SECONDS)

    async def aclose(self) -> None:
        """Close what the health checks have opened."""
        await self._stack.aclose()

    async def snapshot(self) -> Snapshot:
        """The whole system, as it was at most a second ago.

        Raises:
            redis.exceptions.RedisError: when the server does not answer.
        """

        async def look() -> Snapshot:
            found = await monitor.snapshot(self.redis)
            waiting = sum(queue.backlog for queue in found.queues)
            running = sum(queue.running for queue in found.queues)
            self.loads.append(Load(found.at.timestamp(), waiting, running))
            return found

        return await self.answers.get("snapshot", look, _SHARED_SECONDS)

    async def history(self) -> list[Point]:
        """The past hour by the minute.

        Raises:
            redis.exceptions.RedisError: when the server does not answer.
        """
        return await self.answers.get("history", lambda: monitor.history(self.redis), _SLOW_SECONDS)


def _settings(reading: ConfigSnapshot, before: Settings) -> Settings:
    tasks = before.tasks if reading.tasks is None else reading.tasks
    vos = before.vos if reading.vos is None else reading.vos
    return Settings(tasks, vos, reading.problems)
