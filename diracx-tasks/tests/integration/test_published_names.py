"""A program that embeds worker and scheduler as the published package does."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from diracx.core.config import Config
from diracx.core.settings import FactorySettings
from diracx.tasks.plumbing import (
    BaseTask,
    IntervalSeconds,
    MutexLock,
    PeriodicVoAwareBaseTask,
    ResultIsMissingError,
)
from diracx.tasks.plumbing.broker import RedisResultBackend, RedisStreamBroker, TaskResult, submit_task
from diracx.tasks.plumbing.factory import create_task_bindings
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.scheduler import TaskScheduler
from diracx.tasks.plumbing.worker import Worker
from diracx.tasks.testing import TaskSystem, embedded_redis
from redis.asyncio import Redis
from support.standard_tasks import SEEN
from support.waiting import until

pytestmark = pytest.mark.leaves_keys("diracx:*")


@dataclass
class Note(BaseTask):
    text: str

    async def execute(self) -> None:
        SEEN.append(self.text)
        if self.text == "outer":
            await Note("inner").schedule()


class OfVo(PeriodicVoAwareBaseTask):
    default_schedule = IntervalSeconds(0.05)

    async def execute(self) -> None:
        SEEN.append(self.vo)


CLASSES: dict[str, type[BaseTask]] = {"test:Note": Note, "test:OfVo": OfVo}


def diracx_config() -> Config:
    groups = {"user": {"Properties": [], "Users": []}}
    vo = {"IdP": {"URL": "https://idp.invalid", "ClientID": "x"}, "DefaultGroup": "user", "Groups": groups}
    return Config.model_validate({"DIRAC": {}, "Operations": {}, "Registry": {"lhcb": {**vo, "Users": {}}}})


async def test_program_in_the_published_form_runs_its_tasks(redis_url: str) -> None:
    SEEN.clear()
    broker = RedisStreamBroker(url=redis_url)
    bindings, functions = create_task_bindings(broker, CLASSES)
    BaseTask.bind_broker(bindings)
    with pytest.raises(RuntimeError, match="already bound to a broker"):
        BaseTask.bind_broker(bindings)
    worker = Worker(
        broker=broker,
        task_registry=functions,
        task_class_registry=CLASSES,
        max_concurrent_tasks=2,
        max_prefetch=0,
        task_db=None,
    )
    scheduler = TaskScheduler(
        broker, redis_url, task_registry=CLASSES, config=diracx_config(), check_interval=1.0, task_db=None
    )
    stop = asyncio.Event()
    await scheduler.startup()
    async with asyncio.TaskGroup() as running:
        running.create_task(worker.listen(stop))
        running.create_task(scheduler.run_forever(stop))
        await Note("outer").schedule()
        await bindings[Note].submit("by its binding")
        await until(lambda: {"outer", "inner", "by its binding", "lhcb"} <= set(SEEN))
        stop.set()
    await scheduler.shutdown()
    await broker.shutdown()


@dataclass
class Dry(BaseTask):
    vo: str
    number: int = 0

    async def execute(self, dry_run: bool = False) -> list[Any]:
        return [self.vo, self.number, dry_run]


@dataclass
class TakesAll(Dry):
    async def execute(self, **more: Any) -> list[Any]:
        return [self.vo, more]


@pytest.mark.parametrize(
    ("args", "kwargs", "result"),
    [
        (["lhcb"], {"dry_run": True}, ["lhcb", 0, True]),
        (["lhcb", 1], {}, ["lhcb", 1, False]),
        ([], {"vo": "lhcb", "number": 2, "dry_run": True}, ["lhcb", 2, True]),
        (["lhcb"], {"dry": True}, "unknown argument 'dry'"),
    ],
)
async def test_keyword_arguments_of_a_message_are_for_execute_as_in_0_7(
    redis_url: str, args: list[Any], kwargs: dict[str, Any], result: Any
) -> None:
    async with TaskSystem([Dry], redis_url=redis_url) as system:
        task_id = await submit_task(system.broker, "test:Dry", args, kwargs)
        ended = await system.result(task_id)
    if isinstance(result, str):
        assert ended.error is not None
        assert result in ended.error["message"]
    else:
        assert ended.return_value == result


async def test_execute_that_takes_any_keyword_gets_those_that_the_class_does_not_take(redis_url: str) -> None:
    async with TaskSystem([TakesAll], redis_url=redis_url) as system:
        task_id = await submit_task(system.broker, "test:TakesAll", [], {"vo": "lhcb", "more": 1, "other": 2})
        assert (await system.result(task_id)).return_value == ["lhcb", {"more": 1, "other": 2}]


def test_arguments_that_mean_nothing_are_refused(redis_url: str) -> None:
    broker = RedisStreamBroker(redis_url)
    with pytest.raises(TypeError, match="needs its task classes"):
        Worker(broker)
    with pytest.raises(TypeError, match="does not know lease"):
        TaskScheduler(broker, CLASSES, lease=5)
    with pytest.raises(TypeError, match="needs a result of create_task_bindings"):
        BaseTask.bind_broker({})


@pytest.mark.parametrize("prefix", [None, "mine"])
async def test_result_backend_reads_what_it_has_written(redis_url: str, prefix: str | None) -> None:
    named: dict[str, Any] = {} if prefix is None else {"prefix": prefix}
    backend = RedisResultBackend(redis_url, result_ttl_seconds=60, **named)
    broker = RedisStreamBroker(redis_url)
    await backend.startup()
    with pytest.raises(ResultIsMissingError):
        await backend.get_result("t")
    await backend.set_result("t", TaskResult.from_value({"n": 1}, 0.5))
    assert await backend.is_result_ready("t")
    assert (await backend.get_result("t")).return_value == {"n": 1}
    assert await broker.is_result_ready("t") is (prefix is None)
    await backend.shutdown()
    await broker.shutdown()


@pytest.fixture
def redis_in_place_of_a_fake() -> Any:
    """A fixture as in the page on migration."""
    with embedded_redis() as url:
        yield Redis.from_url(url)


async def test_embedded_server_takes_the_place_of_fakeredis(redis_in_place_of_a_fake: Redis) -> None:
    redis = redis_in_place_of_a_fake
    mine, other = MutexLock(JOB, 1), MutexLock(JOB, 1)
    assert await mine.acquire(redis)
    assert not await other.acquire(redis)
    await mine.release(redis)
    where = redis.connection_pool.connection_kwargs
    broker = RedisStreamBroker(f"redis://{where['host']}:{where['port']}")
    await submit_task(broker, "test:Note", ["later"], run_at=datetime.now(UTC) + timedelta(hours=1))
    assert await redis.zcard("diracx:tasks:delayed") == 1
    await broker.shutdown()
    await redis.aclose()


@pytest.mark.parametrize("enabled", [True, False])
def test_diracx_can_disable_the_services(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    for service in ("TASKS", "DASHBOARD"):
        monkeypatch.setenv(f"DIRACX_SERVICE_{service}_ENABLED", str(enabled).lower())
    services = FactorySettings().enabled_services
    assert [services.get(name, True) for name in ("tasks", "dashboard")] == [enabled, enabled]
