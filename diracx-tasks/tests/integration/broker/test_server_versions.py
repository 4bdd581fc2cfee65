"""The task system works on every version of Redis and Valkey that is available here.

Everything is done as a user without administrative and dangerous commands.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from diracx.tasks.plumbing import (
    BaseTask,
    ChildResults,
    ExclusiveRWLock,
    ExponentialBackoff,
    MutexLock,
    PeriodicBaseTask,
    RateLimiter,
    SharedRWLock,
    schedule_many,
    spawn_with_callback,
)
from diracx.tasks.plumbing.broker import RedisStreamBroker, keys
from diracx.tasks.plumbing.broker.inspection import snapshot
from diracx.tasks.plumbing.broker.models import Settlement, Submission, TaskMessage
from diracx.tasks.plumbing.broker.replies import ACCEPTED, TAKEN_OVER
from diracx.tasks.plumbing.broker.scripts import script
from diracx.tasks.plumbing.broker.server_check import Role, UnusableServerError, obstacle, read_server
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.schedules import IntervalSeconds
from diracx.tasks.testing import TaskSystem
from diracx.tasks.testing.server import PROGRAM_VARIABLE, ValkeyProcess
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from support.machine import not_for_this_machine
from support.paths import ROOT
from support.sites import redis_versions
from support.sites.debian_root import ForbiddenError, ObstacleError
from support.standard_tasks import SEEN
from support.waiting import until

ACL_FILES = ROOT / "deploy" / "redis" / "acl"
QUEUE = "diracx:tasks:normal:medium"
DEFAULT = "the default"
USER = ("--user", "farm", "on", "nopass", "~*", "&*", "+@all", "-@admin", "-@dangerous")


@contextmanager
def _server(version: str, directory: Path, *options: str) -> Iterator[ValkeyProcess]:
    """A server of that version."""
    with pytest.MonkeyPatch.context() as patch:
        if version != DEFAULT:
            try:
                redis_versions.check(version)
            except ForbiddenError as obstacle:
                not_for_this_machine(str(obstacle))
            except ObstacleError as obstacle:
                pytest.skip(str(obstacle))
            patch.setenv(PROGRAM_VARIABLE, str(redis_versions.program(version)))
        process = ValkeyProcess(directory, options=options)
        process.start()
    try:
        yield process
    finally:
        process.kill()


@pytest.fixture(scope="module", params=[DEFAULT, *redis_versions.SERVERS])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def running(version: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    with _server(version, tmp_path_factory.mktemp("server"), *USER) as process:
        yield process


@pytest.fixture
def url(running: ValkeyProcess) -> Iterator[str]:
    """A user without administrative and dangerous commands on an empty server."""
    with SyncRedis.from_url(running.url) as admin:
        admin.flushall()
        yield running.url.replace("//", "//farm:any@")
        refused = {entry["object"] for entry in admin.acl_log() if entry["username"] == "farm"}
        assert refused <= {"info"}, "the task system sends what its user may not"


@pytest.fixture
async def pair(url: str) -> AsyncIterator[tuple[RedisStreamBroker, RedisStreamBroker]]:
    """Two workers' brokers, moved by hand."""
    brokers = RedisStreamBroker(url, consumer_name="one"), RedisStreamBroker(url, consumer_name="two")
    yield brokers
    for broker in brokers:
        await broker.shutdown()


# --- steps of the broker -----------------------------------------------------------------------------------------


async def test_every_script_compiles_and_each_role_may_start(url: str) -> None:
    async with Redis.from_url(url) as redis:
        for file in (files("diracx.tasks.plumbing.broker") / "lua").iterdir():
            if not file.name.startswith("_"):
                await redis.script_load(script(file.name.removesuffix(".lua")).source)
        for role in Role:
            assert obstacle(await read_server(redis, role)) is None


