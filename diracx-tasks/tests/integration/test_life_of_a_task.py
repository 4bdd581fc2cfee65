"""Tasks from submission to settlement, with a real server and workers in this process."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    MutexLock,
    Priority,
    RetryPolicyBase,
    Size,
    schedule_many,
)
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.models import submit_task
from diracx.tasks.plumbing.broker.redis_streams import stream_name_for
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.standard_tasks import SEEN, Background, Broken, Echo
from support.waiting import until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


@dataclass
class Realtime(Echo):
    priority = Priority.REALTIME


async def test_result_carries_the_value_under_the_id_of_the_submission(redis_url: str) -> None:
    async with TaskSystem([Echo], redis_url=redis_url) as system:
        task_id = await Echo({"a": [1, 2.5, None, b"x"]}).schedule()
        result = await system.result(task_id)
        assert result.return_value == {"a": [1, 2.5, None, b"x"]}
        assert not result.is_err
        assert result.execution_time >= 0


async def test_P2_tasks_submitted_before_the_first_worker_are_delivered(redis_url: str) -> None:
    async with TaskSystem([Echo], redis_url=redis_url, workers=0):
        await schedule_many([Echo(number) for number in range(5)])
    async with TaskSystem([Echo], redis_url=redis_url) as system:
        await system.drain()
    assert sorted(SEEN) == [0, 1, 2, 3, 4]


async def test_P3_finished_tasks_leave_nothing_but_their_results(redis_url: str, redis: Redis) -> None:
    async with TaskSystem([Echo], redis_url=redis_url, workers=2, settings={"result_ttl_seconds": None}) as system:
        await schedule_many([Echo(number) for number in range(200)])
        await system.drain()
    assert len(SEEN) == 200
    # The fixture looks for keys and consumers without a time to live; here, that there is nothing else either.
    # The dataset id, the last fencing token, and what the workers reported, do not grow with the number of tasks.
    left = {key for key in await redis.keys("*") if not key.startswith(b"diracx:monitor:")}
    few = (keys.DATASET_ID, keys.FENCE, keys.GROUPS_AUDITED, keys.AUDITOR, keys.RENEWED)
    streams = keys.streams_of(Size.MEDIUM)
    assert left - {key.encode() for key in few} == {stream.encode() for stream in streams}
    assert len(await redis.keys("diracx:monitor:*")) <= 8
    assert await redis.xlen("diracx:tasks:normal:medium") == 0
    [group] = await redis.xinfo_groups("diracx:tasks:normal:medium")
    assert (group["pending"], group["consumers"]) == (0, 0)


async def test_P4_realtime_overtakes_everything_that_has_not_started(redis_url: str) -> None:
    async with TaskSystem([Background, Realtime, Echo], redis_url=redis_url, workers=0):
        await schedule_many([Background(("background", n)) for n in range(50)])
        await schedule_many([Echo(("normal", n)) for n in range(50)])
        await Realtime(("realtime", 0)).schedule()
    async with TaskSystem([Background, Realtime, Echo], redis_url=redis_url, workers=1, concurrency=1) as system:
        await system.drain()
    assert [kind for kind, _ in SEEN] == ["realtime"] + ["normal"] * 50 + ["background"] * 50
    assert [number for _, number in SEEN[1:51]] == list(range(50)), "first come, first served"


async def test_P4_a_worker_reserves_no_more_than_it_can_run(redis_url: str, redis: Redis) -> None:
    gate = asyncio.Event()

    class Waits(BaseTask):
        async def execute(self) -> None:
            SEEN.append(1)
            await gate.wait()

    async with TaskSystem([Waits], redis_url=redis_url, workers=1, concurrency=3) as system:
        await schedule_many([Waits() for _ in range(10)])
        await until(lambda: len(SEEN) >= 3)
        [group] = await redis.xinfo_groups("diracx:tasks:normal:medium")
        assert group["pending"] == 3
        gate.set()
        await system.drain()
    assert len(SEEN) == 10


async def test_P13_an_aware_datetime_survives_the_delayed_set(redis_url: str) -> None:
    moment = datetime(2026, 7, 1, 12, 30, 15, 123456, tzinfo=UTC)
    for scheduler in (False, True):
        async with TaskSystem([Echo], redis_url=redis_url, scheduler=scheduler) as system:
            task_id = await Echo(moment).schedule(at_time=datetime.now(UTC) + timedelta(milliseconds=50))
            assert (await system.result(task_id)).return_value == moment


async def test_delayed_task_does_not_start_early(redis_url: str) -> None:
    due = datetime.now(UTC) + timedelta(seconds=0.3)

    class Now(BaseTask):
        async def execute(self) -> datetime:
            return datetime.now(UTC)

    async with TaskSystem([Now], redis_url=redis_url, scheduler=True) as system:
        result = await system.result(await Now().schedule(at_time=due))
        assert result.return_value >= due


async def test_P5_a_task_of_a_live_worker_is_not_redelivered_however_long_it_runs(redis_url: str) -> None:
    class Long(BaseTask):
        async def execute(self) -> None:
            SEEN.append(1)
            await asyncio.sleep(3.0)  # several leases

    settings = {"lease_seconds": 1.0, "housekeeping_seconds": 0.05}
    async with TaskSystem([Long], redis_url=redis_url, workers=3, settings=settings) as system:
        await schedule_many([Long() for _ in range(12)])
        await system.drain(timeout=20)
    assert len(SEEN) == 12


async def test_P8_tasks_that_cannot_be_executed_become_dead_letters_and_the_worker_continues(
    redis_url: str, redis: Redis
) -> None:
    stream = stream_name_for("normal", "medium")
    async with TaskSystem([Echo], redis_url=redis_url) as system:
        await redis.xadd(stream, {"something": "else"})
        await redis.xadd(stream, {"data": b"\x00garbage"})
        missing = await submit_task(system.broker, "test:Missing", [1])
        await submit_task(system.broker, "test:Echo", [1, 2, 3])
        assert (await system.result(await Echo(7).schedule())).return_value == 7
        await system.drain()
        unknown = await system.result(missing)
        assert unknown.error is not None, "a client that waits for it learns why"
        assert "no task is registered as 'test:Missing'" in unknown.error["message"]
        assert system.task_db is not None
        async with system.task_db as db:
            dead_letters = await db.search()
        assert sorted(dead_letter["reason"] for dead_letter in dead_letters) == [
            "arguments",
            "unknown task",
            "unparsable",
            "unparsable",
        ]
        assert b"\x00garbage" in [dead_letter["message"] for dead_letter in dead_letters]


async def test_dead_letters_wait_in_redis_until_there_is_a_database(redis_url: str, redis: Redis) -> None:
    async with TaskSystem([Broken], redis_url=redis_url, task_db_url=None) as system:
        await system.result(await Broken().schedule())
        await system.drain()
    assert await redis.xlen(keys.DEAD_LETTERS) == 1
    async with TaskSystem([Broken], redis_url=redis_url) as system:
        assert system.task_db is not None
        async with system.task_db as db:
            [dead_letter] = await db.search()
        assert dead_letter["reason"] == "exhausted"
        assert len(dead_letter["attempts"]) == 4
    assert not await redis.exists(keys.DEAD_LETTERS)


async def test_a_result_that_cannot_be_stored_raises_an_error_in_wait(redis_url: str) -> None:
    class Odd(BaseTask):
        async def execute(self) -> object:
            return object()

    async with TaskSystem([Odd], redis_url=redis_url) as system:
        result = await system.result(await Odd().schedule())
        assert result.error is not None
        assert "object" in result.error["message"]


async def test_an_outcome_that_cannot_be_reported_blocks_nothing(redis_url: str) -> None:
    """No value, exception or policy of an author leaves a slot, an entry or a lock behind."""

    class OddPolicy(RetryPolicyBase):
        def schedule_retry(self, attempt: int, exception: Exception) -> Any:
            return "tomorrow"

    class Odd(BaseTask):
        retry_policy = OddPolicy()
        dlq_eligible = True

        @property
        def execution_locks(self) -> list[BaseLock]:
            return [MutexLock(JOB, "odd")]

        async def execute(self) -> None:
            raise ValueError("odd")

    class Endless(BaseTask):
        @property
        def execution_locks(self) -> list[BaseLock]:
            return [MutexLock(JOB, "odd")]

        async def execute(self) -> Any:
            value: list[Any] = []
            value.append(value)
            return value

    class Exits(BaseTask):
        async def execute(self) -> None:
            raise SystemExit(3)

    async with TaskSystem([Odd, Endless, Exits, Echo], redis_url=redis_url, concurrency=2) as system:
        ids = await schedule_many([Odd(), Endless(), Exits(), Odd(), Endless(), Echo(1)])
        results = [await system.result(task_id) for task_id in ids]
        assert [result.is_err for result in results] == [True, True, True, True, True, False]
        await system.drain()


async def test_operator_sets_limits_without_code(redis_url: str) -> None:
    running = most = 0

    class Free(BaseTask):
        async def execute(self) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.01)
            running -= 1

    config = {"common": {"test:Free": {"concurrency_limit": 2}}}
    async with TaskSystem([Free], redis_url=redis_url, config=config) as system:
        await schedule_many([Free() for _ in range(12)])
        await system.drain()
    assert most == 2


async def test_operator_sets_the_priority_without_code(redis_url: str, redis: Redis) -> None:
    config = {"common": {"test:Echo": {"priority": "realtime"}}}
    async with TaskSystem([Echo], redis_url=redis_url, config=config, workers=0):
        await Echo(1).schedule()
    assert await redis.xlen("diracx:tasks:realtime:medium") == 1
    await redis.delete("diracx:tasks:realtime:medium")
