"""A task from its submission to its end: real server, real workers in this process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, ClassVar

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    CallbackSpawner,
    ConcurrencyLimiter,
    ExponentialBackoff,
    LockedObjectType,
    MutexLock,
    Priority,
    RateLimiter,
    RetryPolicyBase,
    SendTaskError,
    SharedRWLock,
    Size,
    StopRetryingError,
    TaskRetryRequestedError,
    TimeLimitExceededError,
    UnretryableError,
    schedule_many,
    spawn_with_callback,
    task_broker,
)
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.models import TaskMessage, submit_task
from diracx.tasks.plumbing.broker.redis_streams import RedisStreamBroker, stream_name_for
from diracx.tasks.plumbing.lock_registry import JOB, TASK
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem
from redis import Redis as SyncRedis
from redis.asyncio import Redis

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")

SEEN: list[Any] = []


@pytest.fixture(autouse=True)
def _forget() -> None:
    SEEN.clear()


@dataclass
class Echo(BaseTask):
    value: Any = None

    async def execute(self) -> Any:
        SEEN.append(self.value)
        return self.value


@dataclass
class Urgent(Echo):
    priority = Priority.REALTIME
    size = Size.SMALL


@dataclass
class Realtime(Echo):
    priority = Priority.REALTIME


@dataclass
class Background(Echo):
    priority = Priority.BACKGROUND


class Broken(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=0.02, max_retries=3)
    dlq_eligible = True

    async def execute(self) -> None:
        SEEN.append(datetime.now(UTC))
        raise ValueError("there is no such site")


async def test_result_carries_the_value_under_the_id_of_the_submission(redis_url: str) -> None:
    async with TaskSystem([Echo], redis_url=redis_url) as system:
        task_id = await Echo({"a": [1, 2.5, None, b"x"]}).schedule()
        result = await system.result(task_id)
        assert result.return_value == {"a": [1, 2.5, None, b"x"]}
        assert not result.is_err
        assert result.execution_time >= 0


async def test_P1_tasks_and_callbacks_go_to_the_queue_of_their_class(redis_url: str, redis: Redis) -> None:
    async with TaskSystem([Urgent, Background], redis_url=redis_url, workers=0):
        await Urgent(1).schedule()
        await Background(1).schedule()
        await schedule_many([Background(2), Urgent(2)])
        await Urgent(3).schedule(at_time=datetime.now(UTC) - timedelta(seconds=1))
        await spawn_with_callback([], Urgent(4))
    async with TaskSystem([Echo], redis_url=redis_url, workers=0) as system:
        await system.broker.promote()
    assert await redis.xlen("diracx:tasks:realtime:small") == 4
    assert await redis.xlen("diracx:tasks:background:medium") == 2
    await redis.delete("diracx:tasks:realtime:small", "diracx:tasks:background:medium")


async def test_P2_what_was_submitted_before_any_worker_is_delivered(redis_url: str) -> None:
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
    few = (keys.EPOCH, keys.FENCE, keys.GROUPS_AUDITED, keys.AUDITOR, keys.RENEWED)
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
        while len(SEEN) < 3:
            await asyncio.sleep(0.005)
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


# --- failures, retries, dead letters ---------------------------------------------------------------------


async def test_P31_the_first_delay_is_the_base_and_there_are_max_retries_retries(redis_url: str) -> None:
    async with TaskSystem([Broken], redis_url=redis_url, scheduler=True) as system:
        result = await system.result(await Broken().schedule())
        assert result.is_err
        assert result.error is not None
        assert result.error["type"] == "ValueError"
        gaps = [later - earlier for earlier, later in pairwise(SEEN)]
        assert len(SEEN) == 4, "once, and three retries"
        for gap, delay in zip(gaps, (0.02, 0.04, 0.08), strict=True):
            assert gap.total_seconds() >= delay
        assert system.task_db is not None
        async with system.task_db as db:
            [dead_letter] = await db.search()
        assert dead_letter["task_name"] == "test:Broken"
        assert dead_letter["reason"] == "exhausted"
        assert [attempt["message"] for attempt in dead_letter["attempts"]] == ["there is no such site"] * 4
        assert "execute" in dead_letter["attempts"][0]["traceback"]
        assert TaskMessage.loadb(dead_letter["message"]).task_name == "test:Broken"


@pytest.mark.parametrize("error", [UnretryableError("never"), StopRetryingError("enough")])
async def test_P30_stop_retrying_ends_retries_at_once(redis_url: str, error: Exception) -> None:
    class Stops(BaseTask):
        retry_policy = ExponentialBackoff(base_delay_seconds=0.01, max_retries=5)

        async def execute(self) -> None:
            SEEN.append(1)
            raise error

    async with TaskSystem([Stops], redis_url=redis_url) as system:
        result = await system.result(await Stops().schedule())
        assert result.error is not None
        assert result.error["type"] == type(error).__name__
        await system.drain()
        assert SEEN == [1]
        assert system.task_db is not None
        async with system.task_db as db:
            assert await db.search() == [], "not dlq_eligible: dropped"


async def test_P30_a_requested_retry_happens_whatever_the_policy_says(redis_url: str) -> None:
    class Again(BaseTask):
        async def execute(self) -> int:
            SEEN.append(1)
            if len(SEEN) == 1:
                raise TaskRetryRequestedError("not yet")
            return len(SEEN)

    async with TaskSystem([Again], redis_url=redis_url, scheduler=True) as system:
        assert (await system.result(await Again().schedule())).return_value == 2


async def test_P14_a_retried_task_keeps_its_id_and_its_result_is_found_under_it(redis_url: str) -> None:
    class Second(BaseTask):
        retry_policy = ExponentialBackoff(base_delay_seconds=0.02, max_retries=1)

        async def execute(self) -> str:
            SEEN.append(1)
            if len(SEEN) == 1:
                raise ValueError("not yet")
            return "at last"

    async with TaskSystem([Second], redis_url=redis_url) as system:
        assert (await system.result(await Second().schedule())).return_value == "at last"


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


async def test_time_limit_cancels_the_execution_and_counts_as_a_failure(redis_url: str) -> None:
    class Endless(BaseTask):
        time_limit_seconds = 0.05

        async def execute(self) -> None:
            await asyncio.Event().wait()

    async with TaskSystem([Endless], redis_url=redis_url) as system:
        result = await system.result(await Endless().schedule())
        assert result.error is not None
        assert result.error["type"] == TimeLimitExceededError.__name__
        assert "0.05 s" in result.error["message"]


async def test_a_task_that_swallows_its_time_limit_has_not_succeeded(redis_url: str) -> None:
    class Stubborn(BaseTask):
        time_limit_seconds = 0.05

        async def execute(self) -> str:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return "fine"
            return "never"

    async with TaskSystem([Stubborn], redis_url=redis_url) as system:
        result = await system.result(await Stubborn().schedule())
        assert result.error is not None
        assert result.error["type"] == TimeLimitExceededError.__name__


async def test_a_task_that_ignores_its_time_limit_is_reported_once(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    enough = asyncio.Event()

    class Stubborn(BaseTask):
        time_limit_seconds = 0.05

        async def execute(self) -> None:
            while not enough.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await enough.wait()

    settings = {"report_overdue_seconds": 0.1}
    async with TaskSystem([Stubborn, Echo], redis_url=redis_url, settings=settings) as system:
        task_id = await Stubborn().schedule()

        def reports() -> list[str]:
            return [line for line in caplog.messages if "ignores its cancellation" in line]

        async with asyncio.timeout(20):
            while not reports():
                await asyncio.sleep(0.01)
        for _ in range(5):  # the watchdog looks again meanwhile
            await system.result(await Echo().schedule(at_time=datetime.now(UTC) + timedelta(seconds=0.05)))
        enough.set()
        result = await system.result(task_id)
        assert result.error is not None
        assert result.error["type"] == TimeLimitExceededError.__name__
        [line] = reports()
        assert task_id in line
        assert "0.1 s" in line


async def test_a_cancellation_that_a_library_swallowed_comes_again(redis_url: str) -> None:
    """As `asyncio.wait_for` of Python 3.11 does when what it waits for ends at the same moment."""

    class Swallows(BaseTask):
        time_limit_seconds = 0.05

        async def execute(self) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await asyncio.Event().wait()

    async with TaskSystem([Swallows], redis_url=redis_url, settings={"report_overdue_seconds": 0.1}) as system:
        result = await system.result(await Swallows().schedule())
        assert result.error is not None
        assert result.error["type"] == TimeLimitExceededError.__name__


async def test_P8_tasks_that_cannot_be_executed_become_dead_letters_and_the_worker_continues(
    redis_url: str, redis: Redis
) -> None:
    stream = stream_name_for("normal", "medium")
    async with TaskSystem([Echo], redis_url=redis_url) as system:
        await redis.xadd(stream, {"something": "else"})
        await redis.xadd(stream, {"data": b"\x00garbage"})
        nobody = await submit_task(system.broker, "test:Nobody", [1])
        await submit_task(system.broker, "test:Echo", [1, 2, 3])
        assert (await system.result(await Echo(7).schedule())).return_value == 7
        await system.drain()
        unknown = await system.result(nobody)
        assert unknown.error is not None, "a client that waits for it learns why"
        assert "no task is registered as 'test:Nobody'" in unknown.error["message"]
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


async def test_value_that_cannot_be_stored_is_an_error_to_whoever_waits(redis_url: str) -> None:
    class Odd(BaseTask):
        async def execute(self) -> object:
            return object()

    async with TaskSystem([Odd], redis_url=redis_url) as system:
        result = await system.result(await Odd().schedule())
        assert result.error is not None
        assert "object" in result.error["message"]


@pytest.mark.parametrize(
    "labels", [{"result_ttl_seconds": 0}, {"result_ttl_seconds": "60"}, {"attempts": 3}, {"group_id": 7}]
)
async def test_labels_that_mean_something_are_checked_when_submitted(
    redis_url: str, labels: dict[str, Any]
) -> None:
    async with TaskSystem([Echo], redis_url=redis_url, workers=0):
        with pytest.raises(ValueError, match=f"the label {next(iter(labels))}"):
            await Echo(1).schedule(labels=labels)


async def test_an_outcome_that_cannot_be_reported_blocks_nothing(redis_url: str) -> None:
    """Whatever an author returns, raises or answers as a policy: the slot, the entry and the locks come back."""

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


async def test_P24_a_task_that_swallows_its_cancellation_has_not_succeeded(redis_url: str, redis: Redis) -> None:
    class Stubborn(BaseTask):
        @property
        def execution_locks(self) -> list[BaseLock]:
            return [MutexLock(JOB, "stubborn", ttl_ms=300)]

        async def execute(self) -> str:
            SEEN.append(1)
            if len(SEEN) == 2:
                return "the second time"
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return "the first time"

    async with TaskSystem([Stubborn], redis_url=redis_url) as system:
        task_id = await Stubborn().schedule()
        while not SEEN:
            await asyncio.sleep(0.005)
        await redis.set("lock:mutex:job:stubborn", "another", px=1_000)
        assert (await system.result(task_id)).return_value == "the second time"


# --- locks -----------------------------------------------------------------------------------------------


@dataclass
class Alone(BaseTask):
    number: int

    inside: ClassVar[int] = 0
    most: ClassVar[int] = 0

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "alone")]

    async def execute(self) -> None:
        Alone.inside += 1
        Alone.most = max(Alone.most, Alone.inside)
        await asyncio.sleep(0)
        SEEN.append(self.number)
        Alone.inside -= 1


@pytest.mark.parametrize("workers", [1, 2])
async def test_P25_waiters_of_a_lock_are_served_in_the_order_they_came(redis_url: str, workers: int) -> None:
    Alone.most = 0
    async with TaskSystem([Alone], redis_url=redis_url, workers=workers) as system:
        await schedule_many([Alone(number) for number in range(40)])
        await system.drain()
    assert Alone.most == 1
    assert len(SEEN) == 40
    # The first that a second worker fetched may be faster than the first of the first; there is no line yet.
    early = [number for position, number in enumerate(SEEN) if number > position]
    assert len(early) <= workers - 1, SEEN
    assert sorted(set(SEEN) - set(early)) == [number for number in SEEN if number not in early]


async def test_P25_200_tasks_of_one_mutex_take_at_most_three_times_as_long_as_one_after_another(
    redis_url: str,
) -> None:
    @dataclass
    class Held(BaseTask):
        number: int

        @property
        def execution_locks(self) -> list[BaseLock]:
            return [MutexLock(JOB, "held")]

        async def execute(self) -> None:
            await asyncio.sleep(0.005)

    tasks = [Held(number) for number in range(200)]
    ratios = []
    async with TaskSystem([Held], redis_url=redis_url, concurrency=50) as system:
        for _ in range(3):  # the machine may turn to something else during one of the two
            begun = time.monotonic()
            await schedule_many(tasks)
            await system.drain(60)
            drained = time.monotonic() - begun
            begun = time.monotonic()
            for task in tasks:
                [lock] = task.execution_locks
                await lock.acquire(system.broker.redis)
                await task.execute()
                await lock.release(system.broker.redis)
            ratios.append(drained / (time.monotonic() - begun))
            if ratios[-1] <= 3:
                break
    assert min(ratios) <= 3


async def test_P23_refused_lock_spends_no_quota(redis_url: str, redis: Redis) -> None:
    class Limited(RateLimiter):
        limit = 5
        window_seconds = 600.0

    class Both(BaseTask):
        @property
        def execution_locks(self) -> list[BaseLock]:
            return [Limited(JOB, "quota"), MutexLock(JOB, "held")]

        async def execute(self) -> None:
            SEEN.append(1)

    held = MutexLock(JOB, "held")
    assert await held.acquire(redis)
    async with TaskSystem([Both], redis_url=redis_url) as system:
        await Both().schedule()
        while not await redis.exists(keys.DELAYED):
            await asyncio.sleep(0.005)
        assert not await redis.exists("limiter:rate:job:quota")
        await held.release(redis)
        await system.drain()
    assert SEEN == [1]
    assert await redis.zcard("limiter:rate:job:quota") == 1


async def test_P24_an_execution_that_loses_its_lock_is_cancelled_and_started_again_whatever_its_policy(
    redis_url: str, redis: Redis
) -> None:
    class Holder(BaseTask):
        @property
        def execution_locks(self) -> list[BaseLock]:
            return [MutexLock(JOB, "lost", ttl_ms=300)]

        async def execute(self) -> None:
            SEEN.append(1)
            if len(SEEN) == 1:
                await asyncio.Event().wait()

    async with TaskSystem([Holder], redis_url=redis_url) as system:
        task_id = await Holder().schedule()
        while not SEEN:
            await asyncio.sleep(0.005)
        await redis.set("lock:mutex:job:lost", "another", px=1_000)
        while not await redis.exists(keys.DELAYED):
            await asyncio.sleep(0.005)
        assert SEEN == [1], "it waits for its turn, as anybody does"
        assert not (await system.result(task_id)).is_err
        assert SEEN == [1, 1]


async def test_a_task_that_is_interrupted_each_time_ends_as_a_dead_letter(redis_url: str, redis: Redis) -> None:
    class Unlucky(BaseTask):
        vo = "lhcb"

        @property
        def execution_locks(self) -> list[BaseLock]:
            return [MutexLock(JOB, "unlucky", ttl_ms=300)]

        async def execute(self) -> None:
            with SyncRedis.from_url(redis_url) as client:  # at once: a client of asyncio may swallow what comes
                client.set("lock:mutex:job:unlucky", "another", px=100)
            await asyncio.Event().wait()

    async with TaskSystem([Unlucky], redis_url=redis_url) as system:
        result = await system.result(await Unlucky().schedule())
        assert result.error is not None
        assert result.error["type"] == "LockLostError"
        await system.drain()
        assert system.task_db is not None
        async with system.task_db as db:
            [dead_letter] = await db.search()
    assert (dead_letter["reason"], dead_letter["vo"]) == ("interrupted", "lhcb")
    assert [attempt["interrupted"] for attempt in dead_letter["attempts"]] == [True, True, True]


async def test_a_task_that_must_not_begin_twice_fails_when_it_is_interrupted(redis_url: str, redis: Redis) -> None:
    class Once(BaseTask):
        at_most_once = True
        retry_policy = ExponentialBackoff(base_delay_seconds=1, max_retries=3)

        @property
        def execution_locks(self) -> list[BaseLock]:
            return [MutexLock(JOB, "once", ttl_ms=300)]

        async def execute(self) -> None:
            SEEN.append(1)
            await asyncio.Event().wait()

    async with TaskSystem([Once], redis_url=redis_url) as system:
        task_id = await Once().schedule()
        while not SEEN:
            await asyncio.sleep(0.005)
        await redis.set("lock:mutex:job:once", "another", px=100)
        result = await system.result(task_id)
        assert result.error is not None
        assert result.error["type"] == "LockLostError"
        assert "lock:mutex:job:once" in result.error["message"]
        await system.drain()
    assert SEEN == [1]


async def test_a_task_that_must_not_begin_twice_fails_when_its_worker_was_lost(
    redis_url: str, redis: Redis
) -> None:
    class Once(BaseTask):
        at_most_once = True
        dlq_eligible = True
        vo = "lhcb"

        async def execute(self) -> None:
            SEEN.append(1)

    async with TaskSystem([Once], redis_url=redis_url) as system:
        message = TaskMessage(task_id="once", task_name="test:Once")
        await redis.xadd("diracx:tasks:normal:medium", {"data": message.dumpb(), "deaths": "1"})
        result = await system.result("once")
        assert result.error is not None
        assert result.error["type"] == "WorkerStoppedError"
        await system.drain()
        assert system.task_db is not None
        async with system.task_db as db:
            [dead_letter] = await db.search()
    assert (dead_letter["reason"], dead_letter["vo"], SEEN) == ("exhausted", "lhcb", [])


async def test_a_held_lock_outlives_its_ttl_while_the_task_runs(redis_url: str, redis: Redis) -> None:
    gate = asyncio.Event()
    kept = MutexLock(JOB, "kept", ttl_ms=1500)

    class Holder(BaseTask):
        @property
        def execution_locks(self) -> list[BaseLock]:
            return [kept, SharedRWLock(JOB, "read")]

        async def execute(self) -> str:
            SEEN.append(1)
            await gate.wait()
            return "done"

    async with TaskSystem([Holder], redis_url=redis_url) as system:
        task_id = await Holder().schedule()
        while not SEEN:
            await asyncio.sleep(0.005)
        renewed, left = 0, 1500
        while renewed < 4:  # a third of its time to live passes before each
            before, left = left, await redis.pttl(kept.redis_key)
            renewed += left > before
            await asyncio.sleep(0.005)
        assert not await MutexLock(JOB, "kept").acquire(redis)
        gate.set()
        assert (await system.result(task_id)).return_value == "done"
        await system.drain()
        assert not await redis.exists("lock:rw:job:read")


async def test_P26_a_task_that_could_never_be_granted_is_refused_when_submitted(
    redis_url: str, redis: Redis
) -> None:
    class Small(RateLimiter):
        limit = 2
        window_seconds = 1.0

    class Greedy(BaseTask):
        @property
        def execution_locks(self) -> list[BaseLock]:
            return [Small(JOB, 1, n_items=3)]

        async def execute(self) -> None: ...

    async with TaskSystem([Greedy], redis_url=redis_url, workers=0):
        with pytest.raises(ValueError, match=r"n_items=3 .* limit is 2"):
            await Greedy().schedule()
    assert await redis.keys("diracx:tasks:*:*") == []


async def test_a_refused_rate_limit_makes_the_task_wait_until_quota_returns(redis_url: str) -> None:
    class Slow(RateLimiter):
        limit = 2
        window_seconds = 0.3

    @dataclass
    class Limited(BaseTask):
        number: int

        @property
        def execution_locks(self) -> list[BaseLock]:
            return [Slow(JOB, "slow")]

        async def execute(self) -> None:
            SEEN.append((asyncio.get_running_loop().time(), self.number))

    async with TaskSystem([Limited], redis_url=redis_url, workers=1) as system:
        await schedule_many([Limited(number) for number in range(8)])
        await system.drain()
    assert [number for _, number in SEEN] == list(range(8)), "first come, first served"
    started = [at for at, _ in SEEN]
    assert all(third - first > 0.25 for first, third in zip(started, started[2:], strict=False))
    assert started[-1] - started[0] < 1.5, "three windows, and not a whole one more for each refusal"


async def test_a_task_granted_in_vain_passes_the_lock_on(redis_url: str, redis: Redis) -> None:
    """It was granted one of its locks and refused another; the next in line for the first must not wait longer."""

    class One(ConcurrencyLimiter):
        limit = 1

    @dataclass
    class Needs(BaseTask):
        name: str
        mutexes: list[str]
        slot: bool

        @property
        def execution_locks(self) -> list[BaseLock]:
            limiters: list[BaseLock] = [One(JOB, "slot")] if self.slot else []
            return [*limiters, *(MutexLock(JOB, mutex) for mutex in self.mutexes)]

        async def execute(self) -> None:
            SEEN.append(self.name)

    async def parked(number: int) -> None:
        while await redis.zcard(keys.DELAYED) < number:
            await asyncio.sleep(0.005)

    holders = {name: MutexLock(JOB, name) for name in ("a", "b")}
    slot = One(JOB, "slot")
    for lock in (*holders.values(), slot):
        assert await lock.acquire(redis)
    settings = {"lock_retry_seconds": 60.0}
    async with TaskSystem([Needs], redis_url=redis_url, settings=settings) as system:
        await Needs("first", ["b"], True).schedule()
        await parked(1)
        await Needs("second", [], True).schedule()
        await parked(2)
        await Needs("third", ["a", "b"], False).schedule()
        await parked(3)
        await Needs("fourth", ["a"], False).schedule()
        await parked(4)
        await slot.release(redis)  # wakes the first, which is refused by b
        await holders["a"].release(redis)  # wakes the third, which is refused by b
        while not {"second", "fourth"} <= set(SEEN):
            await asyncio.sleep(0.005)
        assert set(SEEN) == {"second", "fourth"}
        await holders["b"].release(redis)
        await system.drain()
    assert sorted(SEEN) == ["first", "fourth", "second", "third"]


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


# --- groups ----------------------------------------------------------------------------------------------


async def test_callback_runs_once_after_all_children(redis_url: str) -> None:
    async with TaskSystem([Echo, Urgent], redis_url=redis_url) as system:
        await spawn_with_callback([Echo(number) for number in range(20)], Urgent("callback"))
        await system.drain()
    assert SEEN[-1] == "callback"
    assert len(SEEN) == 21


async def test_callback_spawner_is_injected_into_tasks(redis_url: str) -> None:
    class Parent(BaseTask):
        async def execute(self, spawn: CallbackSpawner) -> str:
            return await spawn([Echo("child")], Echo("callback"))

    async with TaskSystem([Parent, Echo], redis_url=redis_url) as system:
        result = await system.result(await Parent().schedule())
        assert not result.is_err, result.error
        await system.drain()
    assert SEEN == ["child", "callback"]


async def test_P33_a_failed_child_fires_on_failure_instead(redis_url: str) -> None:
    class Fails(BaseTask):
        async def execute(self) -> None:
            raise ValueError

    async with TaskSystem([Echo, Fails], redis_url=redis_url) as system:
        await spawn_with_callback([Echo(1), Fails()], Echo("callback"), on_failure=Echo("failure"))
        await system.drain()
    assert sorted(map(str, SEEN)) == ["1", "failure"]


# --- binding and registry --------------------------------------------------------------------------------


async def test_schedule_without_a_broker_says_how_to_bind_one() -> None:
    with pytest.raises(RuntimeError, match="task_broker"):
        await Echo(1).schedule()


async def test_plain_code_submits_through_task_broker(redis_url: str) -> None:
    async with task_broker(redis_url, {"test:Echo": Echo}):
        await Echo("from outside").schedule()
    async with TaskSystem([Echo], redis_url=redis_url) as system:
        await system.drain()
    assert SEEN == ["from outside"]


async def test_a_task_can_spawn_tasks(redis_url: str) -> None:
    class Parent(BaseTask):
        async def execute(self) -> str:
            return await Echo("child").schedule()

    async with TaskSystem([Parent, Echo], redis_url=redis_url) as system:
        child = (await system.result(await Parent().schedule())).return_value
        assert (await system.result(child)).return_value == "child"


async def test_an_unregistered_task_is_refused_with_the_way_out(redis_url: str) -> None:
    async with TaskSystem([Echo], redis_url=redis_url, workers=0):
        with pytest.raises(SendTaskError, match=r"Background is not a registered task: .*--module"):
            await Background(1).schedule()


async def test_an_unreachable_broker_is_a_send_task_error() -> None:
    broker = RedisStreamBroker("redis://127.0.0.1:1")
    with pytest.raises(SendTaskError, match="cannot submit test:Echo"):
        await submit_task(broker, "test:Echo")
    await broker.shutdown()


async def test_P28_two_categories_with_one_class_name_are_reported_with_both_origins() -> None:
    from diracx.tasks.plumbing.registry import TaskRegistry

    other = type("Echo", (Echo,), {"__module__": "elsewhere"})
    [line] = TaskRegistry({"a:Echo": Echo, "b:Echo": other, "b:Urgent": Urgent}).ambiguous_names()
    assert "a:Echo" in line
    assert "b:Echo (elsewhere)" in line
    assert TaskRegistry({"a:Echo": Echo, "b:Urgent": Urgent}).ambiguous_names() == []


def test_lock_object_types_are_strings() -> None:
    assert TASK == "task"
    assert LockedObjectType("job") == JOB
