"""Read models on a real server, with and without reporting workers."""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_left
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from diracx.tasks import operations as monitor
from diracx.tasks.operations import DelayReason
from diracx.tasks.operations.cursors import read_head
from diracx.tasks.operations.health import HealthChecks
from diracx.tasks.plumbing import (
    BaseTask,
    ConcurrencyLimiter,
    ExponentialBackoff,
    LockedObjectType,
    MutexLock,
    Priority,
    RateLimiter,
    Size,
    spawn_with_callback,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.inspection import server_time
from diracx.tasks.plumbing.broker.models import TaskMessage, submit_task
from diracx.tasks.plumbing.broker.telemetry import BUCKET_ENDS, end_of_bucket
from diracx.tasks.plumbing.persistence import DeadLetter
from diracx.tasks.plumbing.worker import reporter
from diracx.tasks.testing import TaskSystem
from redis.asyncio import Redis
from support.waiting import until

TASK = LockedObjectType("task")
pytestmark = pytest.mark.leaves_keys("diracx:tasks:*", "diracx:monitor:flow:*", "lock:*")


@pytest.fixture(autouse=True)
def _reports_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "REPORT_SECONDS", 0.02)


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[RedisStreamBroker]:
    made = RedisStreamBroker(redis_url)
    yield made
    await made.shutdown()


class Gate:
    """Holds tasks until it is opened."""

    event: asyncio.Event


@dataclass
class Held(BaseTask):
    name: str
    password: str = ""
    vo: str = "lhcb"
    secret_fields = frozenset({"password"})

    @property
    def execution_locks(self) -> list[Any]:
        return [MutexLock(TASK, self.name)]

    async def execute(self) -> str:
        await Gate.event.wait()
        return self.name


class Two(ConcurrencyLimiter):
    limit = 2


class Five(RateLimiter):
    limit = 5
    window_seconds = 3600.0


@dataclass
class Limited(BaseTask):
    @property
    def execution_locks(self) -> list[Any]:
        return [Two(TASK, "two"), Five(TASK, "five")]

    async def execute(self) -> None:
        await Gate.event.wait()


@dataclass
class Broken(BaseTask):
    password: str
    secret_fields = frozenset({"password"})
    dlq_eligible = True

    async def execute(self) -> None:
        raise ValueError(f"refused {self.password}")


class Flaky(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=600, max_retries=2)

    async def execute(self) -> None:
        raise RuntimeError("not now")


@pytest.fixture(autouse=True)
def _gate() -> None:
    Gate.event = asyncio.Event()


async def test_an_empty_system_shows_nine_idle_queues_and_nothing_else(redis: Redis) -> None:
    seen = await monitor.snapshot(redis)
    assert [queue.name for queue in seen.queues] == [
        f"{priority}:{size}" for priority in Priority for size in Size
    ]
    assert {queue.backlog + queue.running for queue in seen.queues} == {0}
    assert {queue.in_per_second for queue in seen.queues} == {None}
    assert seen.workers == []
    assert seen.delayed == {"at_time": 0, "retry": 0, "lock": 0, "rate": 0}
    assert seen.memory_bytes
    assert not seen.scheduler_leads
    assert json.loads(json.dumps(seen.as_json()))["at"].endswith("+00:00")
    assert await redis.keys("*") == []


async def test_a_backlog_is_counted_and_its_oldest_task_is_known(redis: Redis, broker: RedisStreamBroker) -> None:
    for number in range(5):
        await submit_task(broker, "test:Held", [str(number)])
    await broker.fetch(2)
    queue = next(queue for queue in await monitor.queues(redis) if queue.name == "normal:medium")
    assert (queue.backlog, queue.running) == (3, 2)
    assert queue.oldest_waiting_seconds is not None
    assert 0 <= queue.oldest_waiting_seconds < 60

    page = await monitor.peek(redis, "normal:medium", limit=2)
    assert [task.arguments for task in page.items] == [{"0": "2"}, {"0": "3"}]
    rest = await monitor.peek(redis, "normal:medium", limit=2, after=page.after)
    assert [task.arguments for task in rest.items] == [{"0": "4"}]
    assert rest.after is None


