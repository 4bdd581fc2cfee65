"""Outages of the server: processes wait, reconnect, restore lost data and settle running tasks."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from diracx.tasks.plumbing import BaseTask, ExponentialBackoff, IntervalSeconds, MutexLock, PeriodicBaseTask
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.lock_registry import JOB, TASK
from diracx.tasks.plumbing.locks import BaseLock
from diracx.tasks.plumbing.worker.keeper import LeaseKeeper
from diracx.tasks.testing import TaskSystem
from diracx.tasks.testing.server import ValkeyProcess
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.exceptions import RedisError
from support.standard_tasks import submitted
from support.waiting import until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")

BEGUN: Counter[str] = Counter()
ENDED: Counter[str] = Counter()
TICKS: list[float] = []


class Gate:
    """An event for any number of event loops, one after another."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def close(self) -> None:
        self.event = asyncio.Event()

    async def wait(self) -> None:
        await self.event.wait()

    def set(self) -> None:
        self.event.set()


GATE = Gate()


@dataclass
class Waits(BaseTask):
    """Ends when the test says so."""

    name: str

    async def execute(self) -> str:
        BEGUN[self.name] += 1
        await GATE.wait()
        ENDED[self.name] += 1
        return self.name


@dataclass
class WaitsLocked(Waits):
    @property
    def execution_locks(self) -> list[BaseLock]:
        return [MutexLock(JOB, self.name)]


@dataclass
class FailsOnce(Waits):
    retry_policy = ExponentialBackoff(base_delay_seconds=1, max_retries=1)

    async def execute(self) -> str:
        await super().execute()
        if ENDED[self.name] == 1:
            raise ValueError("the first time")
        return self.name


@dataclass
class Quick(BaseTask):
    name: str

    async def execute(self) -> str:
        ENDED[self.name] += 1
        return self.name


class Ticks(PeriodicBaseTask):
    default_schedule = IntervalSeconds(0.3)

    async def execute(self) -> None:
        TICKS.append(time.monotonic())


TASKS = [Waits, WaitsLocked, FailsOnce, Quick, Ticks]


@pytest.fixture(autouse=True)
def forgotten() -> None:
    for memory in (BEGUN, ENDED, TICKS):
        memory.clear()
    GATE.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyProcess]:
    process = ValkeyProcess(tmp_path)
    process.start()
    yield process
    process.kill()


async def ticks_again() -> None:
    since = time.monotonic()
    await until(lambda: sum(tick > since for tick in TICKS) >= 2, "periodic tasks come again")


async def held_records(server: ValkeyProcess) -> list[bytes]:
    """Locks that the server has recorded for workers, and entries that they restored after a loss of data."""
    async with Redis.from_url(server.url) as redis:
        workers = await redis.keys(f"{keys.HELD_PREFIX}*")
        return [each for worker in workers for each in await redis.hkeys(worker)]


@asynccontextmanager
async def system_on(server: ValkeyProcess, **settings: float) -> AsyncIterator[TaskSystem]:
    """Two workers and a scheduler; they must all be alive and clean at the end."""
    async with TaskSystem(TASKS, redis_url=server.url, settings={"lease_seconds": 3.0, **settings}) as system:
        yield system
        await system.drain(60)
        # The scheduler goes on: a periodic task may run now, and hold its lock.
        ticking = b":" + MutexLock(TASK, "Ticks").redis_key.encode()
        held = [each for each in await held_records(server) if not each.endswith(ticking)]
        assert not held, "what the server had lost is settled, too"
        assert all(ended == BEGUN[name] for name, ended in ENDED.items() if BEGUN[name]), "nothing is cut off"


async def kill_connections(server: ValkeyProcess) -> None:
    async with Redis.from_url(server.url) as redis:
        for kind in ("normal", "pubsub"):
            with suppress(RedisError):
                await redis.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")


async def test_P6_dropped_connections_end_neither_workers_nor_what_they_run(server: ValkeyProcess) -> None:
    async with system_on(server) as system:
        ids = {name: await Waits(name).schedule() for name in "abc"}
        locked = await WaitsLocked("locked").schedule()
        await until(lambda: BEGUN.total() == 4, "all begin")
        for _ in range(5):
            await kill_connections(server)
            await asyncio.sleep(0.1)
        GATE.set()
        await kill_connections(server)
        for name, task_id in {**ids, "locked": locked}.items():
            await until(lambda task_id=task_id: system.broker.is_result_ready(task_id), name)
        await ticks_again()
        await kill_connections(server)  # while idle
        await ticks_again()
        task_id = await submitted(Quick("afterwards"))
        await until(lambda: ENDED["afterwards"], "the worker goes on")
        await system.result(task_id, timeout=60)
    assert BEGUN == {"a": 1, "b": 1, "c": 1, "locked": 1}


