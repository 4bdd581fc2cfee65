"""A task system with objects of every kind and hostile arguments, for tests of the dashboard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from unittest.mock import patch

import pytest
from diracx.tasks import operations as monitor
from diracx.tasks.plumbing import (
    BaseLock,
    BaseTask,
    CallbackSpawner,
    ExponentialBackoff,
    IntervalSeconds,
    MutexLock,
    NoRetry,
    PeriodicVoAwareBaseTask,
    Priority,
    Size,
    register_locked_object_type,
)
from diracx.tasks.plumbing.broker.models import Submission, TaskMessage
from diracx.tasks.plumbing.worker import reporter
from diracx.tasks.testing import TaskSystem
from diracx.tasks.web.auth.backends import Principal, Role, TokenBackend
from diracx.tasks.web.context import AppContext
from diracx.tasks.web.dashboard import DashboardApp
from diracx.tasks.web.dashboard.page import Extension
from diracx.tasks.web.sse import StreamSettings
from redis.asyncio import Redis

from support.fixed_vos import ReaderWithVos
from support.waiting import until

#: Text of an attacker who wants to run code in an operator's browser.
HOSTILE = "<script>window.hacked=1</script>\"'><img src=x onerror=window.hacked=1>" + "\u202e" + "w" * 120
SECRET = "correct-horse-battery"
WRITER, READER = "the-token-of-the-writer", "the-token-of-the-reader"
SITE = register_locked_object_type("dashboard_site")


@dataclass
class Hold(BaseTask):
    """Runs until it is cancelled."""

    note: str

    async def execute(self) -> None:
        await asyncio.sleep(3600)


@dataclass
class HoldSite(BaseTask):
    """The same, with a lock."""

    site: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(SITE, self.site)]

    async def execute(self) -> None:
        await asyncio.sleep(3600)


@dataclass
class Urgent(BaseTask):
    """For a worker that does not run."""

    note: str
    priority = Priority.REALTIME
    size = Size.LARGE

    async def execute(self) -> None: ...


@dataclass
class Fail(BaseTask):
    """Ends as a dead letter."""

    url: str
    password: str

    secret_fields = frozenset({"password"})
    retry_policy = NoRetry()
    dlq_eligible = True

    async def execute(self) -> None:
        raise ValueError(f"cannot fetch {self.url} from https://user:{SECRET}@se.example.org/")


@dataclass
class Flaky(BaseTask):
    """Is tried again in an hour."""

    url: str
    retry_policy = ExponentialBackoff(base_delay_seconds=3600, max_retries=3)

    async def execute(self) -> None:
        raise TimeoutError(f"no response from {self.url}")


@dataclass
class Quick(BaseTask):
    """Just runs."""

    number: int

    async def execute(self) -> int:
        return self.number


@dataclass
class Split(BaseTask):
    """Waits for children that do not end."""

    async def execute(self, spawn: CallbackSpawner) -> str:
        return await spawn([Hold("child"), Quick(1)], Quick(2))


class Tidy(PeriodicVoAwareBaseTask):
    """Periodic."""

    default_schedule = IntervalSeconds(3600)

    async def execute(self) -> str:
        return f"tidy {self.vo}"


TASKS = [Hold, HoldSite, Urgent, Fail, Flaky, Quick, Split, Tidy]


class World:
    """The system, and its dashboard."""

    def __init__(self, system: TaskSystem, app: DashboardApp, context: AppContext) -> None:
        self.system = system
        self.app = app
        self.context = context

    async def refuse(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the server take no task for one queue, and the dead letters be for that queue."""
        monkeypatch.setattr(Fail, "priority", Urgent.priority)
        monkeypatch.setattr(Fail, "size", Urgent.size)
        await self.system.broker.redis.set("diracx:tasks:realtime:large", "in the way", ex=600)

    async def dead_letters(self) -> list[str]:
        """Statuses of the dead letters."""
        assert self.system.task_db is not None
        async with self.system.task_db as db:
            return [str(dead_letter["status"]) for dead_letter in await db.search(status=None)]


@asynccontextmanager
async def small_world(
    redis_url: str, extensions: list[Extension] | None = None, stream: StreamSettings | None = None
) -> AsyncIterator[World]:
    """A system in which something of everything has happened, and been reported."""
    try:
        # Reports are sent every 5 s by default.
        with patch.object(reporter, "REPORT_SECONDS", 0.3):
            async with _world(redis_url, extensions, stream) as world:
                yield world
    finally:
        # What was held up is still there, on purpose.
        async with Redis.from_url(redis_url) as client:
            await client.flushall()


@asynccontextmanager
async def _world(
    redis_url: str, extensions: list[Extension] | None, stream: StreamSettings | None
) -> AsyncIterator[World]:
    tasks = {f"test:{task.__name__}": task for task in TASKS if task is not Urgent}
    tasks["test:" + "Long" * 25] = type("Long" * 25, (Quick,), {})
    async with TaskSystem(
        tasks, redis_url=redis_url, workers=1, vos=["lhcb", "gridpp"], settings={"grace_seconds": 0.0}
    ) as system:
        for task in (Hold(HOSTILE), HoldSite(HOSTILE), HoldSite(HOSTILE), Flaky(HOSTILE), Split(), Quick(7)):
            await task.schedule()
        redis = system.broker.redis

        async def reported() -> bool:
            running = (await monitor.running(redis)).items
            stored = await world.dead_letters()
            snapshot = await monitor.snapshot(redis)
            return len(running) >= 3 and len(stored) == 4 and bool(snapshot.schedules) and snapshot.groups == 1

        reader = ReaderWithVos()
        reader.vos = ("gridpp", "lhcb")
        context = AppContext(system.broker, system.registry, reader, system.task_db, "test")

        async def this() -> AppContext:
            return context

        tokens = {
            WRITER: Principal("wilma", Role.WRITE, None),
            READER: Principal("rita", Role.READ, None),
        }
        backend = TokenBackend(tokens, "ask wilma")
        app = DashboardApp(
            this, backend, hosts={"localhost", "127.0.0.1"}, extensions=extensions or [], stream=stream
        )
        world = World(system, app, context)
        for number in range(3):
            await Fail(f"{HOSTILE}{number}", SECRET).schedule()

            async def stored_again(number: int = number) -> bool:
                return len(await world.dead_letters()) == number + 1

            await until(stored_again)
        unknown = TaskMessage(task_id="0" * 32, task_name=f"test:{HOSTILE}", task_args=[HOSTILE])
        waiting = TaskMessage(task_id="f" * 32, task_name="test:Urgent", task_args=[HOSTILE])
        await system.broker.submit(
            [
                Submission(unknown, "diracx:tasks:normal:medium"),
                Submission(waiting, "diracx:tasks:realtime:large"),
            ]
        )
        await until(reported)
        try:
            yield world
        finally:
            await app.aclose()
