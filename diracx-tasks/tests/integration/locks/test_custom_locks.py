"""Lock classes with a custom `acquire`, as in the published package."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from diracx.tasks.plumbing import (
    BaseLimiter,
    BaseLock,
    BaseTask,
    MutexLock,
    RateLimiter,
    UnableToAcquireLockError,
    schedule_many,
    task_wrapper,
)
from diracx.tasks.plumbing.custom_locks import acquire_custom
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from support.raised_exceptions import Panic
from support.standard_tasks import SEEN
from support.waiting import until

OPEN: set[str] = set()
SOON = {"lock_retry_seconds": 0.05}


@pytest.fixture(autouse=True)
def _forget() -> None:
    OPEN.clear()
    SEEN.clear()


class Flag(BaseLock):
    """A lock of an extension: one key, set if it is not there."""

    async def acquire(self, redis: Redis) -> bool:
        return bool(await redis.set(self.redis_key, self._owner_id, nx=True, px=30_000))

    async def release(self, redis: Redis) -> None:
        await redis.delete(self.redis_key)

    async def extend(self, redis: Redis) -> bool:
        await asyncio.Event().wait()  # must not delay the extension of others
        return True


class Window(BaseLimiter):
    """Grants when the window is open; `extended` is the result of an extension."""

    ttl_ms = 60
    extended: ClassVar[list[Any]] = []

    async def acquire(self, redis: Redis) -> bool:
        SEEN.append("asked")
        if "away" in OPEN:
            OPEN.remove("away")
            raise RedisConnectionError("connection reset")
        if "broken" in OPEN:
            raise ValueError("broken")
        return "window" in OPEN

    async def release(self, redis: Redis) -> None:
        SEEN.append("released")
        if "window" not in OPEN:
            raise Panic("cannot")

    async def extend(self, redis: Redis) -> bool:
        found = self.extended.pop(0) if len(self.extended) > SEEN.count("released") else True
        if found == "hangs":
            await asyncio.Event().wait()
        if isinstance(found, BaseException):
            raise found
        return bool(found)


class AskingMutex(MutexLock):
    async def acquire(self, redis: Redis) -> bool:
        return "mutex" in OPEN and await super().acquire(redis)


class AskingRate(RateLimiter):
    """Has no limit, and is acquired nevertheless."""

    async def acquire(self, redis: Redis) -> bool:
        return "rate" in OPEN


@dataclass
class Locked(BaseTask):
    which: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        locks: dict[str, list[BaseLock]] = {
            "flag": [Flag(JOB, 1)],
            "window": [MutexLock(JOB, 2), Flag(JOB, 3), Window(JOB, 3)],
            "mutex": [AskingMutex(JOB, 4)],
            "rate": [AskingRate(JOB, 5)],
        }
        return locks[self.which]

    async def execute(self) -> str:
        SEEN.append("begins")
        await asyncio.sleep(0.01)
        SEEN.append("ends")
        return self.which


@dataclass
class Long(Locked):
    """Runs until it is cancelled, but for the second time."""

    async def execute(self) -> str:
        SEEN.append("begins")
        if SEEN.count("begins") == 1:
            await asyncio.sleep(60)
        return self.which


async def seen(what: str, times: int) -> None:
    await until(lambda: SEEN.count(what) >= times, seconds=20)  # the task notes it in a list


async def test_lock_class_of_an_extension_excludes_between_workers(redis_url: str, redis: Redis) -> None:
    async with TaskSystem([Locked], redis_url=redis_url, workers=2, settings=SOON) as system:
        ids = await schedule_many([Locked("flag")] * 8)
        for each in ids:
            assert (await system.result(each)).return_value == "flag"
    assert SEEN == ["begins", "ends"] * 8
    assert not await redis.exists("job:1")


async def test_refusal_releases_all_other_locks_and_counts_no_attempt(redis_url: str, redis: Redis) -> None:
    async with TaskSystem([Locked], redis_url=redis_url, workers=1, settings=SOON) as system:
        task_id = await Locked("window").schedule()
        await seen("asked", 3)
        assert "begins" not in SEEN
        async with asyncio.timeout(20):
            while not await MutexLock(JOB, 2, ttl_ms=200).acquire(redis):  # free between two refusals
                pass
        async with asyncio.timeout(20):
            while not await Flag(JOB, 3).acquire(redis):
                pass
        await redis.delete("job:3")
        OPEN.add("window")
        assert (await system.result(task_id)).return_value == "window"
    assert SEEN.count("released") == 1
    assert not await redis.exists("job:3", "lock:mutex:job:2")


@pytest.mark.parametrize("which", ["mutex", "rate"])
async def test_an_overridden_acquire_of_a_subclass_is_called(redis_url: str, redis: Redis, which: str) -> None:
    async with TaskSystem([Locked], redis_url=redis_url, workers=1, settings=SOON) as system:
        task_id = await Locked(which).schedule()
        with pytest.raises(TimeoutError):
            await system.result(task_id, timeout=0.5)
        assert SEEN == []
        OPEN.add(which)
        assert (await system.result(task_id)).return_value == which
    assert not await redis.exists("lock:mutex:job:4")


@pytest.mark.parametrize(
    "extended",
    [
        [True, False],
        *([True] * first + [error] * 100 for first in (0, 1) for error in (RedisConnectionError(), "hangs")),
        *([True] + [error] * 100 for error in (Panic(), SystemExit(3), asyncio.CancelledError())),
    ],
)
async def test_task_is_cancelled_and_starts_again_when_a_custom_lock_is_lost(
    redis_url: str, extended: list[Any]
) -> None:
    OPEN.add("window")
    Window.extended[:] = extended
    async with TaskSystem([Long], redis_url=redis_url, workers=1, settings=SOON) as system:
        assert (await system.result(await Long("window").schedule())).return_value == "window"
    assert SEEN.count("begins") == SEEN.count("released") == 2


@pytest.mark.parametrize("extended", [False, NotImplementedError()])
async def test_a_custom_lock_that_is_never_extended_is_never_lost(redis: Redis, extended: Any) -> None:
    lost: list[str] = []
    Window.extended[:] = [extended] * 100
    OPEN.add("window")
    async with AsyncExitStack() as stack:
        assert await acquire_custom(stack, [Window(JOB, 6)], redis, lost.append) is None
        await asyncio.sleep(3 * Window.ttl_ms / 1000)
    assert not lost


async def test_an_unavailable_server_is_a_refusal_and_an_error_is_a_failure(redis_url: str) -> None:
    OPEN.update(["window", "away"])
    async with TaskSystem([Locked], redis_url=redis_url, workers=1, settings=SOON) as system:
        assert (await system.result(await Locked("window").schedule())).return_value == "window"
        assert SEEN.count("asked") == 2
        OPEN.add("broken")
        ended = await system.result(await Locked("window").schedule())
        assert ended.error is not None
        assert ended.error["message"] == "broken"


async def test_a_failing_release_does_not_change_the_outcome(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def execute(self: Any) -> str:
        OPEN.clear()
        return "done"

    monkeypatch.setattr(Locked, "execute", execute)
    OPEN.add("window")
    async with TaskSystem([Locked], redis_url=redis_url, workers=1, settings=SOON) as system:
        assert (await system.result(await Locked("window").schedule())).return_value == "done"
    assert "cannot release <Window job:3>: Panic: cannot" in caplog.text


async def test_task_wrapper_acquires_custom_locks_and_skips_limiters_in_interactive_mode(redis: Redis) -> None:
    with pytest.raises(UnableToAcquireLockError, match="<Window job:3>"):
        await task_wrapper(Locked, "window", _redis=redis)
    assert not await redis.exists("job:3", "lock:mutex:job:2")
    assert await task_wrapper(Locked, "window", _redis=redis, _interactive=True) == "window"
