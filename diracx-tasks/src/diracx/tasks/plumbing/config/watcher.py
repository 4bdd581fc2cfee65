"""Watches the configuration of a running process: changes come into force within 10 s.

A poll every 5 s reads the file, or calls git twice. If the configuration is wrong, the last valid one stays in
force, and the problem is reported in the log, in metrics and in Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Self

from redis.asyncio import Redis

from .._util.tasks import cancel_and_wait
from .._util.telemetry import count_reload_failure, set_config_is_current
from ..exceptions import TaskConfigError
from . import TasksConfig
from .active import ActiveConfig, ActiveConfigPublisher, digest
from .reader import ConfigReader, ConfigSnapshot, in_thread, problems_of

logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0
READING_SECONDS = 15.0
_REDIS_SECONDS = 2.0
#: Maximum time that a submission waits for a poll.
SUBMITTER_SECONDS = 1.0

VOs = tuple[str, ...] | None
Warn = Callable[[TasksConfig, VOs], Sequence[str]]


class ConfigWatcher:
    """Watches the configuration while its context is entered.

    Args:
        reader: reads the configuration.
        tasks: settings in force at the start.
        vos: VOs at the start; None without a DiracX configuration.
        on_change: called in the event loop with settings and VOs when they have changed.
        role: role of the process, for `config in-force`.
        redis: server to publish the active configuration; None: do not publish it.
        process: name of the process there, `host:pid:random`.
        warn: returns warnings about settings, one line each. Called in a thread.
        poll_seconds: poll interval.
        reading_seconds: a read that takes longer is reported, and continues in the background.
    """

    def __init__(
        self,
        reader: ConfigReader,
        tasks: TasksConfig,
        vos: VOs,
        on_change: Callable[[TasksConfig, VOs], None],
        *,
        role: str = "",
        redis: Redis | None = None,
        process: str = "",
        warn: Warn = lambda _tasks, _vos: (),
        poll_seconds: float = POLL_SECONDS,
        reading_seconds: float = READING_SECONDS,
    ) -> None:
        self.tasks = tasks
        self.vos = vos
        self._reader = reader
        self._on_change = on_change
        self._warn = warn
        self._publisher = None if redis is None else ActiveConfigPublisher(redis, process)
        self._poll_seconds = poll_seconds
        self._reading_seconds = reading_seconds
        self._in_force = ActiveConfig(role, reader.source, digest(tasks), time.time(), vos)
        self._reading: asyncio.Future[ConfigSnapshot] | None = None
        self._last: ConfigSnapshot | None = None
        self._polling: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        set_config_is_current(True)
        self._in_force = replace(self._in_force, warnings=tuple(self._warn(self.tasks, self.vos)))
        await self._publish()
        self._polling = asyncio.create_task(self._poll_repeatedly(), name="configuration")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._polling is not None
        await cancel_and_wait(self._polling)
        if self._publisher is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_REDIS_SECONDS):
                    await self._publisher.remove()

    async def _poll_repeatedly(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                if self._reader.can_change:
                    await self.poll()
            except Exception as error:
                logger.debug("unexpected error", exc_info=True)
                self._set_problems([f"{self._reader.source} cannot be read: {type(error).__name__}: {error}"])
                self._last = None
            await self._publish()

    async def poll(self) -> None:
        """Read the configuration; if it has changed and is valid, it is in force when this returns."""
        reading = await self._read()
        if reading is None:
            self._set_problems([f"{self._reader.source}: reading takes longer than {self._reading_seconds:g} s"])
            self._last = None
            return
        if reading is self._last:
            return
        vos = self.vos if reading.vos is None else reading.vos
        problems, tasks = list(reading.problems), reading.tasks
        if tasks is not None:
            self._set_warnings(tuple(await in_thread(partial(self._warn, tasks, vos), "diracx-configuration")))
        # VOs are updated even if the settings are wrong.
        try:
            self._put_in_force(self.tasks if tasks is None else tasks, vos)
        except Exception as error:
            logger.exception("this configuration cannot come into force")
            problems.append(f"it cannot come into force: {error}")
            reading = None  # so that it is tried again
        self._set_problems(problems)
        self._last = reading

    async def _read(self) -> ConfigSnapshot | None:
        """Read the configuration; None if that takes too long. The next poll then waits for the same read."""
        if self._reading is None:
            self._reading = in_thread(self._reader.read, "diracx-configuration")
        await asyncio.wait({self._reading}, timeout=self._reading_seconds)
        if not self._reading.done():
            return None
        done, self._reading = self._reading, None
        return done.result()

    def _put_in_force(self, tasks: TasksConfig, vos: VOs) -> None:
        name = digest(tasks)
        if name == self._in_force.digest and vos == self.vos:
            return
        self._on_change(tasks, vos)
        if name != self._in_force.digest:
            logger.info("the configuration of tasks has changed: %s is in force", name)
            self._in_force = replace(self._in_force, digest=name, since=time.time())
        if vos != self.vos:
            logger.info("the VOs have changed: %s", ", ".join(vos or ()) or "none")
            self._in_force = replace(self._in_force, vos=vos)
        self.tasks, self.vos = tasks, vos

    def _set_problems(self, problems: Sequence[str]) -> None:
        """Set the problems; log each new one, and when all are resolved."""
        known = self._in_force.problems
        now = tuple(dict.fromkeys(problems))
        if now == known:
            return
        for line in now:
            if line not in known:
                logger.error(
                    "configuration of tasks: %s; the last valid one (%s) stays in force",
                    line,
                    self._in_force.digest,
                )
        if now:
            count_reload_failure()
        else:
            logger.warning("the configuration of tasks is valid again: %s is in force", self._in_force.digest)
        set_config_is_current(not now)
        since = (self._in_force.problems_since or time.time()) if now else None
        self._in_force = replace(self._in_force, problems=now, problems_since=since)

    def _set_warnings(self, warnings: tuple[str, ...]) -> None:
        for line in warnings:
            if line not in self._in_force.warnings:
                logger.warning("configuration of tasks: %s", line)
        self._in_force = replace(self._in_force, warnings=warnings)

    async def _publish(self) -> None:
        if self._publisher is None:
            return
        try:
            async with asyncio.timeout(_REDIS_SECONDS):
                await self._publisher.publish(self._in_force)
        except Exception as error:  # reported elsewhere; published again after the next poll
            logger.debug("cannot publish the active configuration: %s", error)


class CachedConfig:
    """Settings of tasks for clients: read again on access, at most every 5 s.

    A slow read continues in the background; a later access gets its result.
    """

    def __init__(self, reader: ConfigReader) -> None:
        self._reader = reader
        self._tasks: TasksConfig | None = None
        self._poll_at = 0.0
        self._reading: asyncio.Future[TasksConfig] | None = None
        self._wait_until = 0.0
        self._problems: list[str] = []

    async def tasks(self) -> TasksConfig:
        """Return the current settings, the last valid ones while the configuration is wrong.

        Raises:
            TaskConfigError: it is wrong, or cannot be read in time, and there are no valid ones.
        """
        now = time.monotonic()
        if self._reading is None and (self._tasks is None or (self._reader.can_change and now >= self._poll_at)):
            self._reading = in_thread(self._reader.read_tasks, "diracx-configuration")
            self._reading.add_done_callback(self._on_read)
            self._wait_until = now + (READING_SECONDS if self._tasks is None else SUBMITTER_SECONDS)
        if (reading := self._reading) is not None:
            await asyncio.wait({reading}, timeout=max(0.0, self._wait_until - time.monotonic()))
            if self._tasks is None:
                if not reading.done():
                    raise TaskConfigError(
                        f"{self._reader.source}: reading takes longer than {READING_SECONDS:g} s"
                    )
                return reading.result()
        assert self._tasks is not None
        return self._tasks

    def _on_read(self, reading: asyncio.Future[TasksConfig]) -> None:
        self._reading, self._poll_at = None, time.monotonic() + POLL_SECONDS
        error = reading.exception()
        problems = [] if error is None else problems_of(error)
        if self._tasks is not None:
            for line in problems:
                if line not in self._problems:
                    logger.error("configuration of tasks: %s; the last valid one stays in force", line)
            if self._problems and not problems:
                logger.warning("the configuration of tasks is valid again")
            self._problems = problems
        if not problems:
            self._tasks = reading.result()