async def test_a_message_is_reserved_once_and_settled_once(
    pair: tuple[RedisStreamBroker, RedisStreamBroker],
) -> None:
    one, two = pair
    await one.submit([Submission(TaskMessage(task_id=name, task_name="test:Task"), QUEUE) for name in "ab"])
    (first, second), _ = await one.fetch(5, lease_seconds=30)
    assert (await two.fetch(5, lease_seconds=30))[0] == []
    assert await one.settle([Settlement(first)]) == [ACCEPTED]
    assert await one.settle([Settlement(first)]) == [TAKEN_OVER]
    # A reply that was lost: what is reserved and not in hand comes again.
    assert [each.entry for each in await one.fetch_unacknowledged([])] == [second.entry]
    assert await one.leave() is False, "it still holds a message"
    await one.settle([Settlement(second)])
    assert await one.leave()


async def test_messages_of_a_dead_worker_are_moved_to_another_one_that_alone_may_settle_them(
    pair: tuple[RedisStreamBroker, RedisStreamBroker],
) -> None:
    one, two = pair
    await one.submit([Submission(TaskMessage(task_id="a", task_name="test:Task"), QUEUE)])
    [lost], _ = await one.fetch(1, lease_seconds=30)
    later_ms = int(datetime.now(UTC).timestamp() * 1000) + 60_000
    await one.redis.zadd(keys.ALIVE, {"one": 1, "two": later_ms})
    [taken], *_ = await two.reclaim(1, audit=True)
    assert (taken.data, taken.deliveries) == (lost.data, 2)
    assert await one.settle([Settlement(lost)]) == [TAKEN_OVER]
    assert await two.settle([Settlement(taken)]) == [ACCEPTED]


async def test_a_message_wakes_the_worker_that_waits(pair: tuple[RedisStreamBroker, RedisStreamBroker]) -> None:
    one, two = pair
    await one.fetch(1, lease_seconds=30)  # makes the streams
    waiting = asyncio.create_task(one.reserve_next(1, 30))
    await two.submit([Submission(TaskMessage(task_id="a", task_name="test:Task"), QUEUE)])
    [delivery], _ = await waiting
    assert await one.settle([Settlement(delivery)]) == [ACCEPTED]


# --- a whole system ----------------------------------------------------------------------------------------------


@dataclass
class Echo(BaseTask):
    value: Any

    async def execute(self) -> Any:
        return self.value


@dataclass
class Flaky(BaseTask):
    retry_policy = ExponentialBackoff(base_delay_seconds=0.02, max_retries=2)
    dlq_eligible = True

    async def execute(self) -> None:
        SEEN.append("tried")
        raise ValueError("not today")


class Quota(RateLimiter):
    limit = 2
    window_seconds = 0.3


@dataclass
class Locked(BaseTask):
    number: int

    @property
    def execution_locks(self) -> Any:
        access = SharedRWLock(JOB, "rw") if self.number % 2 else ExclusiveRWLock(JOB, "rw")
        return [MutexLock(JOB, "one"), access, Quota(JOB, "q")]

    async def execute(self) -> None:
        SEEN.append("in")
        await asyncio.sleep(0.01)
        SEEN.append("out")


@dataclass
class Slow(BaseTask):
    async def execute(self) -> None:
        SEEN.append("begun")
        await asyncio.sleep(3600)


class Collect(BaseTask):
    async def execute(self, results: ChildResults) -> None:
        SEEN.append(sorted(result.return_value for result in results.values()))


class Tick(PeriodicBaseTask):
    default_schedule = IntervalSeconds(0.1)

    async def execute(self) -> None:
        SEEN.append("tick")


async def test_tasks_run_now_and_later_and_their_results_are_kept(url: str) -> None:
    async with TaskSystem([Echo], redis_url=url) as system:
        later = await Echo("later").schedule(at_time=datetime.now(UTC) + timedelta(seconds=0.3))
        ids = await schedule_many([Echo(number) for number in range(20)])
        assert [(await system.result(task_id)).return_value for task_id in ids] == list(range(20))
        assert (await system.result(later)).return_value == "later"


async def test_a_failing_task_is_retried_and_then_stored_as_a_dead_letter(url: str) -> None:
    async with TaskSystem([Flaky], redis_url=url) as system:
        assert (await system.result(await Flaky().schedule())).is_err
        assert SEEN == ["tried"] * 3
        await system.drain()
        assert system.task_db is not None
        async with system.task_db as db:
            assert len(await db.search()) == 1