async def test_a_snapshot_takes_as_many_commands_whatever_is_queued(
    redis: Redis, broker: RedisStreamBroker
) -> None:
    async def commands() -> int:
        before = await redis.info("commandstats")
        await monitor.snapshot(redis)
        after = await redis.info("commandstats")
        calls = {name: count["calls"] - before.get(name, {"calls": 0})["calls"] for name, count in after.items()}
        assert not [name for name in ("cmdstat_keys", "cmdstat_scan", "cmdstat_hscan") if calls.get(name)]
        return sum(calls.values())

    await submit_task(broker, "test:Held", ["first"])
    await commands()  # the scripts are known from now on
    few = await commands()
    message = TaskMessage(task_id="0" * 32, task_name="test:Held").dumpb()
    for _ in range(10):
        async with redis.pipeline(transaction=False) as pipe:
            for _ in range(1000):
                pipe.xadd("diracx:tasks:normal:medium", {"data": message})
            await pipe.execute()
    assert await commands() == few


async def test_workers_and_running_tasks_are_shown_with_locks_and_without_secrets(redis_url: str) -> None:
    async with TaskSystem([Held], redis_url=redis_url, workers=1) as system:
        redis = system.broker.redis
        task_id = await Held("one", "sesame").schedule()
        waiting_id = await Held("one", "sesame").schedule()

        async def both() -> Any:
            page, parked = await monitor.running(redis, registry=system.registry), await monitor.delayed(redis)
            return (page.items, parked.items) if page.items and parked.items else None

        [running], [parked] = await until(both)
        assert (running.task_id, running.task_name, running.vo) == (task_id, "test:Held", "lhcb")
        assert running.arguments == {"name": "one", "password": "•••", "vo": "lhcb"}
        assert running.locks == ["lock:mutex:task:one"]
        assert running.attempt == running.deliveries == 1
        assert running.queue == "normal:medium"

        assert (parked.task_id, parked.reason, parked.lock) == (waiting_id, "lock", "lock:mutex:task:one")
        assert parked.arguments == {"0": "one", "1": "•••", "2": "lhcb"}, "the class is not known to this reader"
        assert parked.waiting_since is not None

        [worker] = await monitor.workers(redis)
        assert worker.alive
        assert (worker.size, worker.slots, worker.name) == ("medium", 10, running.worker)
        assert worker.memory_bytes is None or worker.memory_bytes > 1e6

        async def reported() -> Any:
            return [found for found in (await monitor.locks(redis)).items if found.holders[0].task_id]

        [lock] = await until(reported)
        assert (lock.kind, lock.held, lock.waiters) == ("mutex", 1, 1)
        assert lock.holders[0].task_id == task_id
        assert lock.expires is not None
        assert lock == await monitor.lock(redis, lock.key) or lock.expires  # its time to live goes on
        Gate.event.set()
        await system.drain()
        assert await monitor.lock(redis, "lock:mutex:task:one") is None


async def test_limiters_show_quota_and_limit(redis_url: str) -> None:
    async with TaskSystem([Limited], redis_url=redis_url) as system:
        redis = system.broker.redis
        for _ in range(3):
            await Limited().schedule()

        async def limiters() -> Any:
            found = {lock.kind: lock for lock in (await monitor.locks(redis)).items}
            full = found.get("concurrency")
            return found if full is not None and full.waiters == 1 and found["rate"].window_seconds else None

        found = await until(limiters)
        assert (found["concurrency"].held, found["concurrency"].limit) == (2, 2)
        assert (found["rate"].held, found["rate"].limit, found["rate"].window_seconds) == (2, 5, 3600.0)
        Gate.event.set()
        await system.drain()
        released = await monitor.release_lock(redis, "limiter:rate:task:five")
        assert released.released == 3
        assert await monitor.lock(redis, "limiter:rate:task:five") is None


