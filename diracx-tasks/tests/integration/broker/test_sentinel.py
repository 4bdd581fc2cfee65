"""A real failover by Sentinel: no process has to be restarted."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from diracx.tasks.plumbing import IntervalSeconds, PeriodicBaseTask
from diracx.tasks.plumbing.broker import RedisStreamBroker
from diracx.tasks.plumbing.broker.connection import sync_client
from diracx.tasks.testing import TaskSystem
from diracx.tasks.testing.server import ValkeyProcess, free_port
from redis import Redis
from redis.exceptions import RedisError
from support.standard_tasks import Named
from support.waiting import until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")

SERVICE = "tasks"
BEGUN: Counter[str] = Counter()
TICKS: list[float] = []
FAILED_OVER: list[float] = []


class Waits(Named):
    async def execute(self) -> str:
        BEGUN[self.name] += 1
        await until(lambda: FAILED_OVER)
        return self.name


class Ticks(PeriodicBaseTask):
    default_schedule = IntervalSeconds(0.3)

    async def execute(self) -> None:
        TICKS.append(time.monotonic())


class AppContext:
    """A primary, its replica, and three sentinels of which two must agree."""

    def __init__(self, directory: Path) -> None:
        self.primary, self.replica = self._server(directory / "primary"), self._server(directory / "replica")
        self.primary.start()
        self.replica.start()
        with Redis.from_url(self.replica.url) as client:
            client.replicaof("127.0.0.1", self.primary.port)
        self._sentinels = []
        self.places = []
        for number in range(3):
            home = directory / f"sentinel-{number}"
            home.mkdir()
            port = free_port()
            (home / "sentinel.conf").write_text(
                f"port {port}\nbind 127.0.0.1\ndir {home}\n"
                f"sentinel monitor {SERVICE} 127.0.0.1 {self.primary.port} 2\n"
                f"sentinel down-after-milliseconds {SERVICE} 500\n"
                f"sentinel failover-timeout {SERVICE} 3000\n"
            )
            binary = self.primary.binary
            with (home / "log").open("wb") as log:
                self._sentinels.append(
                    subprocess.Popen([binary, str(home / "sentinel.conf"), "--sentinel"], stdout=log, stderr=log)
                )
            self.places.append(f"127.0.0.1:{port}")

    def _server(self, directory: Path) -> ValkeyProcess:
        directory.mkdir()
        return ValkeyProcess(directory, options=("--repl-diskless-sync-delay", "0"))

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(self.places)}/{SERVICE}"

    def is_complete(self) -> bool:
        """True if the replica follows the primary, and all sentinels know it and each other."""
        try:
            with Redis.from_url(self.primary.url) as primary:
                replicas = primary.info("replication")
            known = []
            for place in self.places:
                with Redis.from_url(f"redis://{place}") as sentinel:
                    known.append(sentinel.sentinel_master(SERVICE))
        except RedisError:
            return False
        return replicas.get("slave0", {}).get("state") == "online" and all(
            state["num-slaves"] == 1 and state["num-other-sentinels"] == 2 for state in known
        )

    def replicated(self) -> bool:
        """True if the replica has everything the primary has."""
        with Redis.from_url(self.primary.url) as primary:
            info = primary.info("replication")
        return bool(info["slave0"]["offset"] == info["master_repl_offset"])

    def has_failed_over(self) -> bool:
        try:
            with Redis.from_url(self.replica.url) as replica:
                return bool(replica.info("replication")["role"] == "master")
        except RedisError:  # a server that is promoted drops its clients
            return False

    def end(self) -> None:
        for process in self._sentinels:
            process.kill()
            process.wait()
        self.primary.kill()
        self.replica.kill()


@pytest.fixture
def context(tmp_path: Path) -> Iterator[AppContext]:
    for memory in (BEGUN, TICKS, FAILED_OVER):
        memory.clear()
    built = AppContext(tmp_path)
    yield built
    built.end()


@pytest.mark.parametrize("options", ["", "?max_connections=2"])
async def test_a_closed_broker_keeps_no_connection_to_a_sentinel(context: AppContext, options: str) -> None:
    await until(context.is_complete, "the sentinels know each other")

    def connections() -> set[tuple[str, str]]:
        found = set()
        for place in context.places:
            with Redis.from_url(f"redis://{place}") as sentinel:
                own = str(sentinel.client_id())
                # Sentinels have names to each other.
                found |= {
                    (place, each["id"])
                    for each in sentinel.client_list()
                    if each["id"] != own and not each["name"]
                }
        return found

    broker = RedisStreamBroker(context.url + options)
    await broker.redis.ping()
    async with broker.redis.pubsub() as subscription:
        await subscription.subscribe("channel")
    assert connections()
    await broker.shutdown()
    await until(lambda: not connections(), "the connections end")


@pytest.mark.parametrize("options", ["", "?max_connections=2"])
async def test_P6_workers_and_scheduler_go_on_with_the_promoted_replica(context: AppContext, options: str) -> None:
    await until(context.is_complete, "the sentinels know each other")
    settings = {"lease_seconds": 30.0}
    async with TaskSystem(
        [Waits, Ticks], redis_url=context.url + options, concurrency=3, settings=settings
    ) as system:
        # Six run, the others are queued: all of them are on both servers.
        ids = [await Waits(f"number {number}").schedule() for number in range(10)]
        await until(lambda: BEGUN.total() == 6, "all slots are in use")
        await until(context.replicated, "the replica has it all")
        context.primary.kill()
        await until(context.has_failed_over, "the replica is promoted")
        FAILED_OVER.append(time.monotonic())
        for number, task_id in enumerate(ids):
            await until(lambda task_id=task_id: _is_ready(system, task_id), f"number {number}")
        await until(lambda: sum(tick > FAILED_OVER[0] for tick in TICKS) > 1, "periodic tasks come again")
        await system.drain(20)
        with sync_client(context.url) as client:
            assert client.connection_pool.get_master_address()[1] == context.replica.port
    assert dict(BEGUN) == {f"number {number}": 1 for number in range(10)}, "each was executed once"


async def _is_ready(system: TaskSystem, task_id: str) -> bool:
    try:
        return await system.broker.is_result_ready(task_id)
    except RedisError:
        return False
