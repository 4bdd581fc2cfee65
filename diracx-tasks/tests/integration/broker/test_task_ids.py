"""Unique task ids: a duplicate id never replaces a task."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from diracx.tasks.plumbing import BaseTask, ExponentialBackoff, MutexLock, SendTaskError
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.keys import stream_name_for
from diracx.tasks.plumbing.broker.models import Submission, TaskMessage, submit_task
from diracx.tasks.plumbing.exceptions import DuplicateTaskIdError
from diracx.tasks.plumbing.lock_registry import TASK
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.testing import TaskSystem
from support.waiting import until

STREAM = stream_name_for("normal", "medium")
LATER = datetime.now(UTC) + timedelta(hours=1)
_ran: list[str] = []
_first_runs = asyncio.Event()
_go_on = asyncio.Event()


@dataclass
class Note(BaseTask):
    text: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(TASK, "note")]

    async def execute(self) -> None:
        _first_runs.set()
        await _go_on.wait()
        _ran.append(self.text)


@dataclass
class Flaky(BaseTask):
    text: str
    retry_policy = ExponentialBackoff(base_delay_seconds=3, max_retries=1)

    async def execute(self) -> None:
        if self.text not in _ran:
            _ran.append(self.text)
            raise RuntimeError("the first attempt")
        _ran.append(f"{self.text} again")


def submission(text: str, task_id: str = "one", at_time: datetime | None = LATER) -> Submission:
    return Submission(TaskMessage(task_id=task_id, task_name="test:Note", task_args=[text]), STREAM, at_time)


async def waiting(broker: RedisStreamBroker) -> list[bytes]:
    stored: Any = await broker.redis.hvals(keys.DELAYED_DATA)
    return sorted(stored)


@pytest.mark.leaves_keys("diracx:tasks:*")
async def test_another_task_with_the_id_of_one_that_waits_is_refused(redis_url: str) -> None:
    broker = RedisStreamBroker(redis_url)
    await submit_task(broker, "test:Note", ["first"], task_id="one", run_at=LATER)
    before = await waiting(broker)
    assert len(before) == 1
    with pytest.raises(DuplicateTaskIdError, match="'one' belongs to a task that waits"):
        await submit_task(broker, "test:Note", ["second"], task_id="one", run_at=LATER)
    with pytest.raises(SendTaskError, match="'one'"):
        await submit_task(broker, "test:Note", ["first"], task_id="one", run_at=LATER + timedelta(hours=1))
    with pytest.raises(DuplicateTaskIdError):
        await broker.submit([submission("other", "two"), submission("second")])
    assert await waiting(broker) == before, "nothing of it was put aside"
    await broker.shutdown()


@pytest.mark.leaves_keys("diracx:tasks:*")
async def test_the_same_submission_may_be_sent_once_more(redis_url: str) -> None:
    broker = RedisStreamBroker(redis_url)
    for _ in range(2):
        await broker.submit([submission("first")])
    assert len(await waiting(broker)) == 1
    assert await broker.redis.hgetall(keys.DELAYED_REASONS) == {b"at_time": b"1"}
    await broker.shutdown()


async def test_two_tasks_of_one_call_may_not_have_one_id(redis_url: str) -> None:
    broker = RedisStreamBroker(redis_url)
    twice = [submission("first"), submission("second")]
    with pytest.raises(DuplicateTaskIdError, match="two tasks have the id 'one'"):
        await broker.submit(twice)
    with pytest.raises(DuplicateTaskIdError):
        await broker.submit([submission("first", at_time=None), submission("second", at_time=None)])
    with pytest.raises(DuplicateTaskIdError):
        await broker.submit_group("group", twice, {"total": 2}, 60)
    assert not await broker.redis.keys("diracx:tasks:*")
    await broker.shutdown()


@pytest.mark.parametrize("task_class", [Note, Flaky], ids=["behind a lock", "for a retry"])
@pytest.mark.leaves_keys("diracx:tasks:*")
async def test_tasks_that_were_given_one_id_all_run_though_they_wait_at_once(
    redis_url: str, task_class: Any
) -> None:
    _ran.clear()
    _go_on.clear()
    async with TaskSystem([task_class], redis_url=redis_url, workers=1) as system:
        for text in ("a", "b", "c"):
            await submit_task(system.broker, f"test:{task_class.__name__}", [text], task_id="one")
        wanted_waiting = 3 if task_class is Flaky else 2
        await until(lambda: waiting(system.broker), when=lambda found: len(found) >= wanted_waiting)
        _go_on.set()
        wanted = ["a", "b", "c"]
        if task_class is Flaky:
            wanted += [f"{text} again" for text in wanted]
        await until(lambda: len(_ran) >= len(wanted))
        await system.drain()
    assert sorted(_ran) == sorted(wanted)