@pytest.mark.parametrize("loss", ["flushall", "restart"])
async def test_P7_a_task_that_runs_during_a_data_loss_is_settled(server: ValkeyProcess, loss: str) -> None:
    async with system_on(server) as system:
        plain = await Waits("plain").schedule()
        locked = await WaitsLocked("locked").schedule()
        retried = await FailsOnce("retried").schedule()
        await until(lambda: BEGUN.total() == 3, "all begin")
        if loss == "flushall":
            await system.broker.redis.flushall()
        else:
            server.kill()
            server.start()
        # Without its lock in between? It is taken again before anybody else can have it for long.
        await until(
            lambda: _exists(server, WaitsLocked("locked").execution_locks[0].redis_key), "the lock is back"
        )
        GATE.set()
        for task_id in (plain, locked, retried):
            assert (await system.result(task_id, timeout=60)).error is None
        await ticks_again()
        await system.result(await submitted(Quick("afterwards")), timeout=60)
    assert BEGUN == {"plain": 1, "locked": 1, "retried": 2}


async def _exists(server: ValkeyProcess, key: str) -> bool:
    async with Redis.from_url(server.url) as redis:
        return bool(await redis.exists(key))


@pytest.mark.usefixtures("no_free_thread")
async def test_P7_a_task_that_ends_at_once_after_the_loss_is_settled(server: ValkeyProcess) -> None:
    """Before the keeper had any reason to renew: a lease of 30 s."""
    async with system_on(server, lease_seconds=30.0) as system:
        ids = [await Waits(name).schedule() for name in "ab"]
        await until(lambda: BEGUN.total() == 2, "all begin")
        await system.broker.redis.flushall()
        GATE.set()
        for task_id in ids:
            await system.result(task_id, timeout=60)
    assert ENDED == {"a": 1, "b": 1}


@pytest.mark.parametrize("loss", ["flushall", "restart"])
async def test_P7_idle_workers_and_the_scheduler_survive_the_loss_of_all_data(
    server: ValkeyProcess, loss: str
) -> None:
    async with system_on(server) as system:
        await ticks_again()
        for name in ("first", "second"):
            if loss == "flushall":
                await system.broker.redis.flushall()
            else:
                server.stop()
                await asyncio.sleep(0.3)  # long enough for everybody to notice
                server.start()
            await system.result(await submitted(Quick(name)), timeout=60)
            await ticks_again()
    assert ENDED == {"first": 1, "second": 1}


async def test_P24_a_lock_that_another_took_after_a_data_loss_cancels_its_task(server: ValkeyProcess) -> None:
    async with TaskSystem(TASKS, redis_url=server.url, settings={"lease_seconds": 30.0}) as system:
        task_id = await WaitsLocked("stolen").schedule()
        await until(lambda: BEGUN["stolen"], "it begins")
        async with system.broker.redis.pipeline(transaction=True) as pipe:
            pipe.flushall()
            pipe.set(MutexLock(JOB, "stolen").redis_key, "another", px=60_000)
            await pipe.execute()
        await until(lambda: system.broker.redis.hexists(keys.DELAYED_DATA, task_id), "it waits for the lock")
        assert BEGUN["stolen"] == 1
        assert not ENDED["stolen"]
        assert await system.broker.redis.get(MutexLock(JOB, "stolen").redis_key) == b"another"


async def test_P7_workers_wait_while_the_server_is_read_only(server: ValkeyProcess) -> None:
    async with system_on(server, lease_seconds=30.0) as system:
        ids = [await Waits(name).schedule() for name in "ab"]
        await until(lambda: BEGUN.total() == 2, "all begin")
        async with Redis.from_url(server.url) as admin:
            await admin.execute_command("REPLICAOF", "127.0.0.1", 1)
            GATE.set()
            await until(lambda: ENDED.total() == 2, "they end meanwhile")
            await asyncio.sleep(1)
            assert not any([await system.broker.is_result_ready(task_id) for task_id in ids])
            await admin.execute_command("REPLICAOF", "NO", "ONE")
        for task_id in ids:
            await until(lambda task_id=task_id: system.broker.is_result_ready(task_id), "settled")
        await ticks_again()
    assert BEGUN == {"a": 1, "b": 1}


