"""Limits of the sizes of messages, results and errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import msgpack
import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    ExponentialBackoff,
    SendTaskError,
    schedule_many,
    spawn_with_callback,
)
from diracx.tasks.plumbing.annotated import ChildResults
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.sizes import MAX_BYTES, MAX_MESSAGE_BYTES_VARIABLE, in_calls
from diracx.tasks.plumbing.exceptions import TaskConfigError, TaskTooLargeError
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.standard_tasks import SEEN, InterruptedOnce
from support.waiting import until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")
MIB = 1024 * 1024


@dataclass
class Returns(BaseTask):
    size: int

    async def execute(self) -> bytes:
        return b"x" * self.size


@dataclass
class Takes(BaseTask):
    data: bytes = b""

    async def execute(self) -> int:
        SEEN.append(len(self.data))
        return len(self.data)


class Collects(BaseTask):
    async def execute(self, results: ChildResults) -> None:
        SEEN.append([None if result.error is None else result.error["type"] for result in results.values()])


@pytest.fixture
async def small_server(redis: Redis) -> AsyncIterator[None]:
    """The server takes no more than 1 MiB at a time."""
    before = await redis.config_get("proto-max-bulk-len")
    await redis.config_set("proto-max-bulk-len", MIB)
    yield
    await redis.config_set("proto-max-bulk-len", before["proto-max-bulk-len"])


async def _results(redis_url: str, sizes: list[int]) -> list[str | int]:
    """For each size, the length of the stored result, or the type of the stored error."""
    async with TaskSystem([Returns, Collects], redis_url=redis_url, workers=1) as system:
        await spawn_with_callback([Returns(size) for size in sizes], Collects())
        ids = await schedule_many([Returns(size) for size in sizes])
        results = [await system.result(task_id) for task_id in ids]
        await system.drain()
    return [len(each.return_value) if each.error is None else each.error["type"] for each in results]


async def test_a_result_that_is_too_large_is_an_error_for_its_group_too(
    redis_url: str,
) -> None:
    assert await _results(redis_url, [MAX_BYTES + 1, 5, 6, MAX_BYTES - 200]) == [
        "ResultTooLargeError",
        5,
        6,
        MAX_BYTES - 200,
    ]
    assert SEEN == [["ResultTooLargeError", None, None, None]]


@pytest.mark.usefixtures("small_server")
async def test_a_result_that_the_server_refuses_is_an_error_and_its_neighbours_are_settled(
    redis_url: str,
) -> None:
    sizes = [3 * MIB, 5, 400_000, 6, MIB + 10, 400_000]
    refused = "ResultTooLargeError"
    assert await _results(redis_url, sizes) == [refused, 5, 400_000, 6, refused, 400_000]
    assert [[refused, None, None, None, refused, None]] == SEEN


@dataclass
class FailsOnce(BaseTask):
    data: bytes
    retry_policy = ExponentialBackoff(base_delay_seconds=0.01, max_retries=1)

    async def execute(self) -> str:
        SEEN.append("ran")
        if len(SEEN) == 1:
            raise ValueError("x" * 100_000)
        return "done"


@pytest.mark.usefixtures("small_server")
async def test_a_retry_refused_for_long_attempts_is_sent_without_them(
    redis_url: str,
) -> None:
    async with TaskSystem([FailsOnce], redis_url=redis_url, workers=1) as system:
        task_id = await FailsOnce(b"x" * (MIB - 1_500)).schedule()
        assert (await system.result(task_id)).return_value == "done"


@pytest.mark.usefixtures("small_server")
async def test_an_interrupted_task_is_restarted_although_a_long_list_of_attempts_is_refused(
    redis_url: str, redis: Redis
) -> None:
    async with TaskSystem([InterruptedOnce], redis_url=redis_url, workers=1) as system:
        task_id = await InterruptedOnce(b"x" * (MIB - 1_500)).schedule()
        await system.unless_dead(until(lambda: SEEN))
        await redis.delete("lock:mutex:job:lost")
        assert (await system.result(task_id)).return_value == "the second time"


@pytest.mark.usefixtures("small_server")
@pytest.mark.leaves_keys("diracx:tasks:normal:medium", keys.ALIVE, keys.LEASES)
async def test_a_message_for_a_later_version_that_the_server_does_not_defer_ends_no_worker(
    redis_url: str, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"task_id": "newer", "task_name": "test:Takes", "format": 2, "task_args": [b"x" * (MIB - 100)]}
    async with TaskSystem([Takes], redis_url=redis_url, workers=1) as system:
        await redis.xadd("diracx:tasks:normal:medium", {"data": msgpack.packb(fields)})
        await system.unless_dead(until(lambda: "is not settled" in caplog.text))
        await system.result(await Takes(b"x").schedule())
    await redis.delete("diracx:tasks:normal:medium", keys.ALIVE, keys.LEASES)


class FailsAtLength(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=0.3, max_retries=2)
    dlq_eligible = True

    async def execute(self) -> None:
        raise ValueError("é" * 8_000_000)


@pytest.mark.leaves_keys(keys.DEAD_LETTERS)
async def test_a_long_error_message_makes_small_retries_and_a_small_dead_letter(
    redis_url: str, redis: Redis
) -> None:
    largest = 0
    async with TaskSystem([FailsAtLength], redis_url=redis_url, workers=1, task_db_url=None) as system:
        await FailsAtLength().schedule()
        async with asyncio.timeout(30):
            while not await redis.exists(keys.DEAD_LETTERS):
                for data in await redis.hvals(keys.DELAYED_DATA):
                    largest = max(largest, len(data))
                await asyncio.sleep(0.02)
        await system.drain()
    assert 0 < largest < 100_000
    [(_, fields)] = await redis.xrange(keys.DEAD_LETTERS)
    assert len(fields[b"data"]) < 200_000
    assert fields[b"data"].count(b"FailsAtLength") >= 1
    await redis.delete(keys.DEAD_LETTERS)


async def test_a_task_with_a_too_large_message_is_refused_before_anything_is_sent(
    redis_url: str, redis: Redis
) -> None:
    large, small = Takes(b"x" * MAX_BYTES), Takes(b"y")
    later = datetime.now(UTC) + timedelta(hours=1)
    async with TaskSystem([Takes], redis_url=redis_url, workers=0):
        for submitting in (
            large.schedule(),
            large.schedule(at_time=later),
            schedule_many([small, large, small]),
            spawn_with_callback([small, large], small),
            spawn_with_callback([small], large),
            spawn_with_callback([small], small, on_failure=large),
            small.schedule(labels={"mine": "z" * MAX_BYTES}),
        ):
            with pytest.raises(
                TaskTooLargeError, match=r"^cannot submit test:Takes: its message has 4194\d+ bytes"
            ) as e:
                await submitting
            assert "\n" not in str(e.value)
            assert len(str(e.value)) < 300
    for pattern in ("diracx:tasks:*:*", "diracx:tasks:delayed", "diracx:groups*"):
        assert not [key async for key in redis.scan_iter(pattern)]


async def test_the_limit_of_messages_can_be_set(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_MESSAGE_BYTES_VARIABLE, "20000")
    async with TaskSystem([Takes], redis_url=redis_url, workers=1) as system:
        await system.result(await Takes(b"x" * 19_000).schedule())
        with pytest.raises(TaskTooLargeError, match="more than 20000"):
            await Takes(b"x" * 20_000).schedule()
        monkeypatch.setenv(MAX_MESSAGE_BYTES_VARIABLE, "lots")
        with pytest.raises(TaskConfigError, match="must be a number of bytes"):
            await Takes(b"x" * 20_000).schedule()


@pytest.mark.usefixtures("small_server")
async def test_a_message_that_only_the_server_refuses_is_reported_with_its_size(redis_url: str) -> None:
    async with TaskSystem([Takes], redis_url=redis_url, workers=1) as system:
        with pytest.raises(SendTaskError, match=r"has 2\d+ bytes; the server's proto-max-bulk-len"):
            await Takes(b"x" * 2_000_000).schedule()
        with pytest.raises(SendTaskError, match=r"has 2\d+ bytes; the server's proto-max-bulk-len"):
            await schedule_many([Takes(b"x" * 2_000_000), Takes()])
        await system.result(await Takes(b"x").schedule())


async def test_many_large_messages_go_in_several_calls(redis_url: str) -> None:
    tasks = [Takes(b"x" * 3_000_000) for _ in range(8)]
    async with TaskSystem([Takes], redis_url=redis_url, workers=1) as system:
        await schedule_many(tasks)
        await schedule_many(tasks, at_time=datetime.now(UTC))
        await spawn_with_callback(tasks, Takes(b"last"))
        await system.drain()
    assert SEEN.count(3_000_000) == 24
    assert SEEN[-1] == 4


@pytest.mark.parametrize(
    ("sizes", "calls"),
    [([], []), ([1], [1]), ([1] * 5, [3, 2]), ([9 * MIB, 1, 1], [1, 2]), ([5 * MIB] * 3, [1, 1, 1])],
)
def test_calls_hold_so_many_items_and_so_many_bytes(sizes: list[int], calls: list[int]) -> None:
    assert [len(portion) for portion in in_calls(sizes, 3, lambda size: size)] == calls
