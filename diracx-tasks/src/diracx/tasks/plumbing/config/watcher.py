"""Following the configuration: what is written comes into force within 10 s, in a process that runs on.

A look every 5 s costs a `stat`, or two calls of git. What is wrong does not come into force: the last good
configuration stays, and the process says so in its log, in metrics and in Redis.
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
from . import TasksConfig
from .active import ActiveConfig, Announcer, digest
from .sources import ConfigReader, ConfigSnapshot, in_thread

logger = logging.getLogger(__name__)

#: Half of what is promised: the other half is for reading.
POLL_SECONDS = 5.0
#: A read that takes longer is reported, and waited for beside everything else.
_PATIENCE_SECONDS = 15.0
_REDIS_SECONDS = 2.0
#: How long a submission waits for a look: git answers in some hundredths of a second.
_SUBMITTER_PATIENCE_SECONDS = 1.0

VOs = tuple[str, ...] | None
Warn = Callable[[TasksConfig, VOs], Sequence[str]]


def _nothing(_: TasksConfig, __: VOs) -> Sequence[str]:
    return ()


class ConfigWatcher:
    """Follows the configuration as long as it is entered.

    Args:
        reader: where it is read.
        tasks: what is in force at the start,
        vos: and the VOs; None without a DiracX configuration.
        on_change: called in the event loop with settings and VOs when one of them has changed.
        role: what the process is, for `config in-force`.
        redis: where it says what is in force; None: nowhere.
        process: name of the process there, `host:pid:random`.
        warn: what is odd about settings and does not keep them from coming into force, one line each. Called in
            a thread.
        poll_seconds: between two looks.
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
        warn: Warn = _nothing,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.tasks = tasks
        self.vos = vos
        self._reader = reader
        self._on_change = on_change
        self._warn = warn
        self._announcer = None if redis is None else Announcer(redis, process)
        self._look_seconds = poll_seconds
        self._in_force = ActiveConfig(role, reader.source, digest(tasks), time.time(), vos)
        self._reading: asyncio.Future[ConfigSnapshot] | None = None
        self._last: ConfigSnapshot | None = None
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        set_config_is_current(True)
        self._in_force = replace(self._in_force, warnings=tuple(self._warn(self.tasks, self.vos)))
        await self._announce()
        self._following = asyncio.create_task(self._follow(), name="configuration")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._following is not None
        await cancel_and_wait(self._following)
        if self._announcer is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_REDIS_SECONDS):
                    await self._announcer.leave()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._look_seconds)
            try:
                if self._reader.can_change:
                    await self.poll()
            except Exception as error:
                logger.debug("unforeseen", exc_info=True)
                self._judge([f"{self._reader.source} cannot be read: {type(error).__name__}: {error}"])
                self._last = None
            await self._announce()

    async def poll(self) -> None:
        """Look now; what has changed is in force when this returns, unless it is wrong."""
        reading = await self._read()
        if reading is None:
            self._judge([f"{self._reader.source}: reading takes longer than {_PATIENCE_SECONDS:g} s"])
            self._last = None
            return
        if reading is self._last:
            return
        vos = self.vos if reading.vos is None else reading.vos
        problems, tasks = list(reading.problems), reading.tasks
        if tasks is not None:
            self._say_warnings(tuple(await in_thread(partial(self._warn, tasks, vos), "diracx-configuration")))
        # VOs come and go, whatever is wrong with the settings.
        try:
            self._put_in_force(self.tasks if tasks is None else tasks, vos)
        except Exception as error:
            logger.exception("this configuration cannot come into force")
            problems.append(f"it cannot come into force: {error}")
            reading = None  # so that it is tried again
        self._judge(problems)
        self._last = reading

    async def _read(self) -> ConfigSnapshot | None:
        """Read the configuration; None when that takes too long. The next poll then waits for the same reading."""
        if self._reading is None:
            self._reading = in_thread(self._reader.read, "diracx-configuration")
        await asyncio.wait({self._reading}, timeout=_PATIENCE_SECONDS)
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
            logger.info("the VOs have changed: %s", ", ".join(vos or ()) or "there are none")
            self._in_force = replace(self._in_force, vos=vos)
        self.tasks, self.vos = tasks, vos

    def _judge(self, problems: Sequence[str]) -> None:
        """Say what is new about the problems: each of them once, and when there are none any more."""
        known = self._in_force.problems
        now = tuple(dict.fromkeys(problems))
        if now == known:
            return
        for line in now:
            if line not in known:
                logger.error(
                    "configuration of tasks: %s; the last good one (%s) stays in force",
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

    def _say_warnings(self, warnings: tuple[str, ...]) -> None:
        for line in warnings:
            if line not in self._in_force.warnings:
                logger.warning("configuration of tasks: %s", line)
        self._in_force = replace(self._in_force, warnings=warnings)

    async def _announce(self) -> None:
        if self._announcer is None:
            return
        try:
            async with asyncio.timeout(_REDIS_SECONDS):
                await self._announcer.say(self._in_force)
        except Exception as error:  # the server is away, which others report; it is said at the next look
            logger.debug("cannot say which configuration is in force: %s", error)


class CachedConfig:
    """The settings of tasks for code that submits now and then: looked at again when they are asked for.

    At most one look in 5 s. A look that takes long is not waited for: the next question finds what it brought.

    Args:
        reader: where they are read.
        tasks: what is known already; None: read before the first answer.
    """

    def __init__(self, reader: ConfigReader, tasks: TasksConfig | None = None) -> None:
        self._reader = reader
        self._tasks = tasks
        self._poll_at = time.monotonic() + POLL_SECONDS
        self._reading: asyncio.Future[ConfigSnapshot] | None = None
        self._wait_until = 0.0
        self._first = asyncio.Lock()
        self._problems: tuple[str, ...] = ()

    async def tasks(self) -> TasksConfig:
        """The settings as they are written, at most some seconds ago; the last good ones while they are wrong.

        Raises:
            TaskConfigError: when they are wrong and there are none to go on with.
        """
        if self._tasks is None:
            async with self._first:
                if self._tasks is None:
                    self._tasks = await in_thread(self._reader.read_tasks, "diracx-configuration")
                    self._poll_at = time.monotonic() + POLL_SECONDS
        elif self._reader.can_change and time.monotonic() >= self._poll_at:
            await self._poll()
        return self._tasks

    async def _poll(self) -> None:
        if self._reading is None:
            self._reading = in_thread(self._reader.read, "diracx-configuration")
            self._reading.add_done_callback(self._take)
            self._wait_until = time.monotonic() + _SUBMITTER_PATIENCE_SECONDS
        left = self._wait_until - time.monotonic()
        if left > 0:
            await asyncio.wait({self._reading}, timeout=left)

    def _take(self, reading: asyncio.Future[ConfigSnapshot]) -> None:
        self._reading = None
        self._poll_at = time.monotonic() + POLL_SECONDS
        if (error := reading.exception()) is not None:
            logger.error("the configuration of tasks cannot be read", exc_info=error)
            return
        found = reading.result()
        for line in found.problems:
            if line not in self._problems:
                logger.error("configuration of tasks: %s; the last good one stays in force", line)
        if self._problems and not found.problems:
            logger.warning("the configuration of tasks is valid again")
        self._problems = found.problems
        if found.tasks is not None:
            self._tasks = found.tasks