async def test_locks_exclude_and_are_granted_to_the_next_and_a_quota_is_kept(url: str) -> None:
    async with TaskSystem([Locked], redis_url=url) as system:
        began = asyncio.get_running_loop().time()
        await schedule_many([Locked(number) for number in range(6)])
        await system.drain()
        assert SEEN == ["in", "out"] * 6
        assert asyncio.get_running_loop().time() - began >= 0.6, "6 of 2 in 0.3 s"


async def test_tasks_are_cancelled_while_they_wait_and_while_they_run(url: str) -> None:
    async with TaskSystem([Echo, Slow], redis_url=url) as system:
        delayed = await Echo("never").schedule(at_time=datetime.now(UTC) + timedelta(hours=1))
        running = await Slow().schedule()
        await until(lambda: SEEN == ["begun"])
        for task_id in (delayed, running):
            await system.cancel(task_id)
            assert (await system.result(task_id)).is_err


async def test_a_group_fires_its_callback_once_with_all_results(url: str) -> None:
    async with TaskSystem([Echo, Collect], redis_url=url) as system:
        await spawn_with_callback([Echo(number) for number in range(10)], Collect())
        await system.drain()
    assert [list(range(10))] == SEEN


async def test_a_schedule_runs_repeatedly(url: str) -> None:
    async with TaskSystem([Tick], redis_url=url) as system:
        await until(lambda: SEEN.count("tick") >= 3)
        assert await snapshot(system.broker.redis)


# --- users of deploy/redis/acl -----------------------------------------------------------------------------------


async def test_the_deployed_users_can_be_loaded_and_each_may_start(version: str, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"any").hexdigest()
    lines = [
        (ACL_FILES / f"{name}.acl").read_text() for name in ("default", *(role.name.lower() for role in Role))
    ]
    text = "".join(lines).replace("SHA256-OF-THE-PASSWORD", digest)
    if version == "Redis 7.0":  # as docs/how-to/restrict-redis.md has it
        text = text.replace(" +client|setinfo", "")
    users = tmp_path / "users.acl"
    users.write_text(text + "user test on nopass ~* &* +@all\n")
    with _server(version, tmp_path, "--aclfile", str(users)) as process:
        for role in Role:
            broker = RedisStreamBroker(process.url.replace("//", f"//diracx-{role.name.lower()}:any@"))
            await broker.startup(role)
            await broker.shutdown()


# --- servers that cannot be used ---------------------------------------------------------------------------------


async def test_a_server_that_is_too_old_is_refused_at_the_start(tmp_path: Path) -> None:
    with _server(redis_versions.OLD, tmp_path) as process:
        broker = RedisStreamBroker(process.url)
        with pytest.raises(UnusableServerError, match=r"has version 6\.0\.\d+: Redis 7\.0 or newer"):
            await broker.startup()
        await broker.shutdown()


@pytest.mark.parametrize("slots", ["none", "all"])
async def test_a_server_that_refuses_undeclared_keys_is_refused_at_the_start(
    version: str, slots: str, tmp_path: Path
) -> None:
    """Like a proxy of a cluster, this hides that the server is in cluster mode."""
    with _server(version, tmp_path, "--cluster-enabled", "yes") as process:
        async with Redis.from_url(process.url) as redis:
            assert "is in cluster mode" in str(obstacle(await read_server(redis, settings=False)))
            if slots == "all":
                await redis.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
                await until(
                    lambda: redis.execute_command("CLUSTER", "INFO"),
                    when=lambda found: "cluster_state:ok" in str(found),
                )
            hidden = replace(await read_server(redis, Role.WORKER, settings=False), hello={})
            assert "refuses scripts that touch keys which they do not declare" in str(obstacle(hidden))
            broker = RedisStreamBroker(process.url, consumer_name="one")
            with pytest.raises(ResponseError):  # what would have come instead, with the first task
                await broker.fetch(1, lease_seconds=30)
            await broker.shutdown()
