"""A server out of memory (`noeviction`): additions are refused, removals work."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any

import pytest
from diracx.tasks.plumbing import (
    BaseLock,
    BaseTask,
    ConcurrencyLimiter,
    ExclusiveRWLock,
    MutexLock,
    RateLimiter,
    SharedRWLock,
    schedule_many,
)
from diracx.tasks.plumbing.broker import (
    RedisStreamBroker,
    dead_letter_stream,
    groups,
    inspection,
    keys,
    locking,
    running_configs,
    scheduling,
    scripts,
    worker_state,
)
from diracx.tasks.plumbing.broker.models import Delivery, Settlement, Submission, TaskMessage
from diracx.tasks.plumbing.broker.server_check import Role
from diracx.tasks.plumbing.callbacks import spawn_with_callback
from diracx.tasks.plumbing.exceptions import SendTaskError
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.testing import TaskSystem
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError
from support.start_requests import start_request

QUEUE = "diracx:tasks:normal:medium"
LATER = datetime.now(UTC) + timedelta(hours=1)


class Slots(ConcurrencyLimiter):
    limit = 5


class Rate(RateLimiter):
    limit = 5
    window_seconds = 60


class Plain(BaseTask):
    async def execute(self) -> None:
        pass


@asynccontextmanager
async def full(redis: Redis) -> AsyncIterator[None]:
    """The server takes nothing more inside the block."""
    await redis.config_set("maxmemory", "1")
    try:
        yield
    finally:
        await redis.config_set("maxmemory", "0")


async def everything_on(redis: Redis) -> dict[bytes, Any]:
    return {key: await redis.dump(key) for key in await redis.keys()}


LOCKS: list[BaseLock] = [kind(JOB, 1) for kind in (MutexLock, ExclusiveRWLock, SharedRWLock, Slots, Rate)]

SUBMISSIONS: dict[str, Callable[[], Awaitable[object]]] = {
    "now": lambda: Plain().schedule(),
    "later": lambda: Plain().schedule(at_time=LATER),
    "several": lambda: schedule_many([Plain(), Plain()]),
    "group": lambda: spawn_with_callback([Plain(), Plain()], Plain()),
}


@pytest.mark.parametrize("which", SUBMISSIONS)
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.leaves_keys("diracx:*")
async def test_every_submission_is_refused_and_adds_nothing(
    redis_url: str, redis: Redis, which: str, used: bool
) -> None:
    async with TaskSystem([Plain], redis_url=redis_url, workers=0, scheduler=False, task_db_url=None):
        if used:
            await Plain().schedule()
            await Plain().schedule(at_time=LATER)
        before = await everything_on(redis)
        async with full(redis):
            for _ in range(2):
                with pytest.raises(SendTaskError, match="maxmemory"):
                    await SUBMISSIONS[which]()
        assert await everything_on(redis) == before


@pytest.mark.parametrize("lock", LOCKS, ids=repr)
async def test_locks_are_refused_outside_tasks(redis: Redis, lock: BaseLock) -> None:
    async with full(redis):
        for _ in range(2):
            with pytest.raises(OutOfMemoryError):
                await lock.acquire(redis)
    assert await redis.keys() == []


class Scene:
    """A worker with a delivery, a lock, and something of all that scripts may find."""

    def __init__(self, redis: Redis, broker: RedisStreamBroker, sync: SyncRedis, delivery: Delivery) -> None:
        self.redis, self.broker, self.sync, self.delivery = redis, broker, sync, delivery
        self.lock = MutexLock(JOB, 7)
        self.data = TaskMessage(task_id="new", task_name="test:Plain").dumpb()

    def start(self) -> Any:
        return start_request(self.delivery, [self.lock])

    def occurrence(self) -> dict[str, Any]:
        return {"id": "due", "due": 1, "next": 2, "stream": QUEUE, "task": "new", "data": self.data}


async def in_thread(call: Callable[[], Any]) -> Any:
    return call()


#: What each script does when the server is full: the adders are refused by it, the others are not.
ADDERS: dict[str, Callable[[Scene], Awaitable[Any]]] = {
    "submit": lambda s: scripts.submit(s.redis, QUEUE, [s.data]),
    "delay": lambda s: scripts.delay(s.redis, [("new", 2**41, QUEUE, "at_time", s.data)]),
    "group": lambda s: scripts.group(s.redis, "g", {"ttl_ms": 1000}, [{"task": "new", "staged": "x"}], True),
    "resubmit": lambda s: scripts.resubmit(s.redis, [{"ticket": "t", "stream": QUEUE, "data": s.data}], 1000),
    "occur": lambda s: scheduling.occur(s.redis, "leader", [s.occurrence()]),
    "run_now": lambda s: scheduling.run_now(s.redis, "due", QUEUE, "new", s.data),
    "acquire": lambda s: locking.acquire(s.redis, [Slots(JOB, 2).spec()]),
    "fire": lambda s: groups.fire(s.redis, "waits"),
}
DRAINERS: dict[str, Callable[[Scene], Awaitable[Any]]] = {
    "start": lambda s: s.broker.start([s.start()]),
    "renew": lambda s: in_thread(lambda: worker_state.renew(s.sync, "w", 60_000, [], [])),
    "extend": lambda s: locking.extend(s.redis, [s.lock.spec()]),
    "settle": lambda s: s.broker.settle([Settlement(s.delivery, locks=[s.lock.spec()])]),
    "release": lambda s: locking.release(s.redis, [s.lock.spec()]),
    "fetch": lambda s: s.broker.fetch(1, lease_seconds=60),
    "fetch_unacknowledged": lambda s: s.broker.fetch_unacknowledged([]),
    "reclaim": lambda s: s.broker.reclaim(1, audit=True),
    "promote": lambda s: s.broker.promote(),
    "cancel": lambda s: s.broker.cancel(["later", "nowhere"]),
    "find": lambda s: scripts.find(s.redis, QUEUE, "-", 10),
    "task_ids": lambda s: scripts.task_ids(s.redis, QUEUE, "-", 10),
    "fail_children": lambda s: scripts.fail_children(s.redis, "waits", "lost", [b"child"]),
    "plan": lambda s: scheduling.plan(s.redis, "leader", [{"id": "due", "fingerprint": "new", "due": 2}]),
    "pause": lambda s: scheduling.pause(s.redis, ["due"], True),
    "report": lambda s: worker_state.report(s.redis, "w", 1, b"", b"", {}, True),
    "blocked": lambda s: in_thread(lambda: worker_state.report_blocked(s.sync, "w", b"", b"")),
    "announce": lambda s: running_configs.announce(s.redis, "w", "", 1000, False),
    "alerts": lambda s: inspection.note_alerts(s.redis, ["memory"], ["memory full"]),
    "heads": lambda s: inspection.delayed_heads(s.redis, ["later"], 10),
    "snapshot": lambda s: inspection.snapshot(s.redis),
    "inspect": lambda s: locking.inspect(s.redis, [{"kind": "mutex", "key": s.lock.redis_key}], 1),
    "dead_letters": lambda s: dead_letter_stream.dead_letters(
        s.redis, "w", "-", lease_ms=1000, at_most=1, at_most_bytes=1000
    ),
    "leave": lambda s: s.broker.leave(),
    "check": lambda s: s.broker.startup(Role.WORKER),
    "lines": lambda s: scripts.lines(s.redis, 10),
    "finished": lambda s: scripts.script("finished")(s.redis, [QUEUE], ["-", 10, 1000]),
}


@pytest.fixture
async def scene(redis: Redis, redis_url: str) -> AsyncIterator[Scene]:
    broker, sync = RedisStreamBroker(redis_url, consumer_name="w"), SyncRedis.from_url(redis_url)
    made = [TaskMessage(task_id=name, task_name="test:Plain") for name in ("running", "queued", "later")]
    await broker.submit(
        [Submission(message, QUEUE, at) for message, at in zip(made, (None, None, LATER), strict=True)]
    )
    [delivery] = (await broker.fetch(1, lease_seconds=60))[0]
    fields = {"ttl_ms": 60_000, "callback_stream": QUEUE, "callback": made[0].dumpb()}
    await scripts.group(redis, "waits", fields, [{"task": "child", "staged": f"{QUEUE}\nx"}], True)
    await redis.set(keys.LEADER, "leader", px=60_000)
    await redis.zadd(keys.NEXT_RUNS, {"due": 1})
    await redis.hset(keys.FINGERPRINTS, "due", "x")
    await redis.xadd(keys.DEAD_LETTERS, {"reason": "unparsable", "data": "x"})
    yield Scene(redis, broker, sync, delivery)
    await broker.shutdown()
    sync.close()


@pytest.mark.leaves_keys("diracx:*", "lock:*")
@pytest.mark.parametrize("which", ADDERS)
async def test_a_script_that_adds_data_is_refused_by_a_full_server_before_any_change(
    scene: Scene, which: str
) -> None:
    before = await everything_on(scene.redis)
    async with full(scene.redis):
        with pytest.raises(OutOfMemoryError):
            await ADDERS[which](scene)
    assert await everything_on(scene.redis) == before


@pytest.mark.leaves_keys("diracx:*", "lock:*")
@pytest.mark.parametrize("which", DRAINERS)
async def test_scripts_that_delete_or_read_work_on_a_full_server(scene: Scene, which: str) -> None:
    async with full(scene.redis):
        await DRAINERS[which](scene)


def test_every_script_is_in_the_list_of_this_test() -> None:
    folder = files("diracx.tasks.plumbing.broker") / "lua"
    names = {each.name.removesuffix(".lua") for each in folder.iterdir() if not each.name.startswith("_")}
    assert names == {*ADDERS, *DRAINERS}
    for name in names:
        assert scripts.script(name).source.startswith("#!lua")