async def test_statistics_and_failures_come_from_reports(redis_url: str) -> None:
    Gate.event.set()
    async with TaskSystem([Held, Broken, Flaky], redis_url=redis_url) as system:
        redis = system.broker.redis
        for number in range(4):
            await Held(str(number)).schedule()
        broken_id = await Broken("sesame").schedule()
        flaky_id = await Flaky().schedule()

        async def counted() -> Any:
            found = {each.task_name: each for each in await monitor.stats(redis)}
            held = found.get("test:Held")
            return found if held and held.done == 4 and len(found) == 3 else None

        found = await until(counted)
        assert (found["test:Broken"].failed, found["test:Broken"].dead, found["test:Broken"].retried) == (1, 1, 0)
        assert (found["test:Flaky"].failed, found["test:Flaky"].dead, found["test:Flaky"].retried) == (1, 0, 1)
        assert found["test:Flaky"].failure_rate == 1.0
        run = found["test:Held"].run
        assert run.count == 4
        assert run.p50_seconds is not None
        assert run.p99_seconds is not None
        assert run.p50_seconds <= run.p99_seconds
        assert found["test:Held"].queue.mean_seconds is not None
        day = {each.task_name: each.done for each in await monitor.stats(redis, "day")}
        assert day == {"test:Held": 4, "test:Broken": 0, "test:Flaky": 0}

        page = await monitor.failures(redis)
        reported = {failure.task_id: failure for failure in page.items}
        assert reported[broken_id].outcome == "dead"
        assert reported[broken_id].message == "refused •••"
        assert "sesame" not in reported[broken_id].traceback
        assert reported[flaky_id].outcome == "retried"
        assert "RuntimeError: not now" in reported[flaky_id].traceback
        assert [each.task_id for each in (await monitor.failures(redis, task_name="test:Flaky")).items] == [
            flaky_id
        ]

        assert (await monitor.snapshot(redis)).delayed["retry"] == 1
        [retry] = (await monitor.delayed(redis, "retry")).items
        assert (retry.failed_attempts, retry.last_error) == (1, "RuntimeError: not now")
        points = await monitor.history(redis)
        assert len(points) == 61
        assert sum(point.done for point in points) == 4
        await system.cancel(flaky_id)
        assert (await monitor.snapshot(redis)).delayed["retry"] == 0


