"""A server restored to an earlier state (snapshot, replica)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from diracx.tasks.plumbing import BaseTask, ExclusiveRWLock, MutexLock, SharedRWLock
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, Submission, TaskMessage
from diracx.tasks.plumbing.broker.replies import ACCEPTED
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.locks import BaseLock, lock_specs
from diracx.tasks.plumbing.worker.keeper import LeaseKeeper, PendingAck
from diracx.tasks.plumbing.worker.settler import Settler
from diracx.tasks.testing import TaskSystem
from diracx.tasks.testing.server import ValkeyProcess
from redis.asyncio import Redis
from redis.exceptions import RedisError
from support.standard_tasks import submitted
from support.start_requests import start_request
from support.waiting import until

QUEUE = "diracx:tasks:normal:medium"
BEGUN: list[str] = []
MAY_END: list[bool] = []


@dataclass
class Reads(BaseTask):
    @property
    def execution_locks(self) -> list[BaseLock]:
        return [SharedRWLock(JOB, "object")]

    async def execute(self) -> None:
        BEGUN.append("reads")
        await until(lambda: MAY_END)


@dataclass
class Writes(BaseTask):
    @property
    def execution_locks(self) -> list[BaseLock]:
        return [ExclusiveRWLock(JOB, "object")]

    async def execute(self) -> None:
        BEGUN.append("writes")


async def test_a_shared_lock_restored_from_a_snapshot_is_released_by_its_worker(tmp_path: Path) -> None:
    BEGUN.clear()
    MAY_END.clear()
    server = ValkeyProcess(tmp_path)
    server.start()
    try:
        async with TaskSystem(
            [Reads, Writes], redis_url=server.url, settings={"lease_seconds": 3.0, "lock_retry_seconds": 0.5}
        ) as system:
            await Reads().schedule()
            await until(lambda: BEGUN == ["reads"])
            await system.broker.redis.save()
            MAY_END.append(True)
            await system.drain(10)
            server.kill()
            server.start()  # from the snapshot: the task runs, and its lock is held
            await submitted(Writes())
            await until(lambda: "writes" in BEGUN)
            await system.drain(10)
    finally:
        server.kill()


@dataclass
class Works(BaseTask):
    locked: bool

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, "object")] if self.locked else []

    async def execute(self) -> str:
        BEGUN.append("works")
        try:
            await until(lambda: MAY_END)
        except asyncio.CancelledError:
            BEGUN.append("cancelled")
            raise
        return "done"


@pytest.mark.event_loops("asyncio", "uvloop")
@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("snapshot", ["before it was submitted", "while it waited", "while it ran"])
@pytest.mark.parametrize("ends", ["while the server is away", "long after"])
async def test_running_tasks_continue_and_are_settled_after_a_return_to_a_snapshot(
    tmp_path: Path, locked: bool, snapshot: str, ends: str
) -> None:
    BEGUN.clear()
    MAY_END.clear()
    server = ValkeyProcess(tmp_path)
    server.start()
    try:
        async with AsyncExitStack() as stack:
            submitter = await stack.enter_async_context(TaskSystem([Works], redis_url=server.url, workers=0))
            redis = submitter.broker.redis
            if snapshot == "before it was submitted":
                await redis.save()
            task_id = await Works(locked).schedule()
            if snapshot == "while it waited":
                await redis.save()
            settings = {"lease_seconds": 6.0}
            system = await stack.enter_async_context(
                TaskSystem([Works], redis_url=server.url, workers=1, scheduler=False, settings=settings)
            )
            await until(lambda: BEGUN == ["works"])
            if snapshot == "while it ran":
                await redis.save()
            server.kill()
            if ends == "while the server is away":
                MAY_END.append(True)
            server.start()
            if ends == "long after":
                await until_renewed(server.url, 3)
                MAY_END.append(True)
            assert (await system.result(task_id)).return_value == "done"
            await system.drain(10)
        assert BEGUN == ["works"], "it has run once"
    finally:
        server.kill()


async def until_renewed(url: str, times: int) -> None:
    """The worker has renewed its lease so often."""
    moments = set()
    async with Redis.from_url(url) as redis:
        while len(moments) < times:
            with suppress(RedisError):
                moments.add(await redis.get(keys.RENEWED))
            await asyncio.sleep(0.05)


class _Slots:
    """Slots that record settled deliveries."""

    def __init__(self) -> None:
        self.left: list[Delivery] = []

    def settled(self, deliveries: Iterable[Delivery]) -> None:
        self.left += deliveries

    async def closed_if_stopping(self) -> None:
        pass

    async def wait_for_fetch(self) -> None:
        pass


async def test_a_task_settled_before_the_next_renewal_keeps_its_worker_after_a_return_to_a_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = ValkeyProcess(tmp_path)
    server.start()
    broker = RedisStreamBroker(server.url)
    try:
        await broker.startup()
        keeper = LeaseKeeper(server.url, broker.consumer_name, 600, asyncio.get_running_loop())
        await keeper.renew()
        await broker.redis.save()
        await broker.submit([Submission(TaskMessage(task_id="task", task_name="test:Task"), QUEUE)])
        [delivery], _ = await broker.fetch(1)
        keeper.add([PendingAck(delivery)])
        server.kill()
        server.start()
        slots = _Slots()
        settler = Settler(broker, keeper, slots)
        sending = asyncio.create_task(settler.run())
        settler.add(Settlement(delivery, result={"key": "diracx:results:task", "value": b"x", "ttl_ms": 60_000}))
        await settler.drained()
        assert await broker.redis.get("diracx:results:task") == b"x"
        assert "cannot be settled" not in caplog.text
        assert slots.left == [delivery]
        sending.cancel()
    finally:
        await broker.shutdown()
        server.kill()


@pytest.mark.parametrize("had", ["it was declared dead", "it lives"])
async def test_a_worker_whose_lease_expired_accepts_that_another_has_settled_its_task(
    tmp_path: Path, had: str
) -> None:
    """The server was restarted as well, and has kept everything."""
    server = ValkeyProcess(tmp_path, options=("--appendonly", "yes", "--appendfsync", "always"))
    server.start()
    owner, other = RedisStreamBroker(server.url), RedisStreamBroker(server.url)
    try:
        for broker in (owner, other):
            await broker.startup()
        seconds = 0.05 if had == "it was declared dead" else 600
        keeper = LeaseKeeper(server.url, owner.consumer_name, seconds, asyncio.get_running_loop())
        await keeper.renew()
        await owner.submit([Submission(TaskMessage(task_id="task", task_name="test:Task"), QUEUE)])
        [delivery], _ = await owner.fetch(1)
        hold = _Hold(delivery)
        keeper.add([hold])
        await owner.redis.zadd(keys.ALIVE, {other.consumer_name: 9e12, owner.consumer_name: 1})
        await owner.redis.zadd(keys.LEASES, {other.consumer_name: 600_000, owner.consumer_name: 600_000})
        await owner.redis.set(keys.RENEWED, int(time.time() * 1000))
        [taken], *_ = await other.reclaim(1, lease_seconds=600)
        assert await other.settle([Settlement(taken)]) == [ACCEPTED]
        server.kill()
        server.start()
        await until(lambda: keeper.overdue or seconds > 1)
        with suppress(RedisError):  # by the connection that is gone
            await keeper.renew()
        await keeper.renew()
        await asyncio.sleep(0)
        # One that has renewed in time all along cannot have been taken over: here it was, behind its back.
        assert hold.taken_over == (had == "it was declared dead")
    finally:
        for broker in (owner, other):
            await broker.shutdown()
        server.kill()


@dataclass
class _Hold(PendingAck):
    taken_over: bool = False

    def on_lease_lost(self, reason: str, taken_over: bool) -> None:
        self.taken_over = taken_over


class _EndsMeanwhile(PendingAck):
    """A delivery that is settled after a renewal has listed it and before it is sent."""

    keeper: LeaseKeeper | None = None

    def __getattribute__(self, name: str) -> object:
        if name == "delivery" and self.keeper is not None:
            keeper, self.keeper = self.keeper, None
            keeper.forget([self.delivery])
        return super().__getattribute__(name)


@pytest.mark.parametrize("replied", ["before the renewal", "while the renewal is sent", "after the renewal"])
async def test_a_task_settled_just_before_the_renewal_after_a_restart_has_ended(
    tmp_path: Path, replied: str
) -> None:
    """The snapshot has it as running, so its settlement is accepted before the worker detects the restart."""
    server = ValkeyProcess(tmp_path)
    server.start()
    broker = RedisStreamBroker(server.url)
    try:
        await broker.startup()
        keeper = LeaseKeeper(server.url, broker.consumer_name, 600, asyncio.get_running_loop())
        await keeper.renew()
        await broker.submit([Submission(TaskMessage(task_id="task", task_name="test:Task"), QUEUE)])
        [delivery], _ = await broker.fetch(1)
        locks = lock_specs([MutexLock(JOB, "object"), SharedRWLock(JOB, "other")])
        await broker.start([start_request(delivery, locks)])
        hold = _EndsMeanwhile(delivery, locks)
        keeper.add([hold])
        await keeper.renew()
        await broker.redis.save()
        server.kill()
        server.start()
        with suppress(RedisError):  # by the connection that is gone
            await broker.redis.ping()
        assert await broker.settle([Settlement(delivery, locks)], keeper.dataset_id) == [ACCEPTED]
        renewed = False
        while not renewed:  # not at once, by the connection that is gone
            if replied == "before the renewal":
                keeper.forget([delivery])
            elif replied == "while the renewal is sent":
                keeper.add([hold])
                hold.keeper = keeper
            with suppress(RedisError):
                await keeper.renew()
                renewed = True
        if replied == "after the renewal":
            assert await broker.redis.exists(keys.HELD_PREFIX + broker.consumer_name)
            keeper.forget([delivery])
            await keeper.renew()
        assert not await broker.redis.keys(keys.HELD_PREFIX + "*")
        assert not [key async for key in broker.redis.scan_iter("lock:*")]
    finally:
        await broker.shutdown()
        server.kill()