async def test_ended_tasks_are_settled_while_memory_is_short_and_the_others_wait(server: ValkeyProcess) -> None:
    async with system_on(server) as system:
        ids = [await Waits("a").schedule(), await WaitsLocked("b").schedule(), await FailsOnce("c").schedule()]
        await until(lambda: BEGUN.total() == 3, "all begin")
        redis = system.broker.redis
        await redis.config_set("maxmemory-policy", "noeviction")
        await redis.config_set("maxmemory", "1mb")
        waited = time.monotonic()
        GATE.set()
        for task_id in ids:
            await until(lambda task_id=task_id: system.broker.is_result_ready(task_id), "settled without memory")
        # More than a lease: what runs meanwhile, and who runs it, must not be taken for dead.
        await until(lambda: time.monotonic() - waited > 4, "a lease passes")
        with pytest.raises(Exception, match="maxmemory"):
            await Quick("refused").schedule()
        ticks = len(TICKS)
        await redis.config_set("maxmemory", "0")
        await until(lambda: len(TICKS) > ticks + 1, "periodic tasks come again")
    assert BEGUN == {"a": 1, "b": 1, "c": 2}


async def test_leases_and_locks_are_renewed_while_memory_is_short(server: ValkeyProcess) -> None:
    async with system_on(server, lease_seconds=2.0) as system:
        task_id = await WaitsLocked("kept").schedule()
        await until(lambda: BEGUN["kept"], "it begins")
        await system.broker.redis.config_set("maxmemory", "1mb")
        began = time.monotonic()
        await until(lambda: time.monotonic() - began > 5.0, "several leases pass")
        GATE.set()
        assert (await system.result(task_id, timeout=60)).error is None
        await system.broker.redis.config_set("maxmemory", "0")
    assert BEGUN == {"kept": 1}


async def test_commands_wait_for_a_server_that_executes_a_script_of_another_client(server: ValkeyProcess) -> None:
    async with system_on(server, lease_seconds=30.0) as system:
        await system.broker.redis.config_set("lua-time-limit", 20)
        ids = [await Waits(name).schedule() for name in "ab"]
        await until(lambda: BEGUN.total() == 2, "all begin")
        with SyncRedis.from_url(server.url, socket_timeout=60) as other:

            def hog() -> None:
                with suppress(RedisError):
                    other.eval("while true do end", 0)

            hogging = asyncio.create_task(asyncio.to_thread(hog))
            async with Redis.from_url(server.url) as admin:
                await until(lambda: _is_busy(admin), "the server is busy")
                GATE.set()
                await until(lambda: ENDED.total() == 2, "they end meanwhile")
                await asyncio.sleep(1)
                await admin.execute_command("SCRIPT", "KILL")
            await hogging
        for task_id in ids:
            await system.result(task_id, timeout=60)
        await ticks_again()
    assert BEGUN == {"a": 1, "b": 1}


async def _is_loaded(admin: Redis) -> bool:
    try:
        return bool(await admin.ping())
    except RedisError:
        return False


async def _is_busy(admin: Redis) -> bool:
    try:
        await admin.ping()
    except RedisError as error:
        return str(error).startswith("BUSY")
    return False


async def test_commands_wait_for_a_server_that_loads_its_data(tmp_path: Path) -> None:
    """A restart with persistence loses nothing, and queued tasks are executed."""
    server = ValkeyProcess(
        tmp_path, options=("--key-load-delay", "2000", "--loading-process-events-interval-bytes", "1024")
    )
    server.start()
    try:
        async with system_on(server, lease_seconds=30.0) as system:
            redis = system.broker.redis
            task_id = await Waits("a").schedule()
            await until(lambda: BEGUN["a"], "it begins")
            await redis.mset({f"ballast:{number}": "x" * 100 for number in range(1000)})
            await redis.save()
            server.kill()
            starting = asyncio.create_task(asyncio.to_thread(server.start))
            seen = []

            async def loading() -> bool:
                if not seen:
                    try:
                        async with Redis.from_url(server.url) as admin:
                            await admin.get("x")
                    except RedisError as error:
                        if "loading" in str(error).lower():
                            seen.append(error)
                return bool(seen)

            await until(loading, "the server says LOADING")
            GATE.set()
            await starting
            async with Redis.from_url(server.url) as admin:
                await until(lambda: _is_loaded(admin), "all is loaded")
            assert (await system.result(task_id, timeout=60)).return_value == "a"
            await ticks_again()
            await system.broker.redis.delete(*[f"ballast:{number}" for number in range(1000)])
        assert BEGUN == {"a": 1}
    finally:
        server.kill()


async def test_the_lease_keeper_logs_an_outage_when_it_begins_and_when_it_ends(
    server: ValkeyProcess, caplog: pytest.LogCaptureFixture
) -> None:
    async with LeaseKeeper(server.url, "worker", 1.0, asyncio.get_running_loop()) as keeper:
        server.kill()
        await until(lambda: keeper.overdue)  # after several attempts
        server.start()
        await until(lambda: "can renew the lease of worker again" in caplog.text)
    assert caplog.text.partition("can renew")[0].count("cannot renew the lease of worker") == 1