async def test_tasks_that_were_submitted_while_none_ended_are_in_the_history(redis: Redis) -> None:
    """In quiet times, workers note the numbers of the queues every third minute."""
    last = int(await server_time(redis)) // 60 - 1
    for minute, added in ((last - 4, 10), (last - 1, 20), (last, 25)):
        noted = {"at": 60_000 * minute, "diracx:tasks:normal:small added": added}
        await redis.hset(f"{keys.THROUGHPUT_PREFIX}{minute}", mapping=noted)
    points = {int(point.at.timestamp()) // 60 - last: point.submitted for point in await monitor.history(redis)}
    known = {minute: submitted for minute, submitted in points.items() if submitted is not None}
    assert known == {-4: 3, -3: 3, -2: 4, -1: 5}


async def test_a_report_that_is_sent_twice_counts_once(redis: Redis, broker: RedisStreamBroker) -> None:
    from diracx.tasks.plumbing.broker import worker_state

    added = {"stats": {"test:Held": {"done": 1}}}
    for _ in range(2):
        await worker_state.report(redis, "host:1:x", 1, b"", b"", added, False)
    assert [each.done for each in await monitor.stats(redis)] == [1]
    await worker_state.report(redis, "host:1:x", 2, b"", b"", added, True)
    assert [each.done for each in await monitor.stats(redis)] == [2]
    assert await monitor.workers(redis) == []


async def test_a_worker_that_runs_nothing_sends_one_command_per_report(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reporter.RUNNING_REPORTED == 200
    monkeypatch.setattr(reporter, "REPORT_SECONDS", 5.0)
    async with TaskSystem([Held], redis_url=redis_url, workers=1) as system:
        redis = system.broker.redis
        await until(lambda: monitor.workers(redis))
        [worker] = system.running_workers
        calls = (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"]
        await worker.reporter.report()
        assert (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"] - calls <= 3, "others work as well"


async def test_releasing_a_lock_grants_it_to_the_next_waiter_and_names_the_former_holder(redis_url: str) -> None:
    async with TaskSystem([Held], redis_url=redis_url, settings={"lease_seconds": 0.6}) as system:
        redis = system.broker.redis
        first = await Held("one").schedule()
        second = await Held("one").schedule()

        async def reported() -> Any:
            found = await monitor.lock(redis, "lock:mutex:task:one")
            return found if found and found.waiters and found.holders[0].task_id else None

        lock = await until(reported)
        unchanged = await monitor.release_lock(redis, lock.key, owners=["another"])
        assert (unchanged.released, unchanged.hit) == (0, [])
        released = await monitor.release_lock(redis, lock.key, owners=[lock.holders[0].owner])
        assert (released.released, released.hit[0].task_id) == (1, first)
        Gate.event.set()
        assert (await system.result(second, timeout=20)).return_value == "one"
        assert (await system.result(first, timeout=20)).return_value == "one", "it starts again"
    with pytest.raises(ValueError, match="is not the key of a lock"):
        await monitor.lock(Redis.from_url(redis_url), "diracx:tasks:alive")


async def test_purging_a_queue_keeps_running_tasks_and_updates_groups(redis_url: str) -> None:
    async with TaskSystem([Held, Flaky], redis_url=redis_url, workers=1, concurrency=1) as system:
        redis = system.broker.redis
        group = await spawn_with_callback([Held(str(number)) for number in range(4)], Flaky())
        await until(lambda: _running(redis))
        assert await monitor.purge(redis, "normal:medium") == 3
        [status] = await monitor.groups(redis, 10)
        assert (status.group_id, status.failed, status.pending) == (str(getattr(group, "group_id", group)), 3, 1)
        assert await monitor.purge(redis, "normal:medium") == 0
        Gate.event.set()
        await system.drain()
    with pytest.raises(ValueError, match="no queue 'normal'"):
        await monitor.purge(Redis.from_url(redis_url), "normal")


async def _running(redis: Redis) -> list[Any]:
    return (await monitor.running(redis)).items


@pytest.mark.parametrize("reason", ["at_time", None])
async def test_pages_of_delayed_tasks_have_each_of_them_once_however_many_are_due_at_one_moment(
    redis: Redis, reason: DelayReason | None
) -> None:
    """A task is parked behind thousands. After each page, its last task and the next one are no longer delayed."""
    ids, due = [f"{number:032x}" for number in range(2_500)], time.time() * 1000 + 3_600_000
    message = TaskMessage(task_id="0" * 32, task_name="test:Held").dumpb()
    stored = dict.fromkeys(ids, b"diracx:tasks:normal:medium at_time 0\n" + message)
    stored["parked"] = b"diracx:tasks:normal:medium lock 0 1 lock:mutex:task:one\n" + message
    await redis.zadd(keys.DELAYED, dict.fromkeys(ids, due) | {"parked": due + 1})
    await redis.hset(keys.DELAYED_DATA, mapping=stored)
    await redis.hset(keys.DELAYED_REASONS, mapping={"at_time": len(ids), "lock": 1})
    [parked] = (await monitor.delayed(redis, "lock")).items
    assert (parked.task_id, parked.lock) == ("parked", "lock:mutex:task:one")
    assert (await monitor.delayed(redis, "retry")).items == []

    found: list[str] = []
    page = await monitor.delayed(redis, reason, 600)
    while page.after is not None:
        found += [task.task_id for task in page.items]
        assert len(found) <= len(ids)
        await redis.zrem(keys.DELAYED, found[-1], ids.pop(len(found)))
        page = await monitor.delayed(redis, reason, 600, page.after)
    found += [task.task_id for task in page.items]
    assert found == ids + ["parked"] * (reason is None)


async def test_lists_read_little_of_large_messages_and_show_their_size_instead(
    redis: Redis, broker: RedisStreamBroker
) -> None:
    """Measures the traffic of the server: 60 rows of 1 MB each, and some small ones."""
    large = "x" * 1_000_000
    for number in range(20):
        await submit_task(broker, "test:Held", [large])
        await submit_task(broker, "test:Held", [large], run_at=datetime.now(UTC) + timedelta(hours=1))
        message = TaskMessage(task_id=f"dead-{number}", task_name="test:Held", task_args=[large])
        await redis.xadd(keys.DEAD_LETTERS, DeadLetter.of_message(message, "exhausted", "no", "here").to_stored())
    await submit_task(broker, "test:Held", ["small"])

    async def sent() -> int:
        return int((await redis.info("stats"))["total_net_output_bytes"])

    before = await sent()
    queued = (await monitor.peek(redis, "normal:medium")).items
    delayed = (await monitor.delayed(redis)).items
    dead_letters = (await monitor.waiting_dead_letters(redis)).items
    assert await sent() - before < 61 * 70_000
    assert [task.arguments for task in queued] == [None] * 20 + [{"0": "small"}]
    assert {(task.attempt, task.message_bytes > 1_000_000) for task in queued[:20]} == {(1, True)}
    assert {(task.task_name, task.arguments, task.message_bytes > 1_000_000) for task in delayed} == {
        ("test:Held", None, True)
    }
    assert {(each.task_name, each.reason, each.arguments) for each in dead_letters} == {
        ("test:Held", "exhausted", None)
    }
    assert all(each.task_id and each.message_bytes > 1_000_000 for each in dead_letters)
    before = await sent()
    assert await monitor.purge(redis, "normal:medium") == 21
    assert await sent() - before < 22 * 70_000


async def test_a_name_of_a_megabyte_makes_no_list_long(redis: Redis, redis_url: str) -> None:
    async with TaskSystem([Held], redis_url=redis_url, workers=1) as system:
        await submit_task(system.broker, "x" * 1_000_000, task_id="t")

        async def reported() -> bool:
            return bool((await monitor.failures(redis)).items)

        await until(reported)
        [failure] = (await monitor.failures(redis)).items
        assert len(repr(failure)) < 5_000
        health = await HealthChecks(redis).run()
    assert any(alert.check == "messages_rejected" for alert in health.alerts)
    assert len(repr(health.alerts)) < 5_000


@pytest.mark.parametrize("cut", range(0, 70_000, 997))
def test_of_a_message_that_is_cut_off_no_secret_argument_is_shown(cut: int) -> None:
    labels = {"secret": [0], "attempts": [{"type": "E", "traceback": "t" * 20_000}] * 2}
    message = TaskMessage(
        task_id="one",
        task_name="test:Broken",
        labels=labels,
        task_args=["sesame", "x" * 20_000],
        task_kwargs={"a": 1},
    )
    data = message.dumpb()
    head = read_head(data[:cut], len(data))
    assert "sesame" not in repr(head.arguments(None))
    if head.message is not None and not head.whole:
        assert (head.arguments(None), head.message.task_id) == (None, "one")
        assert head.failed_attempts in (None, 2)


async def test_an_entry_that_is_no_task_can_be_inspected_and_purged(redis: Redis) -> None:
    await redis.xadd("diracx:tasks:normal:small", {"data": b"\xff rubbish"})
    await redis.xadd("diracx:tasks:normal:small", {"other": b"rubbish"})
    page = await monitor.peek(redis, "normal:small")
    assert [(task.task_id, task.arguments) for task in page.items] == [("", None), ("", None)]
    assert await monitor.purge(redis, "normal:small") == 2


async def test_a_secret_is_in_no_field_of_a_dead_letter_except_its_message(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    from diracx.tasks.operations.dead_letters import dead_letter_record

    async with TaskSystem([Broken], redis_url=redis_url) as system:
        await Broken("sesame").schedule()
        await system.drain()
        assert system.task_db is not None
        async with system.task_db as db:
            [dead_letter] = await db.search()
    shown = dead_letter_record(dead_letter)
    assert shown["message"]["task_args"] == ["•••"]
    assert shown["detail"] == "refused •••"
    assert "sesame" not in json.dumps(shown, default=str)
    assert shown["raw"] is None
    assert "refused •••" in caplog.text
    assert "sesame" not in caplog.text


def test_the_error_of_a_histogram_is_below_a_fifth() -> None:
    for seconds in (0.0001, 0.001, 0.0011, 0.5, 1.0, 59.9, 86400.0):
        end = end_of_bucket(bisect_left(BUCKET_ENDS, seconds))
        assert seconds <= end * 1.000001
        assert end <= max(0.001, seconds * 1.19)


def test_every_key_of_the_monitor_has_a_name_of_its_own() -> None:
    names = [keys.REPORTING, keys.REPORT_PREFIX, keys.MINUTE_PREFIX, keys.HOUR_PREFIX, keys.THROUGHPUT_PREFIX]
    assert all(name.startswith("diracx:monitor:") for name in names)
